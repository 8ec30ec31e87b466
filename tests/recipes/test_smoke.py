"""Each recipe folder in tiny form: its own recipes, sites and methods, on a few of its rows and models of a few units.

All that a folder's lab files can ask for is planned. Of each folder one federation runs, one job after another, those
cells that are its point: an attack, a distillation, a mentor, each remedy. It shows that they run from the first round
to the last, and nothing about their figures. `make recipes-smoke`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from client_agent.training import small_llama, small_trio
from coordinator import recipe
from coordinator.client import OperatorClient, load_profile
from coordinator.watch import ENDED
from deploy.data.make_samples import write
from deploy.lab import make_llama, make_trio
from deploy.lab.experiment import Experiment, LabData, LabModel, SmallEncoder, SmallLlama
from deploy.lab.place import HOUSE, place, site_rows
from deploy.lab.plan import Typed, cells
from deploy.lab.run import AGENTS, Plan, metrics_of
from deploy.local import LocalFederation, free_ports
from protos import jobspec
from protos.jobspec import JobSpec
from protos.update_figures import NORM, by_site
from protos.v1 import operator_pb2

RECIPES = Path(__file__).parents[2] / "deploy" / "recipes"
LAB_FILES = sorted(RECIPES.glob("*/lab*.toml"))
SITE_ROWS, HELD_OUT_ROWS, ROUNDS = 16, 24, 2


@dataclass(frozen=True)
class Smoke:
    """What runs of a lab file. `sites` is what its rules need at least; `of_round` and `of_update` name metrics that
    only its special part writes."""

    file: str = "lab.toml"
    models: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    sites: int = 2
    of_round: str = ""
    of_update: str = ""

    def plans(self, folder: Path) -> dict[str, Plan]:
        """By the name of a cell; of several partitions the first."""
        axes = {"models": self.models, "variants": self.variants, "seeds": (1,), "sites": (4,)}
        found = cells(folder, Typed(lab_file=self.file, threads=1, axes=axes))
        first = {(cell.axes.get("model"), cell.axes.get("variant")): cell for cell in reversed(found)}
        return {cell.name: cell.plan for cell in first.values()}


REMEDIES = ("sgd", "adamw", "server-rate", "nesterov", "fedadam", "warm-head")
SMOKES = {
    "hilmkil-2021": (
        Smoke(models=("bert", "albert")),
        Smoke(file="lab-remedies.toml", variants=REMEDIES),
        Smoke(file="lab-minilm.toml"),
    ),
    "fedkd": (Smoke(variants=("mentor-svd",), of_update="mentor_loss"),),
    "fedlora-kd": (
        Smoke(variants=("kd",), of_update="mentor_loss"),
        Smoke(variants=("fed-lora-kd", "fed-lora-df"), of_round="distillation_kept"),
    ),
    # Krum that bears two attackers needs seven.
    "robust-sites": (Smoke(variants=("multi-krum-flipped",), sites=8, of_round=f"{NORM}.site-01"),),
    "lora-aggregation": (Smoke(variants=("mixed-svd", "rolora", "fed-sb")),),
    "flowertune-medical": (Smoke(variants=("rolora-int8",)),),
}


def test_each_folder_has_its_smoke() -> None:
    assert {file.parent.name for file in LAB_FILES} == SMOKES.keys()


@pytest.mark.parametrize("file", LAB_FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_whatever_a_lab_file_can_ask_for_is_planned_and_the_data_that_are_here_are_shared_out(file: Path) -> None:
    fields = tomllib.loads(file.read_text())
    for written in file.parent.glob("recipe*.toml"):
        recipe.read(written)
    # Those that the grid leaves out, too.
    everything = {"variants": list(fields.get("variants", {})), "models": list(fields.get("models", {}))}
    everything |= {"data": list(fields.get("tables", {})), "seeds": [1]}
    planned = [cell.plan for cell in cells(file.parent, Typed(lab_file=file.name, axes=everything))]
    assert len(planned) >= max(len(names) for names in everything.values())
    shared = {}
    for plan in planned:
        experiment = plan.experiment
        assert experiment.data is not None
        # What is not shipped is made by hand (deploy/recipes/prepare.py).
        if Path(experiment.data.rows).exists():
            assert Path(experiment.data.validation).exists()
            key = experiment.model_dump_json(include={"data", "partition", "sites"})
            shared[key] = experiment
    assert shared or file.name == "lab-full.toml"
    for experiment in shared.values():
        assert all(site_rows(experiment, seed=1).values())


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LabModel]:
    """A tiny one of each kind; "bert" has as many layers as MiniLM, so that a recipe may cut and pair them."""
    directory = tmp_path_factory.mktemp("models")
    sizes = small_trio.Sizes(vocabulary=400, hidden=16, layers=6, heads=2)
    words, untrained = make_trio.texts()[:100], small_trio.Pretraining()
    for kind in make_trio.TRIO:
        small_trio.make(directory / kind, kind=kind, texts=words, sizes=sizes, pretraining=untrained, seed=0)
    small_llama.make(
        directory / "llama", texts=make_llama.texts(rows=60), seed=0, pretraining=small_llama.Pretraining(),
        sizes=small_llama.Sizes(vocabulary=400, hidden=32, layers=1),
    )  # fmt: skip
    return {path.name: LabModel(path=str(path)) for path in directory.iterdir()}


def small(model: LabModel, *, models: dict[str, LabModel]) -> LabModel:
    if isinstance(model.make, SmallLlama):
        return models["llama"]
    return models[model.make.kind if isinstance(model.make, SmallEncoder) else "bert"]


def few(path: str | None, *, rows: int, into: Path) -> str | None:
    """A table with its first rows alone."""
    if path is None:
        return None
    into.mkdir(exist_ok=True)
    found = pyarrow.parquet.read_table(path).slice(0, rows).to_pylist()
    copy = into / f"{len(list(into.iterdir()))}-{Path(path).name}"
    write(copy, found, columns=tuple(found[0]))
    return str(copy)


def experiment_in_small(plans: Sequence[Plan], *, sites: int, models: dict[str, LabModel], tables: Path) -> Experiment:
    """That of the first, with the models of all of them under the names that `spec_in_small` gives them."""
    found = plans[0].experiment
    assert found.data is not None
    data = LabData(
        **{
            **found.data.model_dump(),
            "rows": few(found.data.rows, rows=2 * sites * SITE_ROWS, into=tables),
            "validation": few(found.data.validation, rows=HELD_OUT_ROWS, into=tables),
            "test": few(found.data.test, rows=HELD_OUT_ROWS, into=tables),
            "benchmarks": {},
        }
    )
    teachers = {name: small(model, models=models) for plan in plans for name, model in plan.experiment.teachers.items()}
    for plan in plans:
        assert plan.experiment.model is not None
        teachers[name_of(plan)] = small(plan.experiment.model, models=models)
    update = {"data": data, "sites": sites, "model": None, "teachers": teachers}
    return Experiment(**{**{name: getattr(found, name) for name in Experiment.model_fields}, **update})


def name_of(plan: Plan) -> str:
    model = plan.experiment.model
    assert model is not None
    return f"tiny-{model.make.kind if isinstance(model.make, SmallEncoder) else 'model'}"


def spec_in_small(plan: Plan, *, sites: int) -> JobSpec:
    fields = plan.spec.model_dump(mode="json")
    fields["base_model"]["name"] = name_of(plan)
    fields["local"] |= {"steps": 2, "epochs": None, "batch_size": 4, "micro_batch_size": None}
    if fields["task"]["type"] == "causal-lm":
        # A tokenizer of so few words needs more of them for a sentence.
        fields["task"]["max_length"] = 256
    fields["cohort"] |= {"size": "all", "quorum": sites}
    fields["evaluation"] |= {"every": 1, "early_stop": 0}
    return jobspec.parse(fields | {"rounds": ROUNDS})


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("folder", SMOKES)
def test_what_is_special_about_a_recipe_runs(folder: str, models: dict[str, LabModel], tmp_path: Path) -> None:
    found = [(smoke, name, plan) for smoke in SMOKES[folder] for name, plan in smoke.plans(RECIPES / folder).items()]
    sites = max(smoke.sites for smoke in SMOKES[folder])
    plans = [plan for _, _, plan in found]
    experiment = experiment_in_small(plans, sites=sites, models=models, tables=tmp_path / "tables")
    directories = {name: Path(str(model.path)) for name, model in experiment.teachers.items()}
    with LocalFederation(tmp_path) as federation:
        federation.init()
        federation.start_coordinator()
        with OperatorClient(load_profile(str(federation.profile))) as client:
            rows = place(
                tmp_path / AGENTS, experiment=experiment, spec=spec_in_small(plans[0], sites=sites), seed=1, threads=1,
                models=directories, client=client, coordinator=federation.address,
            )  # fmt: skip
            address = f"127.0.0.1:{free_ports(1)[0]}"
            federation.start("sites", ["python", "-m", "deploy.lab.sites", str(tmp_path / AGENTS), address], address)
            for smoke, name, plan in found:
                spec = spec_in_small(plan, sites=sites)
                request = operator_pb2.SubmitJobRequest(spec_json=spec.canonical_json, submit_token=name)
                job = client.ask("SubmitJob", request, timeout_seconds=60).job_id

                def ended(job: str = job) -> Any:
                    state = client.ask("GetJob", operator_pb2.GetJobRequest(job=job, last_rounds=ROUNDS + 1))
                    return state if state.job.state in ENDED else None

                state = federation.wait_for(ended, seconds=1500, saying=f"the end of {name}")
                check(metrics_of(state, rows=rows), smoke=smoke, experiment=experiment)


def check(found: dict[str, Any], *, smoke: Smoke, experiment: Experiment) -> None:
    assert found["job"]["state"] == "COMPLETED", found["job"]["sentence"]
    assert [entry["number"] for entry in found["rounds"]] == [1, 2]
    for entry in found["rounds"]:
        assert len(entry["updates"]) == experiment.sites
        assert not smoke.of_round or smoke.of_round in entry["metrics"]
        assert all(not smoke.of_update or smoke.of_update in update["metrics"] for update in entry["updates"])
        if experiment.attack:
            # What an attacker sends is ten times as long.
            norms = by_site(entry["metrics"], NORM)
            longest = sorted(norms, key=norms.__getitem__)[-experiment.attack.sites :]
            assert set(longest) == experiment.attack.by(list(found["rows"]), seed=1)
    assert {entry["version"] for entry in found["evaluations"] if entry["site"] == HOUSE} >= {0, 1, 2}
