from __future__ import annotations

import csv
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from deploy.lab.outcomes import read
from deploy.recipes.record import main, record
from deploy.recipes.tables import refilled
from protos.digests import digest_of
from protos.errors import InvalidInput
from tests.unit.deploy.lab.grid_of_cells import metrics_of, write_grid

RECIPES = Path(__file__).parents[4] / "deploy" / "recipes"
# By variant and seed: sgd has 50, 60 and 70 % in the end, adamw 62, 70 and 81 %.
LAST = {"sgd": (0.5, 0.6, 0.7), "adamw": (0.62, 0.7, 0.81)}
GRID = {"sites": [16, 4], "variant": ["sgd", "adamw"], "seed": [1, 2, 3]}


def cell(axes: Mapping[str, Any]) -> dict[str, Any] | None:
    """With 16 sites a tenth less, and one seed of adamw not yet done."""
    if axes["sites"] == 16 and axes["variant"] == "adamw" and axes["seed"] == 3:
        return None
    last = LAST[axes["variant"]][axes["seed"] - 1] - (0.1 if axes["sites"] == 16 else 0)
    return metrics_of([0.1, last], sites=axes["sites"], seed=axes["seed"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    record(tmp_path, grids=[write_grid(tmp_path / "grid", axes=GRID, of=cell)], name="six")
    return tmp_path


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results/six.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def filled(folder: Path, comment: str) -> list[str]:
    text = f"Before.\n\n<!-- {comment} -->\n| what | stood |\n<!-- end -->\n\nAfter.\n"
    begin, end = f"Before.\n\n<!-- {comment} -->\n", "\n<!-- end -->\n\nAfter.\n"
    made = refilled(text, folder=folder)
    assert made.startswith(begin) and made.endswith(end)
    return made.removeprefix(begin).removesuffix(end).splitlines()


def test_a_record_has_each_cell_that_is_done_as_the_report_has_it(folder: Path) -> None:
    reported = {row["cell"]: row for row in read([folder / "grid"]).rows}
    found = rows(folder)
    assert len(found) == 11 and "sites-16,variant-adamw,seed-3" not in {row["cell"] for row in found}
    for row in found:
        own = reported[row["cell"]]
        assert row["config_hash"] == own["config_hash"] and row["versions"] == "silotune=0.1.0 torch=2.13.0"
        for name in ("seed", "last", "test", "bytes_up"):
            assert float(row[name]) == pytest.approx(own[name], rel=1e-5)
    # Empty columns are left out, and figures are not longer than need be.
    assert not {"model", "aggregation_error", "state", "predictions"} & found[0].keys()
    assert {row["test"] for row in found} <= {"0.49", "0.59", "0.69", "0.61", "0.8", "0.39", "0.51"}


def test_what_is_recorded_later_takes_the_place_of_a_cell_and_leaves_the_others(folder: Path) -> None:
    before = rows(folder)
    later = write_grid(folder / "later", axes={**GRID, "sites": [4], "seed": [3, 4]},
                       of=lambda axes: metrics_of([0.1, 0.9], sites=4, seed=axes["seed"]))  # fmt: skip
    record(folder, grids=[later], name="six")
    after = {row["cell"]: row["last"] for row in rows(folder)}
    replaced = {f"sites-4,variant-{variant},seed-3": "0.9" for variant in GRID["variant"]}
    new = {f"sites-4,variant-{variant},seed-4": "0.9" for variant in GRID["variant"]}
    assert after == {row["cell"]: row["last"] for row in before} | replaced | new
    # Of folders that are named together the first.
    record(folder, grids=[folder / "grid", later], name="both")
    record(folder, grids=[later, folder / "grid"], name="six")
    assert "sites-4,variant-sgd,seed-3,4,sgd,3," in (folder / "results/both.csv").read_text().replace('"', "")
    assert {row["cell"]: row["last"] for row in rows(folder)} == after


def test_the_non_federated_cell_may_lie_in_another_grid(tmp_path: Path) -> None:
    many, alone = (
        write_grid(tmp_path / f"{sites}", axes={"sites": [sites], "seed": [1, 2]},
                   of=lambda axes, last=last: metrics_of([0.1, last], sites=axes["sites"], seed=axes["seed"]))
        for sites, last in ((16, 0.4), (1, 0.8))
    )  # fmt: skip
    record(tmp_path, grids=[many, alone], name="six")
    assert filled(tmp_path, "table: six.csv; lines: sites; figures: last, share_of_baseline; where: sites=16") == [
        "| sites | accuracy, last | of one site's | seeds |",
        "| --- | ---: | ---: | ---: |",
        "| 16 | 40.0 ± 0.0 % | 50.0 ± 0.0 % | 2 |",
    ]


def test_a_record_names_what_was_said_of_each_test_row(tmp_path: Path) -> None:
    grid = write_grid(tmp_path / "grid", axes=GRID, of=cell)
    kept = grid / "cells/sites-4,variant-sgd,seed-1/agents/house/predictions"
    kept.mkdir(parents=True)
    (kept / "job-1-version-1-test.parquet").write_bytes(b"of the test rows")
    (kept / "job-1-version-1-validation.parquet").write_bytes(b"of others")
    record(tmp_path, grids=[grid], name="six")
    named = {row["cell"]: row["predictions"] for row in rows(tmp_path) if row["predictions"]}
    assert named == {"sites-4,variant-sgd,seed-1": digest_of(b"of the test rows")}


def test_a_grid_of_which_nothing_is_done_is_not_recorded(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="None of these grids"):
        record(tmp_path, grids=[write_grid(tmp_path / "grid", axes=GRID, of=lambda axes: None)], name="six")
    assert not (tmp_path / "results").exists()


def test_a_table_has_a_column_for_each_value_of_an_axis(folder: Path) -> None:
    # 4 sites, sgd: the standard deviation is 10 points, and Student's quantile of two degrees of freedom 4.303.
    assert filled(folder, "table: six.csv; lines: variant; columns: sites; figure: last") == [
        "| variant | 4 sites | 16 sites | seeds |",
        "| --- | ---: | ---: | ---: |",
        "| `sgd` | 60.0 ± 24.8 % | 50.0 ± 24.8 % | 3 |",
        "| `adamw` | 71.0 ± 23.7 % (3) | 56.0 ± 50.8 % (2) |  |",
    ]


def test_a_table_has_several_figures_of_the_cells_that_it_is_about(folder: Path) -> None:
    figures = "test, loss_last, rounds, bytes_up, seconds"
    assert filled(folder, f"table: six.csv; lines: variant, sites;\n    figures: {figures}; where: seed=2") == [
        "| variant | sites | accuracy, test | loss, last | rounds | bytes up | seconds | seeds |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| `sgd` | 4 | 59.0 % | 1.400 | 1 | 8.0 kB | 4 | 1 |",
        "| `sgd` | 16 | 49.0 % | 1.500 | 1 | 32.0 kB | 4 | 1 |",
        "| `adamw` | 4 | 69.0 % | 1.300 | 1 | 8.0 kB | 4 | 1 |",
        "| `adamw` | 16 | 59.0 % | 1.400 | 1 | 32.0 kB | 4 | 1 |",
    ]
    several = filled(folder, "table: six.csv; lines: sites; figures: last; where: variant=adamw, seed=1, seed=2")
    assert several[2:] == ["| 4 | 66.0 ± 50.8 % | 2 |", "| 16 | 56.0 ± 50.8 % | 2 |"]


def test_pairs_are_compared_by_seed(folder: Path) -> None:
    # 12, 10 and 11 points: a standard deviation of 1, so 11 +- 4.303 / sqrt(3), and at least 11 - 2.920 / sqrt(3).
    assert filled(folder, "pairs: six.csv; measure: last; pairs: adamw - sgd, sgd - adamw; where: sites=4") == [
        "|  | accuracy, last, points | 95 % interval | p | Holm | worse by at most (95 %, one side) | seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| `adamw - sgd` | +11.00 | +8.52 to +13.48 | 0.0027 | 0.0055 | -9.31 | 3 |",
        "| `sgd - adamw` | -11.00 | -13.48 to -8.52 | 0.0027 | 0.0055 | +12.69 | 3 |",
    ]
    # A lower loss is better; and a side may say all that it is.
    pair = "variant=adamw sites=4 - variant=sgd sites=4"
    lines = filled(folder, f"pairs: six.csv; measure: loss_last; pairs: {pair}")
    assert lines[2] == f"| `{pair}` | -0.1100 | -0.1348 to -0.0852 | 0.0027 | 0.0027 | -0.0931 | 3 |"
    alone = filled(folder, "pairs: six.csv; measure: last; pairs: adamw - sgd; where: sites=16, seed=1")
    assert alone[2].endswith("| – | – | – | – | – | fewer than two |")


@pytest.mark.parametrize(
    ("comment", "says"),
    [
        ("table: six.csv; lines: variant; columns: sites; figur: last", "'figur' is not known here. Known are lines"),
        ("table: six.csv; lines: variants; figure: last", "'variants' is not known"),
        ("table: six.csv; lines: variant; figures: last, lowest", "'lowest' is not known"),
        ("table: six.csv; lines: variant; columns: sites; figures: last, test", "With columns there is one figure"),
        ("table: six.csv; lines: variant; figure: last; figures: test", "'figures' is said twice"),
        ("table: six.csv; lines: variant", "does not say 'figures'"),
        ("table: five.csv; lines: variant; figure: last", "no record five.csv"),
        ("table: six.csv; lines: variant; figure: last; where: sites=8", "No cell has sites=8"),
        ("table: six.csv; lines: variant; figure: last", "would be one figure"),
        ("pairs: six.csv; measure: last; pairs: adamw - sdg; where: sites=4", "No cell has variant=sdg"),
        ("pairs: six.csv; measure: last; pairs: adamw; where: sites=4", "'adamw' is not two variants"),
        ("pairs: six.csv; measure: rounds; pairs: adamw - sgd; where: sites=4", "'rounds' is not known"),
        ("pairs: six.csv; measure: last; pairs: adamw - sgd", "would be one figure"),
    ],
)
def test_a_comment_that_cannot_be_followed_is_refused_in_a_sentence(folder: Path, comment: str, says: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        filled(folder, comment)
    assert says in str(refused.value) and str(refused.value).startswith(comment.partition(";")[0])


@pytest.mark.parametrize(
    "text",
    [
        "<!-- table: six.csv; lines: sites; figure: last; where: variant=sgd -->\n",
        "<!-- tabel: six.csv -->\n<!-- end -->\n",
        "<!-- table: six.csv -->\n<!-- table: six.csv -->\n<!-- end -->\n",
        "<!-- table six.csv -->\n<!-- end -->\n",
    ],
)
def test_a_table_without_beginning_or_end_is_refused(folder: Path, text: str) -> None:
    with pytest.raises(InvalidInput, match="no `<!-- end -->` after it"):
        refilled(text, folder=folder)


def test_means_of_two_measures_are_not_made(folder: Path) -> None:
    path = folder / "results/six.csv"
    path.write_text(path.read_text().replace("accuracy", "loss", 1))
    with pytest.raises(InvalidInput, match="'last' is of loss in some cells and of accuracy in others"):
        filled(folder, "table: six.csv; lines: variant, sites; figure: last")


def test_the_command_records_and_fills_and_fills_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = folder / "README.md"
    table = "<!-- table: five.csv; lines: variant; figure: last; where: sites=4 -->\n{}<!-- end -->\n"

    def command(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["record", str(folder), *words])
        main()

    page.write_text(table.format(""))
    with pytest.raises(SystemExit, match=r"There is no record five\.csv"):
        command()
    assert page.read_text() == table.format("")
    command("--from", str(folder / "grid"), "--name", "five")
    whole = page.read_text()
    assert "| `adamw` | 71.0 ± 23.7 % | 3 |" in whole
    page.write_text(table.format("stale\n"))
    command()
    assert page.read_text() == whole


@pytest.mark.parametrize("page", sorted(RECIPES.glob("*/README.md")), ids=lambda page: page.parent.name)
def test_the_tables_of_a_recipe_are_what_its_records_say(page: Path) -> None:
    """`python -m deploy.recipes.record FOLDER` makes them so."""
    assert refilled(page.read_text(), folder=page.parent) == page.read_text()


def test_each_record_says_of_each_cell_with_what_it_was_made() -> None:
    for path in RECIPES.glob("*/results/*.csv"):
        with path.open(newline="") as file:
            unsaid = [row["cell"] for row in csv.DictReader(file)
                      if not all(row.get(name) for name in ("config_hash", "seed", "versions", "metric"))]  # fmt: skip
        assert not unsaid, f"{path.relative_to(RECIPES)}: {unsaid}"
