from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from deploy.lab.grid_tables import comparisons, curve, glance, groups, law, summaries
from deploy.lab.outcomes import read
from tests.unit.deploy.lab.grid_of_cells import metrics_of, write_grid

# Ends at 0.70, 0.72, 0.74 for the first variant, and 1, 2, 3 of a hundred higher for the second.
ENDS = {("plain", 1): 0.70, ("plain", 2): 0.72, ("plain", 3): 0.74,
        ("new", 1): 0.71, ("new", 2): 0.74, ("new", 3): 0.77}  # fmt: skip


def two_variants(axes: Mapping[str, Any]) -> dict[str, Any]:
    return metrics_of([0.5, ENDS[axes["variant"], axes["seed"]]], seed=axes["seed"])


def test_a_summary_is_the_mean_over_seeds(tmp_path: Path) -> None:
    grid = write_grid(tmp_path / "g", axes={"seed": [1, 2, 3], "variant": ["plain", "new"]}, of=two_variants)
    plain, new = summaries(read([grid]))
    assert (plain["variant"], new["variant"], plain["seeds"]) == ("plain", "new", [1, 2, 3])
    assert plain["last"].value == pytest.approx(0.72) and new["last"].value == pytest.approx(0.74)
    # t = 4.3027 at two degrees of freedom, deviation 0.02.
    assert plain["last"].half == pytest.approx(4.3027 * 0.02 / 3**0.5, abs=1e-5)
    assert plain["rounds_to_target"] is None and plain["aimed"] == 0  # No cell has one site.


def test_the_table_of_methods_has_a_line_for_each_and_its_figures_by_data(tmp_path: Path) -> None:
    axes = {"seed": [1], "data": ["cola", "sst2"], "variant": ["plain", "new"]}
    study = read([write_grid(tmp_path / "g", axes=axes, of=two_variants)])
    data_sets, lines = glance(study, summaries(study))
    assert data_sets == ["cola", "sst2"]
    assert [(line["variant"], list(found)) for line, found in lines] == [
        ("plain", ["cola", "sst2"]), ("new", ["cola", "sst2"]),
    ]  # fmt: skip


def test_variants_are_held_against_each_other_with_what_is_not_worse(tmp_path: Path) -> None:
    """Gains 1, 2, 3 of a hundred: no difference shown at three seeds (p = 0.074), and hardly worse."""
    grid = write_grid(tmp_path / "g", axes={"seed": [1, 2, 3], "variant": ["plain", "new"]}, of=two_variants)
    found = {row["figure"]: row for row in comparisons(read([grid]))}
    accuracy, loss = found["last"], found["loss_last"]
    assert (accuracy["first"], accuracy["second"], accuracy["seeds"]) == ("plain", "new", 3)
    assert accuracy["mean"] == pytest.approx(0.02) and accuracy["t_p"] == pytest.approx(0.0742, abs=1e-4)
    assert accuracy["says"] == "no difference shown"
    # The lower bound on one side, 0.02 - 2.92 x 0.01 / sqrt(3), is above zero: worse by less than nothing.
    assert accuracy["worse_by"] == pytest.approx(-(0.02 - 2.9200 * 0.01 / 3**0.5), abs=1e-6)
    assert loss["worse_by"] == pytest.approx(accuracy["worse_by"])
    assert loss["worse_by_share"] == pytest.approx(loss["worse_by"] / 1.28)
    assert found["test"]["mean"] == pytest.approx(0.02)


def test_a_sure_difference_is_called_by_its_side(tmp_path: Path) -> None:
    def of(axes: Mapping[str, Any]) -> dict[str, Any]:
        better = axes["variant"] == "new"
        return metrics_of([0.5, 0.7 + 0.01 * axes["seed"] + better * (0.05 + 0.001 * axes["seed"])], seed=axes["seed"])

    grid = write_grid(tmp_path / "g", axes={"seed": [1, 2, 3, 4, 5], "variant": ["new", "plain"]}, of=of)
    found = {row["figure"]: row for row in comparisons(read([grid]))}
    assert found["last"]["says"] == "worse" and found["loss_last"]["says"] == "worse"
    assert found["last"]["mean"] == pytest.approx(-0.053) and found["last"]["sign_p"] == pytest.approx(2 / 32)


