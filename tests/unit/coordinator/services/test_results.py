"""What a site hands in counts only when it is what the task asked for: bases, files, steps and rows."""

from __future__ import annotations

import time
from typing import Any

import pytest

from protos.v1 import agent_pb2
from tests.unit.coordinator.services.conftest import Federation, Peer, manifest, tensor_file

MODEL = tensor_file(fill=0.5)
UPDATE = tensor_file(fill=0.25)
BASE, OTHER = "a" * 64, "b" * 64
CLASSIFICATION = {
    "task": {"type": "classification", "labels": ["drug", "lab"]},
    "data": {"name": "notes"},
    "base_model": {"name": "minilm"},
}
PACKED = {"task": {"type": "causal-lm", "packing": True}, "evaluation": {"where": [], "metric": "loss"}}


async def version_0(site: Peer, **report: Any) -> agent_pb2.FinishTaskResponse:
    task = await site.lease()
    assert task.kind == agent_pb2.TASK_KIND_INIT
    return await site.finish(task, manifest=manifest(await site.upload(task, MODEL)), **report)


@pytest.mark.parametrize("name", ["modeling.py", "model.safetensors", "silotune.json", "../config.json"])
async def test_a_file_that_no_model_directory_may_have_rejects_version_0(federation: Federation, name: str):
    site = federation.site("st-olav")
    await federation.submit()
    task = await site.lease()
    blob = await site.upload(task, MODEL)
    done = await site.finish(task, manifest=manifest(blob), files=[{"name": name, "blob": blob}])
    assert done.fate == agent_pb2.FATE_REJECTED
    assert "is not a file name" in done.reason


@pytest.mark.parametrize(
    ("pinned", "used", "reason"),
    [(BASE, OTHER, "the recipe pins aaaaaaaaaaaa"), (BASE, "", "which base model"), (None, "", "which base model")],
)
async def test_version_0_from_another_base_model_than_the_recipes_is_rejected(
    federation: Federation, pinned: str | None, used: str, reason: str
):
    await federation.submit(**{**CLASSIFICATION, "base_model": {"name": "minilm", "digest": pinned}})
    done = await version_0(federation.site("st-olav"), base_digest=used)
    assert done.fate == agent_pb2.FATE_REJECTED
    assert reason in done.reason


@pytest.mark.parametrize("pinned", [BASE, None])
async def test_version_0_from_the_recipes_base_model_is_accepted(federation: Federation, pinned: str | None):
    await federation.submit(**{**CLASSIFICATION, "base_model": {"name": "minilm", "digest": pinned}})
    done = await version_0(federation.site("st-olav"), base_digest=BASE)
    assert done.fate == agent_pb2.FATE_ACCEPTED, done.reason


async def test_an_update_of_no_step_is_rejected(federation: Federation):
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=MODEL)
    done = await site.finish(task, manifest=manifest(await site.upload(task, UPDATE)), examples=1, steps=0)
    assert (done.fate, "no step" in done.reason) == (agent_pb2.FATE_REJECTED, True)


@pytest.mark.parametrize(
    ("told", "examples", "fate"),
    [
        ([{"name": "notes", "rows": "10"}], 11, agent_pb2.FATE_REJECTED),
        ([{"name": "notes", "rows": "10"}], 10, agent_pb2.FATE_ACCEPTED),
        ([{"name": "other", "rows": "10"}], 11, agent_pb2.FATE_ACCEPTED),
        ([{"name": "notes"}], 11, agent_pb2.FATE_ACCEPTED),
        ([], 11, agent_pb2.FATE_ACCEPTED),
    ],
)
async def test_an_update_of_more_rows_than_the_site_told_of_is_rejected(
    federation: Federation, told: list[dict[str, Any]], examples: int, fate: agent_pb2.Fate
):
    site = federation.site("st-olav")
    await federation.submit(**CLASSIFICATION)
    await version_0(site, base_digest=BASE)
    task = await site.lease()
    federation.store.sites.see("st-olav", agent={"data_sets": told}, now_unix_seconds=time.time())
    done = await site.finish(task, manifest=manifest(await site.upload(task, UPDATE)), examples=examples)
    assert done.fate == fate, done.reason
    if fate == agent_pb2.FATE_REJECTED:
        assert "claims 11 examples; the site's data set 'notes' has 10 rows" in done.reason


@pytest.mark.parametrize(
    ("changes", "steps", "fate"),
    [
        ({}, 6, agent_pb2.FATE_ACCEPTED),
        ({}, 7, agent_pb2.FATE_REJECTED),
        ({}, 5, agent_pb2.FATE_REJECTED),
        ({"aggregation": {"weights": "steps"}}, 7, agent_pb2.FATE_REJECTED),
        ({"aggregation": {"rule": "scaffold"}}, 1, agent_pb2.FATE_REJECTED),
        # What nothing is made of is not compared.
        ({"aggregation": {}}, 7, agent_pb2.FATE_ACCEPTED),
        # Sequences that are packed are fewer than rows.
        (PACKED, 2, agent_pb2.FATE_ACCEPTED),
        (PACKED, 7, agent_pb2.FATE_REJECTED),
        ({**PACKED, "local": {"steps": 5}}, 4, agent_pb2.FATE_REJECTED),
    ],
)
async def test_where_steps_are_weights_an_update_of_other_steps_than_the_recipes_is_rejected(
    federation: Federation, changes: dict[str, Any], steps: int, fate: agent_pb2.Fate
):
    site = federation.site("st-olav")
    local = {"epochs": 2, "batch_size": 8, "optimizer": "sgd"}
    await federation.submit(**{**CLASSIFICATION, "local": local, "aggregation": {"rule": "fednova"}, **changes})
    await version_0(site, base_digest=BASE)
    task = await site.lease()
    blob = await site.upload(task, UPDATE)
    done = await site.finish(task, manifest=manifest(blob), examples=20, steps=steps)
    assert done.fate == fate, done.reason
    if fate == agent_pb2.FATE_REJECTED:
        assert f"claims {steps} steps; 20 examples make" in done.reason
