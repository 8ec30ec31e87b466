from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from client_agent.taskdir import write_json
from deploy.lab.outcomes import read, steps_at
from protos.digests import digest_of
from protos.errors import InvalidInput
from tests.unit.deploy.lab.grid_of_cells import metrics_of, write_grid

ALONE, FOUR = [0.5, 0.7, 0.8, 0.8], [0.5, 0.6, 0.71, 0.73]


def by_sites(axes: Mapping[str, Any]) -> dict[str, Any] | None:
    accuracies = {1: ALONE, 4: FOUR, 16: [0.5, 0.5, 0.5, 0.5]}[axes["sites"]]
    return metrics_of(accuracies, sites=axes["sites"], seed=axes["seed"], steps=64 // axes["sites"])


def rows_of(folder: Path, *, budget: int | None = None) -> dict[str, dict[str, Any]]:
    return {row["cell"]: row for row in read([folder], budget=budget).rows}


def test_rounds_to_target_are_counted_to_the_first_that_has_90_percent_of_one_site_with_all_rows(
    tmp_path: Path,
) -> None:
    """One site ends at 0.8, so the target is 0.72: four sites have it in round 3, sixteen never."""
    rows = rows_of(write_grid(tmp_path / "g", axes={"sites": [1, 4, 16], "seed": [1]}, of=by_sites))
    assert [row["rounds_to_target"] for row in rows.values()] == [2, 3, None]
    assert [row["target"] for row in rows.values()] == pytest.approx([0.72] * 3)
    assert rows["sites-4,seed-1"]["share_of_baseline"] == pytest.approx(0.73 / 0.8)


def test_a_budget_of_rounds_moves_the_target_and_not_the_rounds_that_are_looked_at(tmp_path: Path) -> None:
    """After one round one site has 0.7: the target is 0.63, which four sites reach a round later."""
    grid = write_grid(tmp_path / "g", axes={"sites": [1, 4, 16], "seed": [1]}, of=by_sites)
    row = rows_of(grid, budget=1)["sites-4,seed-1"]
    assert (row["at_budget"], row["last"], row["rounds_to_target"]) == (0.6, 0.73, 2)
    assert row["target"] == pytest.approx(0.63)


def test_the_row_of_a_cell_has_its_best_round_its_test_rows_and_what_it_cost(tmp_path: Path) -> None:
    def of(axes: Mapping[str, Any]) -> dict[str, Any]:
        accuracies = [0.5, 0.9, 0.8]
        return metrics_of(accuracies, sites=2, seed=7, steps=3, beside={"matthews_correlation": [0.0, 0.8, 0.6]},
                          of_round={"aggregation_error": 0.25, "update_coefficient.a": 0.0,
                                    "update_coefficient.b": 1.0})  # fmt: skip

    grid = write_grid(tmp_path / "g", axes={"variant": ["a"], "seed": [7]}, of=of)
    (row,) = rows_of(grid).values()
    assert (row["first"], row["best"], row["best_round"], row["last"], row["last_round"]) == (0.5, 0.9, 1, 0.8, 2)
    assert row["test"] == pytest.approx(0.89)
    assert (row["left_out"], row["rounds_undistilled"]) == ("a=2", 0)
    assert (row["matthews_correlation_best"], row["matthews_correlation_last"]) == (0.8, 0.6)
    # Version 0 is in the sums and not in the means.
    assert (row["bytes_up"], row["bytes_up_per_round"]) == (6_000, 2_000)
    assert (row["seconds"], row["seconds_per_round"]) == (6.0, 2.0)
    assert (row["steps_along_average"], row["aggregation_error"]) == (6, 0.25)
    spec = json.loads((grid / "cells" / row["cell"] / "metrics.json").read_text())["spec"]
    canonical = json.dumps(spec, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert row["config_hash"] == digest_of(canonical.encode()) and row["seed"] == 7


def test_a_loss_is_better_when_it_is_lower(tmp_path: Path) -> None:
    """One site ends at 1.2, so the target is 1.2 / 0.9: 1.333, under which four sites come in round 2."""
    grid = write_grid(tmp_path / "g", axes={"sites": [1, 4], "seed": [1]}, of=by_sites)
    row = {row["cell"]: row for row in read([grid], metric="loss").rows}["sites-4,seed-1"]
    assert row["target"] == pytest.approx(4 / 3) and row["rounds_to_target"] == 2
    assert row["best"] == pytest.approx(1.27) and row["chance"] is None


def test_steps_along_the_average_are_those_of_one_site(tmp_path: Path) -> None:
    assert steps_at(metrics_of([0.5, 0.6, 0.7], sites=4, steps=16)) == {0: 0.0, 1: 16, 2: 32}


def test_cells_that_are_not_done_have_no_figures_and_say_why(tmp_path: Path) -> None:
    def of(axes: Mapping[str, Any]) -> dict[str, Any] | None:
        if axes["seed"] == 2:
            return metrics_of([0.5, 0.9], sites=axes["sites"], state="FAILED", sentence="site-1 has no rows")
        return None if axes["seed"] > 2 else by_sites(axes)

    grid = write_grid(tmp_path / "g", axes={"sites": [1], "seed": [1, 2, 3, 4]}, of=of)
    (grid / "cells" / "sites-1,seed-4.lab.log").write_text("Enrolling 1 sites.\nThe hub cache does not hold it.\n")
    study = read([grid])
    assert [cell.name for cell in study.done] == ["sites-1,seed-1"]
    assert [(cell.state, cell.sentence) for cell in study.missing] == [
        ("FAILED", "site-1 has no rows"), ("NOT BEGUN", ""), ("NOT BEGUN", "The hub cache does not hold it."),
    ]  # fmt: skip
    assert all("last" not in row for row in study.rows[1:])


def test_folders_that_several_machines_filled_are_one_grid(tmp_path: Path) -> None:
    axes = {"sites": [1], "seed": [1, 2]}
    halves = [
        write_grid(tmp_path / name, axes=axes, of=lambda cell, own=own: by_sites(cell) if cell["seed"] == own else None)
        for name, own in (("one", 1), ("two", 2))
    ]
    assert [cell.is_done for cell in read(halves).cells] == [True, True]


def test_a_cell_without_a_baseline_of_its_own_takes_the_nearest(tmp_path: Path) -> None:
    """Of the other variant, because this one never ran at one site; both its seeds."""

    def of(axes: Mapping[str, Any]) -> dict[str, Any] | None:
        return None if (axes["variant"], axes["sites"]) == ("adamw", 1) else by_sites(axes)

    grid = write_grid(tmp_path / "g", axes={"seed": [1, 2], "sites": [1, 4], "variant": ["sgd", "adamw"]}, of=of)
    row = rows_of(grid)["seed-1,sites-4,variant-adamw"]
    assert row["baseline_cells"] == "seed-1,sites-1,variant-sgd"


def test_chance_is_the_most_frequent_label_of_the_validation_rows(tmp_path: Path) -> None:
    grid = write_grid(tmp_path / "g", axes={"data": ["skewed"], "seed": [1]}, of=lambda axes: metrics_of(ALONE))
    assert read([grid]).chance == {"skewed": 0.5}  # Of its two labels, where the rows are not to be had.
    rows = pyarrow.table({"y": ["yes", "no", "no", "no"]})
    pyarrow.parquet.write_table(rows, tmp_path / "validation.parquet")
    data = {"validation": str(tmp_path / "validation.parquet"), "columns": {"label": "y"}}
    write_json(grid / "cells" / "data-skewed,seed-1" / "lab.json", {"experiment": {"data": data}})
    assert read([grid]).chance == {"skewed": 0.75}
    # The column has its usual name unless lab.toml says another.
    pyarrow.parquet.write_table(rows.rename_columns(["label"]), tmp_path / "validation.parquet")
    data = {"validation": str(tmp_path / "validation.parquet"), "columns": {}}
    write_json(grid / "cells" / "data-skewed,seed-1" / "lab.json", {"experiment": {"data": data}})
    assert read([grid]).chance == {"skewed": 0.75}


def test_a_measure_that_nobody_took_is_named(tmp_path: Path) -> None:
    grid = write_grid(tmp_path / "g", axes={"sites": [1], "seed": [1]}, of=by_sites)
    with pytest.raises(InvalidInput, match="No cell measured 'perplexity'"):
        read([grid], metric="perplexity")
    with pytest.raises(InvalidInput, match=r"holds no grid\.json"):
        read([tmp_path])
