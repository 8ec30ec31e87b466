"""Which cells a grid has."""

from __future__ import annotations

from pathlib import Path

import pytest

from client_agent.taskdir import write_json
from deploy.lab.grid import read_grid, run_grid
from deploy.lab.plan import Typed, cells
from protos.errors import Conflict, InvalidInput, RecipeInvalid

RECIPE = """\
name = "small"
rounds = 2

[task]
type = "synthetic"
payload_mb = 0.01

[local]
steps = 1
"""
LAB = """\
sites = 3

[grid]
sites = [1, 4]
seeds = [1, 2]
variants = ["plain", "alone", "noisy"]

[variants.plain]
[variants.alone]
sites = 1
[variants.noisy]
changes = { "task.noise" = 0.5, "rounds" = 5 }
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "lab.toml").write_text(LAB)
    return tmp_path


def test_a_grid_has_a_cell_for_each_combination_and_whole_seeds_come_first(directory: Path) -> None:
    found = cells(directory)
    assert len(found) == len({cell.name for cell in found}) == 10
    assert [cell.axes["seed"] for cell in found] == [1] * 5 + [2] * 5
    first = found[0]
    assert (first.name, dict(first.axes)) == ("sites-1,plain,seed-1", {"seed": 1, "sites": 1, "variant": "plain"})
    by_name = {cell.name: cell.plan for cell in found}
    noisy = by_name["sites-4,noisy,seed-2"]
    assert (noisy.experiment.sites, noisy.spec.rounds, noisy.spec.seed) == (4, 5, 2)


def test_a_variant_with_sites_of_its_own_is_one_cell_whatever_numbers_the_grid_has(directory: Path) -> None:
    alone = [cell for cell in cells(directory, Typed(axes={"sites": ["4", "8"]})) if cell.axes["variant"] == "alone"]
    assert [cell.name for cell in alone] == ["sites-1,alone,seed-1", "sites-1,alone,seed-2"]
    assert all(cell.axes["sites"] == cell.plan.experiment.sites == 1 for cell in alone)
    (directory / "lab.toml").write_text(LAB.replace("sites = [1, 4]\n", ""))
    without_the_axis = [cell for cell in cells(directory) if cell.axes["variant"] == "alone"]
    assert [cell.name for cell in without_the_axis] == ["alone,seed-1", "alone,seed-2"]
    assert all(cell.plan.experiment.sites == 1 for cell in without_the_axis)


def test_what_is_typed_comes_before_what_is_written(directory: Path) -> None:
    axes = {"sites": ["2"], "seeds": ["7"], "variants": ["noisy"]}
    (cell,) = cells(directory, Typed(axes=axes, rounds=3, changes=("task.noise=0.25",)))
    assert (cell.name, cell.plan.spec.rounds) == ("sites-2,noisy,seed-7", 3)
    assert cell.plan.spec.task.model_dump()["noise"] == 0.25


def test_several_values_make_a_grid_of_a_recipe_that_has_none(directory: Path) -> None:
    (directory / "lab.toml").write_text("sites = 3\n")
    (alone,) = cells(directory, Typed(axes={"sites": ["5"], "seeds": ["3"]}))
    assert (alone.name, alone.plan.experiment.sites, alone.plan.spec.seed) == ("", 5, 3)
    assert [cell.name for cell in cells(directory, Typed(axes={"sites": ["5", "6"]}))] == ["sites-5", "sites-6"]


def test_an_axis_that_names_what_is_not_there_fails_before_anything_runs(directory: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no \[variants.missing\]") as caught:
        cells(directory, Typed(axes={"variants": ["missing"]}))
    assert caught.value.hint == "There are plain, alone, noisy."
    with pytest.raises(InvalidInput, match="sites"):
        cells(directory, Typed(axes={"sites": ["many"]}))
    with pytest.raises(RecipeInvalid, match=r"task\.loudness is not a known key"):
        cells(directory, Typed(changes=("task.loudness=1",)))


def done(out: Path, directory: Path) -> None:
    """A grid of `directory` as it lies when all of it has run."""
    for cell in cells(directory):
        (out / "cells" / cell.name).mkdir(parents=True, exist_ok=True)
        write_json(out / "cells" / cell.name / "metrics.json", {"job": {"state": "COMPLETED"}})
    assert run_grid(cells(directory), out=out, jobs=1, part=(1, 1), say=print) == []


def test_a_changed_recipe_is_refused_though_every_cell_is_done(directory: Path, tmp_path: Path) -> None:
    done(tmp_path / "out", directory)
    before = read_grid(tmp_path / "out")
    with pytest.raises(Conflict, match=r"another experiment as .*: the recipe, lab\.toml or an option has changed"):
        run_grid(cells(directory, Typed(rounds=9)), out=tmp_path / "out", jobs=1, part=(1, 1), say=print)
    assert read_grid(tmp_path / "out") == before


def test_the_same_command_again_and_a_part_of_it_are_no_change(directory: Path, tmp_path: Path) -> None:
    done(tmp_path / "out", directory)
    said: list[str] = []
    again = cells(directory, Typed(axes={"seeds": ["2"]}))
    assert run_grid(again, out=tmp_path / "out", jobs=2, part=(2, 2), say=said.append) == []
    assert said == ["2 cells, 2 of them done."]
    assert len(read_grid(tmp_path / "out") or []) == 10


def test_cells_that_fail_say_why_and_nothing_about_how_long_the_others_take(directory: Path, tmp_path: Path) -> None:
    found = cells(directory, Typed(axes={"seeds": ["1"], "variants": ["plain"]}))
    for cell in found:
        (tmp_path / "out" / "cells" / cell.name).mkdir(parents=True)
        (tmp_path / "out" / "cells" / cell.name / "notes.txt").touch()
    said: list[str] = []
    failed = run_grid(found, out=tmp_path / "out", jobs=1, part=(1, 1), say=said.append)
    assert [one.name for one in failed] == ["sites-1,plain,seed-1", "sites-4,plain,seed-1"]
    assert all("holds files that no experiment made" in one.sentence for one in failed)
    assert [line.rpartition(" (")[2] for line in said] == [
        "2 cells.", "1 of 2; nothing to judge the rest by yet)", "2 of 2; the last one)"
    ]  # fmt: skip


def test_a_model_is_not_given_where_the_grid_names_its_models(directory: Path) -> None:
    (directory / "lab.toml").write_text('[grid]\nmodels = ["a"]\n[models.a]\npath = "."\n')
    with pytest.raises(InvalidInput, match="--model is for a run of one model"):
        cells(directory, Typed(model=directory))
