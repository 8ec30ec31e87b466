"""The comparison without a federation is the same training."""

from __future__ import annotations

from pathlib import Path

import pytest

from client_agent.settings import DataSet
from client_agent.taskdir import UPDATE
from client_agent.training.baseline import train_alone
from client_agent.training.data import Rows, read_rows
from protos import jobspec
from protos.errors import InvalidInput
from tests.unit.client_agent.training.conftest import LABELS, Site


def rows_of(data_set: DataSet, split: str) -> Rows:
    return read_rows(data_set, name="notes", labels=LABELS, split=split)  # type: ignore[arg-type]


def alone(site: Site, spec: jobspec.JobSpec, *, steps: int, base_digest: str = "ab" * 32) -> dict[str, float]:
    done: list[tuple[int, int]] = []
    metrics = train_alone(
        spec, base_model_path=Path(site.base_model), base_digest=base_digest, train=rows_of(site.data_set, "train"),
        test=rows_of(site.data_set, "test"), steps=steps, seed=5, threads=1,
        on_progress=lambda step, total: done.append((step, total)),
    )  # fmt: skip
    # Each training begins with what is done already.
    assert list(dict.fromkeys(done)) == [(step, steps) for step in range(steps + 1)]
    return metrics


def test_one_round_alone_equals_one_round_of_a_federation_of_one(site: Site) -> None:
    recipe = site.recipe(rounds=1)
    init, _ = site.run("init", site.task("init", recipe=recipe))
    update, _ = site.run("train", site.task("train", recipe=recipe, model=init / UPDATE))
    _, federated = site.run("test", site.task("evaluate", recipe=recipe, model=update / UPDATE, split="test"))
    metrics = alone(site, jobspec.parse(recipe), steps=3)
    assert metrics == {name: federated.metrics[name] for name in metrics}


def test_the_learning_rate_falls_as_it_would_over_the_rounds(site: Site) -> None:
    fields = {"steps": 2, "batch_size": 8, "learning_rate": 1e-3}
    constant = jobspec.parse(site.recipe(local=fields))
    falling = jobspec.parse(site.recipe(local=fields | {"schedule": {"type": "linear"}}))
    assert alone(site, constant, steps=8) != alone(site, falling, steps=8)


def test_another_base_model_than_the_pinned_one_is_refused(site: Site) -> None:
    spec = jobspec.parse(site.recipe(base_model={"name": "tiny-encoder", "digest": "cd" * 32}))
    with pytest.raises(InvalidInput, match="pins"):
        alone(site, spec, steps=1)


def test_the_rounds_of_a_warm_head_train_the_head_alone(site: Site) -> None:
    """Two rounds, of which the first is the head's, are what a federation of one makes of them."""
    local = {"steps": 3, "batch_size": 8, "learning_rate": 1e-3, "warm_head": {"rounds": 1, "learning_rate": 0.05}}
    recipe = site.recipe(rounds=2, local=local)
    version, _ = site.run("init", site.task("init", recipe=recipe))
    for number in (1, 2):
        task = site.task("train", recipe=recipe, model=version / UPDATE, round=number, seed=2 + 3 * number)
        version, _ = site.run(f"train-{number}", task)
    _, federated = site.run("test", site.task("evaluate", recipe=recipe, model=version / UPDATE, split="test"))
    metrics = alone(site, jobspec.parse(recipe), steps=6)
    assert metrics == {name: federated.metrics[name] for name in metrics}


def test_a_proximal_term_holds_nobody_who_trains_alone(site: Site) -> None:
    local = {"steps": 3, "batch_size": 8, "learning_rate": 1e-3}
    held = jobspec.parse(site.recipe(local=local | {"proximal": 10.0}))
    assert alone(site, held, steps=3) == alone(site, jobspec.parse(site.recipe(local=local)), steps=3)
