"""Each recipe folder in tiny form: its own recipe, sites and method, on a few of its rows and models of a few units.

It shows that a recipe runs from its first round to its last, and nothing about its figures. `make recipes-smoke`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from client_agent.training import small_trio
from client_agent.training.small_trio import Pretraining, Sizes
from deploy.lab.experiment import Experiment, LabData, LabModel, SmallLlama
from deploy.lab.make_trio import texts
from deploy.lab.plan import Cell, cells
from deploy.lab.run import Plan, run
from protos import jobspec

RECIPES = Path(__file__).parents[2] / "deploy" / "recipes"
FOLDERS = sorted(path.parent for path in RECIPES.glob("*/lab.toml"))
ROUNDS, SITES, SITE_ROWS, HELD_OUT_ROWS = 2, 4, 16, 24


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> LabModel:
    """As many layers as MiniLM, so that a recipe may cut and pair them."""
    directory = tmp_path_factory.mktemp("encoder") / "made"
    sizes = Sizes(vocabulary=400, hidden=16, layers=6, heads=2)
    small_trio.make(directory, kind="bert", texts=texts()[:100], sizes=sizes, pretraining=Pretraining(), seed=0)
    return LabModel(path=str(directory))


def few(path: str | None, *, into: Path, rows: int) -> str | None:
    """A table with its first rows alone."""
    if path is None:
        return None
    into.mkdir(exist_ok=True)
    copy = into / f"{len(list(into.iterdir()))}-{Path(path).name}"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).slice(0, rows), copy)
    return str(copy)


def small(model: LabModel, *, encoder: LabModel) -> LabModel:
    if model.make is None:
        return encoder
    size: dict[str, Any] = {"hidden": 16, "vocabulary": 400, "pretrain_steps": 2}
    if isinstance(model.make, SmallLlama):
        size |= {"hidden": 32, "layers": 1, "rows": 60}
    return LabModel(make=model.make.model_copy(update=size))


def in_small(plan: Plan, *, encoder: LabModel, tables: Path) -> Plan:
    found = plan.experiment
    assert found.data is not None and found.model is not None
    # Robust rules need as many updates as they are written for.
    sites = max(min(found.sites, SITES), plan.spec.cohort.quorum)
    data = LabData(
        **{
            **found.data.model_dump(),
            "rows": few(found.data.rows, into=tables, rows=2 * sites * SITE_ROWS),
            "validation": few(found.data.validation, into=tables, rows=HELD_OUT_ROWS),
            "test": few(found.data.test, into=tables, rows=HELD_OUT_ROWS),
            "slice": few(found.data.slice, into=tables, rows=HELD_OUT_ROWS),
            "benchmarks": {},
        }
    )
    teachers = {name: small(model, encoder=encoder) for name, model in found.teachers.items()}
    update = {"data": data, "sites": sites, "model": small(found.model, encoder=encoder), "teachers": teachers}
    experiment = Experiment(**{**{name: getattr(found, name) for name in Experiment.model_fields}, **update})
    fields = plan.spec.model_dump(mode="json")
    fields["local"] |= {"steps": 2, "epochs": None, "batch_size": 4, "micro_batch_size": None}
    if fields["task"]["type"] == "causal-lm":
        # A tokenizer of so few words needs more of them for a sentence.
        fields["task"]["max_length"] = 256
    fields |= {"rounds": ROUNDS}
    fields["evaluation"] |= {"every": 1, "early_stop": 0}
    return Plan(experiment, jobspec.parse(fields), threads=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_first_and_the_last_cell_of_a_recipe_run(folder: Path, encoder: LabModel, tmp_path: Path) -> None:
    found = cells(folder)
    ends: dict[str, Cell] = {cell.name: cell for cell in (found[0], found[-1])}
    for number, cell in enumerate(ends.values()):
        plan = in_small(cell.plan, encoder=encoder, tables=tmp_path / "tables")
        made = run(plan, out=tmp_path / f"out-{number}", say=print)
        assert made["job"]["state"] == "COMPLETED", made["job"]["sentence"]
        assert [entry["number"] for entry in made["rounds"]] == [1, 2]
        assert all(entry["updates"] for entry in made["rounds"])
        assert {entry["version"] for entry in made["evaluations"] if entry["site"] == "house"} >= {0, 1, 2}
