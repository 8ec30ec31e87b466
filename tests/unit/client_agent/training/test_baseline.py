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
    assert done == [(step, steps) for step in range(steps + 1)]
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