def test_one_of_many_questions_is_not_called_a_difference_by_its_own_p(tmp_path: Path) -> None:
    """Gains of about 0.02 at five seeds, p = 0.017, are one of six pairs: Holm's p is six times that."""
    gains = {"new": (0.03, 0.01, 0.02, 0.015, 0.035), "other": (0.01, -0.01, 0.0, 0.02, -0.02),
             "third": (-0.01, 0.02, -0.02, 0.0, 0.01), "plain": (0.0,) * 5}  # fmt: skip

    def of(axes: Mapping[str, Any]) -> dict[str, Any]:
        end = 0.7 + gains[axes["variant"]][axes["seed"] - 1]
        return metrics_of([0.5, end], seed=axes["seed"])

    def judged(variants: list[str]) -> dict[str, Any]:
        folder = tmp_path / str(len(variants))
        found = comparisons(read([write_grid(folder, axes={"seed": [1, 2, 3, 4, 5], "variant": variants}, of=of)]))
        (row,) = [row for row in found if (row["figure"], row["first"], row["second"]) == ("last", "plain", "new")]
        return row

    alone, among = judged(["plain", "new"]), judged(["plain", "new", "other", "third"])
    assert alone["t_p"] == among["t_p"] < 0.05 and alone["says"] == "better"
    assert among["holm_p"] > 0.05 and among["says"] == "no difference shown"


def test_the_median_of_rounds_counts_a_failure_as_later_than_all(tmp_path: Path) -> None:
    ends = {1: 0.75, 2: 0.6, 3: 0.75}

    def of(axes: Mapping[str, Any]) -> dict[str, Any]:
        end = 0.8 if axes["sites"] == 1 else ends[axes["seed"]] if axes["sites"] == 4 else 0.5
        return metrics_of([0.5, 0.6, end], sites=axes["sites"], seed=axes["seed"])

    rows = summaries(read([write_grid(tmp_path / "g", axes={"seed": [1, 2, 3], "sites": [1, 4, 16]}, of=of)]))
    assert [(row["sites"], row["rounds_to_target"], row["reached"], row["aimed"]) for row in rows] == [
        (1, 2, [2, 2, 2], 3), (4, 2, [2, 2], 3), (16, None, [], 3),
    ]  # fmt: skip


@pytest.mark.parametrize("steps_decide", [True, False])
def test_the_law_of_equal_steps_is_told_from_one_of_equal_rounds(tmp_path: Path, steps_decide: bool) -> None:
    """Two sites do half as many steps a round. Where steps decide, lines lie on each other over steps only."""

    def of(axes: Mapping[str, Any]) -> dict[str, Any]:
        each = 10 // axes["sites"]
        return metrics_of([0.5 + 0.01 * (each if steps_decide else 10) * version for version in range(4)],
                          sites=axes["sites"], seed=axes["seed"], steps=each)  # fmt: skip

    (row,) = law(read([write_grid(tmp_path / "g", axes={"seed": [1], "sites": [1, 2]}, of=of)]))
    assert (row["few"], row["many"]) == (1, 2)
    if steps_decide:
        # After rounds 1, 2 and 3 they are 0.05, 0.10 and 0.15 apart.
        assert row["at_steps"] == pytest.approx(0, abs=1e-12) and row["at_rounds"] == pytest.approx(0.10)
    else:
        # Ten steps are round 1 of one site and round 2 of two: 0.6 and 0.7.
        assert row["at_steps"] == pytest.approx(0.10) and row["at_rounds"] == pytest.approx(0, abs=1e-12)


def test_where_every_site_does_the_same_steps_there_is_no_law_to_show(tmp_path: Path) -> None:
    def of(axes: Mapping[str, Any]) -> dict[str, Any]:
        return metrics_of([0.5, 0.6, 0.7], sites=axes["sites"], seed=1, steps=5)

    assert law(read([write_grid(tmp_path / "g", axes={"seed": [1], "sites": [1, 2]}, of=of)])) == []


def test_a_curve_has_the_rounds_that_every_seed_measured(tmp_path: Path) -> None:
    def of(axes: Mapping[str, Any]) -> dict[str, Any]:
        return metrics_of([0.5, 0.6, 0.8][: 4 - axes["seed"]], seed=axes["seed"], steps=4)

    study = read([write_grid(tmp_path / "g", axes={"seed": [1, 2]}, of=of)])
    (cells,) = groups(study).values()
    assert curve(study, cells) == [(0, 0.5, 0.5, 0.5), (1, 0.6, 0.6, 0.6)]
    assert [place for place, *_ in curve(study, cells, by_steps=True)] == [0, 4]
