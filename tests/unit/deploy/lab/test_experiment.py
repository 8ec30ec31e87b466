from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from coordinator import recipe
from deploy.lab import experiment
from deploy.lab.experiment import assigned
from deploy.lab.place import site_tomls
from deploy.lab.plan import Typed, cells
from deploy.lab.run import Plan
from protos.errors import InvalidInput, RecipeInvalid

RECIPES = Path(experiment.__file__).parents[1] / "recipes"
STUDY = RECIPES / "flowertune-medical"


def planned(
    directory: Path, *, partition: str = "", seed: int | None = None, sites: int | None = None, **typed: Any
) -> Plan:
    """The one run that these options make."""
    axes = {"partitions": partition and [partition], "seeds": seed and [seed], "sites": sites and [sites]}
    (cell,) = cells(directory, Typed(axes={name: value for name, value in axes.items() if value}, **typed))
    assert not cell.name
    return cell.plan


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_what_it_names_is_there(path: Path) -> None:
    if not path.name.startswith("lab"):
        recipe.read(path)
        return
    found = cells(path.parent, Typed(lab_file=path.name))
    assert found
    # The others want data sets that everybody prepares for themselves.
    for table in [cell.plan.experiment.data for cell in found if path.name == experiment.FILE]:
        assert table is not None
        named = (table.rows, table.validation, table.test, *table.benchmarks.values())
        assert all(Path(file).exists() for file in named if file)


def test_the_study_is_written_as_it_was_run() -> None:
    """Its settings: Song and Lee, with FlowerTune's template."""
    spec = recipe.read(STUDY / "recipe.toml")
    rates = [spec.learning_rate_at(number) for number in range(1, 11)]
    assert rates[-1] == pytest.approx(1e-6) and rates[0] == pytest.approx(4.88e-5, rel=1e-3)
    long = recipe.read(STUDY / "recipe-100.toml")
    assert long.model_copy(update={"rounds": 10, "name": spec.name}) == spec and long.rounds == 100


def test_the_study_of_numbers_of_sites_is_written_as_it_was_run() -> None:
    """Hilmkil et al. 2021, section 3.4: three models, three data sets, 1 to 32 sites, plain SGD."""
    found = cells(RECIPES / "hilmkil-2021", Typed(lab_file="lab-full.toml"))
    assert len(found) == 3 * 3 * 6
    assert sorted({cell.axes["sites"] for cell in found}) == [1, 2, 4, 8, 16, 32]
    assert {(cell.axes["data"], cell.plan.spec.rounds) for cell in found} == {
        ("imdb", 100), ("ag-news", 100), ("yelp-full", 50)
    }  # fmt: skip
    models = [cell.plan.experiment.model for cell in found]
    assert {model.hub for model in models if model} == {
        "google-bert/bert-base-cased", "albert/albert-base-v2", "distilbert/distilbert-base-cased"
    }  # fmt: skip
    for spec in (cell.plan.spec for cell in found):
        local = spec.local
        assert (local.epochs, local.batch_size, spec.task.model_dump()["max_length"]) == (2, 32, 128)
        assert (local.optimizer, local.momentum, local.weight_decay, local.proximal) == ("sgd", 0, 0, 0)
        assert {spec.learning_rate_at(number) for number in (1, spec.rounds)} == {2e-5}
        assert (spec.method.type, spec.aggregation.rule, spec.cohort.size) == ("full", "mean", "all")
        assert spec.aggregation.server_optimizer.type == "none" and not local.max_gradient_norm


def test_an_option_changes_one_key_and_what_it_makes_is_checked() -> None:
    plan = planned(STUDY, changes=("local.data_order=same", "method.rank=4"), rounds=3, seed=9, sites=5)
    assert (plan.spec.local.data_order, plan.spec.rounds, plan.spec.seed) == ("same", 3, 9)
    assert plan.spec.method.model_dump()["rank"] == 4 and plan.experiment.sites == 5
    with pytest.raises(RecipeInvalid, match="data_ordr is not a known key"):
        planned(STUDY, changes=("local.data_ordr=same",))
    with pytest.raises(InvalidInput, match="is not KEY=VALUE"):
        assigned("local.steps")


def test_a_partition_is_typed_as_words_with_colons() -> None:
    def partition(text: str) -> tuple[str, str, float]:
        found = planned(STUDY, partition=text).experiment.partition
        return found.kind, found.by, found.alpha

    assert partition("dirichlet:qtype:0.1") == ("dirichlet", "qtype", 0.1)
    assert partition("groups:client")[:2] == ("groups", "client")
    assert partition("quantity:2") == ("quantity", "", 2.0)
    for wrong in ("dirichlet", "by-hand", "quantity:a", "uniform:1:2"):
        with pytest.raises(InvalidInput):
            planned(STUDY, partition=wrong)


def test_a_site_of_an_experiment_holds_back_no_rows_and_the_house_agent_holds_the_questions() -> None:
    plan = planned(STUDY)
    own, house = site_tomls(plan.experiment, plan.spec, threads=1)
    assert "validation = 0.0" in own and "pubmedqa" not in own
    assert set(re.findall(r"\[data\.(\w+)\]", house)) == {"flashcards", "pubmedqa", "medqa", "medmcqa"}
    # What it said of each row stays comparable.
    assert 'predictions = "predictions"' in house and "predictions" not in own


def test_a_distillation_never_learns_from_the_rows_that_judge_it(tmp_path: Path) -> None:
    study = RECIPES / "fedlora-kd"
    for file in study.glob("*.toml"):
        text = file.read_text().replace("../../data", str(RECIPES.parent / "data"))
        (tmp_path / file.name).write_text(text.replace("slice_share = 0.2\n", ""))
    taught, plain = ({"variants": [name], "seeds": [1]} for name in ("fed-lora-kd", "fed-lora"))
    assert cells(tmp_path, Typed(axes=plain))
    with pytest.raises(InvalidInput, match="the house agent no rows to learn from"):
        cells(tmp_path, Typed(axes=taught))
    assert cells(study, Typed(axes=taught))
