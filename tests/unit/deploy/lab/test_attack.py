"""Sites that attack: what they send is what lab.toml says, and the others are left alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from client_agent.runner import Failure, Finished
from client_agent.taskdir import UPDATE, TaskSpec, write_spec
from deploy.lab import plan
from deploy.lab.attack import Attack, Attacker, alter
from protos import tensors
from protos.errors import InvalidInput

SHAPES = {"b.weight": (4, 5), "a.bias": (3,)}


def write(path: Path, values: dict[str, np.ndarray]) -> None:
    header, layout = tensors.make_header((name, "F32", value.shape) for name, value in values.items())
    path.write_bytes(header + b"".join(values[tensor.name].astype(np.float32).tobytes() for tensor in layout.tensors))


def vector(path: Path) -> np.ndarray:
    found = load_file(path)
    return np.concatenate([found[name].astype(np.float64).ravel() for name in sorted(SHAPES)])


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """The version that a round began with, and an update."""
    rng = np.random.default_rng(1)
    x = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    write(tmp_path / "version", {**x, "z.untouched": np.ones(2)})
    write(tmp_path / UPDATE, {name: value + 0.1 * rng.standard_normal(value.shape) for name, value in x.items()})
    return tmp_path / "version", tmp_path / UPDATE


@pytest.mark.parametrize(("kind", "factor"), [("sign-flip", 10.0), ("scale", 3.0), ("noise", 2.0)])
def test_what_is_sent_is_as_far_from_the_version_as_the_attack_says(
    files: tuple[Path, Path], kind: Any, factor: float
) -> None:
    version, update = files
    x, delta = vector(version), vector(update) - vector(version)
    header = update.read_bytes()[: -4 * len(delta)]
    alter(Attack(sites=1, kind=kind, factor=factor), before=version, update=update, seed=3)
    sent = vector(update) - x
    assert update.read_bytes()[: -4 * len(delta)] == header
    assert np.linalg.norm(sent) == pytest.approx(factor * np.linalg.norm(delta), rel=1e-5)
    cosine = sent @ delta / np.linalg.norm(sent) / np.linalg.norm(delta)
    if kind == "noise":
        assert abs(cosine) < 0.9
    else:
        assert cosine == pytest.approx(-1.0 if kind == "sign-flip" else 1.0)


class Trained:
    """Stands for a trainer that finishes at once with what lies there."""

    shutting_down = False

    async def run(self, _directory: Path, **_how: Any) -> Finished:
        return Finished()


def task(directory: Path, *, kind: str, model: Path | None) -> None:
    write_spec(
        directory,
        TaskSpec(
            task_id="t", job_id="j", round=1, kind=kind, spec={}, seed=1, split="", base_model_path=None,
            model_path=None if model is None else str(model), base_digest="", data_set=None, device="cpu", threads=1,
        ),
    )  # fmt: skip


def test_only_trainings_are_changed_and_they_need_the_version_as_a_file(files: tuple[Path, Path]) -> None:
    version, update = files
    attacker: Any = Attacker(Trained(), Attack(sites=1, kind="sign-flip"))  # type: ignore[arg-type]
    before = update.read_bytes()

    def run(kind: str, model: Path | None) -> Any:
        task(update.parent, kind=kind, model=model)
        return asyncio.run(attacker.run(update.parent, kind="training", on_progress=print))

    assert run("evaluate", version) == Finished() and update.read_bytes() == before
    wants = run("train", None)
    assert isinstance(wants, Failure) and wants.needs_version and update.read_bytes() == before
    assert run("train", version) == Finished() and update.read_bytes() != before
    assert attacker.shutting_down is False


def test_who_attacks_follows_from_the_seed() -> None:
    names = [f"site-{number:02}" for number in range(1, 9)]
    attack = Attack(sites=2, kind="scale")
    drawn = [attack.by(names, seed=seed) for seed in range(20)]
    assert all(len(found) == 2 and found < set(names) for found in drawn)
    assert drawn == [attack.by(names[::-1], seed=seed) for seed in range(20)] and len(set(map(frozenset, drawn))) > 5


def test_an_experiment_without_an_attack_is_written_as_before_and_encoded_updates_are_refused(tmp_path: Path) -> None:
    recipe = 'name = "small"\nrounds = 1\n[task]\ntype = "synthetic"\n[local]\nsteps = 1\n'
    (tmp_path / "recipe.toml").write_text(recipe)
    (tmp_path / "lab.toml").write_text("")
    assert "attack" not in plan.cells(tmp_path)[0].plan.as_json()["experiment"]
    (tmp_path / "lab.toml").write_text('attack = { sites = 2, kind = "noise" }')
    assert plan.cells(tmp_path)[0].plan.as_json()["experiment"]["attack"] == {
        "sites": 2, "kind": "noise", "factor": 10.0,
    }  # fmt: skip
    (tmp_path / "recipe.toml").write_text(recipe + '[encoding]\nup = "int8"\n')
    with pytest.raises(InvalidInput, match="travel raw"):
        plan.cells(tmp_path)
