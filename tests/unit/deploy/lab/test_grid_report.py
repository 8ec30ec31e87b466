from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from deploy.cli import main
from deploy.lab.certainty import over_seeds
from deploy.lab.grid_figures import label_of
from deploy.lab.grid_report import mean_text, points_text, write_grid_report
from deploy.lab.outcomes import read
from tests.unit.deploy.lab.grid_of_cells import metrics_of, write_grid
from tests.unit.deploy.lab.test_holdings import grid_with_rows

DISTILLED = {
    "distillation_kept": 1.0, "aggregate_accuracy": 0.6, "student_accuracy": 0.7, "teacher_accuracy": 0.8,
    "aggregate_loss": 1.0, "student_loss": 0.9, "teacher_loss": 0.8, "teacher_slice_loss": 0.5,
}  # fmt: skip


def of(axes: Mapping[str, Any]) -> dict[str, Any] | None:
    """Sixteen sites never learn, and one of their cells was not begun."""
    sites, seed = axes["sites"], axes["seed"]
    if (axes["variant"], sites, seed) == ("kd", 16, 2):
        return None
    end = 0.8 if sites < 16 else 0.5
    measured = [0.5, end - 0.1 + 0.01 * seed, end + 0.01 * seed]
    extra = {"aggregation_error": 0.1 * seed, **(DISTILLED if axes["variant"] == "kd" else {})}
    return metrics_of(measured, sites=sites, seed=seed, steps={1: 4, 4: 2, 16: 1}[sites], of_round=extra)


def test_a_grid_is_one_page_with_its_figures_its_cells_and_all_of_it_as_json(tmp_path: Path) -> None:
    axes = {"seed": [1, 2], "sites": [1, 4, 16], "variant": ["lora", "kd"]}
    grid = write_grid(tmp_path / "<grid>", axes=axes, of=of)
    page = write_grid_report([grid], out=tmp_path / "out", budget=1).read_text()
    drawn = {path.stem for path in (tmp_path / "out" / "plots").glob("*.png")}
    names = {"by_sites_round_1", "by_sites_last_round", "rounds_to_target", "learning_curves", "steps_law",
             "aggregation_error", "distillation_accuracy", "distillation_loss"}  # fmt: skip
    assert drawn == names | {f"{name}-dark" for name in names}
    assert page.startswith("<!doctype html>") and page.count("data:image/png") == 2 * len(names)
    assert "11 of 12 cells are done" in page and "&lt;grid&gt;" in page
    assert "seed-2,sites-16,variant-kd" in page and "not begun" in page
    assert "no difference shown" in page and "not reached" in page
    assert "test rows are measured once" in page and "test: that round" in page
    with (tmp_path / "out" / "cells.csv").open(newline="") as file:
        cells = {row["cell"]: row for row in csv.DictReader(file)}
    assert len(cells) == 12
    done, missing = cells["seed-2,sites-4,variant-kd"], cells["seed-2,sites-16,variant-kd"]
    assert float(done["last"]) == pytest.approx(0.82)
    assert (done["rounds_to_target"], done["distillations_kept"]) == ("1", "2.0")
    assert (missing["state"], missing["last"], missing["config_hash"]) == ("NOT BEGUN", "", "")
    shown = json.loads((tmp_path / "out" / "report.json").read_text())
    assert shown["versions"] == [{"cells": 11, "versions": {"silotune": "0.1.0", "torch": "2.13.0"}}]
    assert [entry["cell"] for entry in shown["missing"]] == ["seed-2,sites-16,variant-kd"]
    (four,) = [row for row in shown["groups"] if (row["sites"], row["variant"]) == (4, "kd")]
    assert four["last"]["mean"] == pytest.approx(0.815) and four["seeds"] == [1, 2]
    assert {row["figure"] for row in shown["comparisons"]} >= {"last", "best", "test", "loss_last"}
    assert [row["many"] for row in shown["law"] if row["variant"] == "lora"] == [4, 16]


def test_the_command_reports_a_grid_with_who_holds_what(tmp_path: Path) -> None:
    grid = grid_with_rows(tmp_path / "a", labels=["no", "yes"] * 60, partition={"kind": "uniform"})
    answer = CliRunner().invoke(main, ["lab", "report", str(grid), "--title", "Who", "--format", "json"])
    assert answer.exit_code == 0, answer.output
    page = Path(json.loads(answer.stdout)["data"]["report"])
    assert page == grid / "report.html" and "Who holds what: skewed, 3 sites" in page.read_text()
    assert (grid / "plots" / "holdings_1.png").exists()
    shown = json.loads((grid / "report.json").read_text())["holdings"]
    assert sum(sum(counts) for counts in shown[0]["rows"].values()) == 120


def test_a_grid_of_which_nothing_is_done_has_a_page_that_says_so(tmp_path: Path) -> None:
    grid = write_grid(tmp_path / "g", axes={"sites": [1, 4], "seed": [1]}, of=lambda axes: None)
    page = write_grid_report([grid], out=tmp_path / "out").read_text()
    assert "0 of 2 cells are done" in page and page.count("not begun") == 2
    assert read([grid]).metric == "accuracy" and "data:image/png" not in page


def test_options_of_grids_are_refused_where_there_is_none(tmp_path: Path) -> None:
    answer = CliRunner().invoke(main, ["lab", "report", str(tmp_path), "--rounds", "5"])
    assert answer.exit_code == 3 and "there is none" in answer.stderr


def test_figures_of_shares_are_written_in_points_of_a_hundred() -> None:
    assert mean_text(over_seeds([0.5]), metric="accuracy") == "50.0 %"
    assert mean_text(over_seeds([0.4, 0.6]), metric="matthews_correlation").startswith("0.500 ± 1.271")
    assert mean_text(None, metric="accuracy") == "–"
    assert points_text(-0.0125, metric="accuracy") == "-1.25" and points_text(0.5, metric="loss") == "+0.5000"


def unmeasured(_: Mapping[str, Any]) -> dict[str, Any]:
    return {**metrics_of([0.5, 0.6]), "evaluations": []}


def test_a_grid_that_the_house_agent_did_not_measure_has_a_page_without_figures_of_it(tmp_path: Path) -> None:
    grid = write_grid(tmp_path / "grid", axes={"seed": [1, 2]}, of=unmeasured)
    page = write_grid_report([grid], out=tmp_path / "out").read_text()
    assert "2 of 2 cells are done" in page and "data:image" not in page
    # What is not there is not explained.
    assert "test rows" not in page and "test: that round" not in page


def test_beside_the_variants_of_another_grid_one_that_has_none_is_named(tmp_path: Path) -> None:
    whole = {"seed": [1], "sites": [1, 4]}
    plain = write_grid(tmp_path / "plain", axes=whole, of=lambda axes: of({**axes, "variant": "lora"}))
    study = read([plain, write_grid(tmp_path / "varied", axes={**whole, "variant": ["kd"]}, of=of)])
    assert [label_of(study, {"variant": variant}, of=["variant"]) for variant in (None, "kd")] == [
        "as the recipe is",
        "kd",
    ]
    assert label_of(study, {}, of=[]) == ""
