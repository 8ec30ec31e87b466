"""What the house agent is given to distil, and what it may hand in, through a real coordinator."""

from __future__ import annotations

import asyncio

import pytest

from protos.digests import digest_of
from protos.errors import NotFound
from protos.identity import Role
from protos.v1 import agent_pb2, operator_pb2
from protos.v1.manifest_pb2 import FORM_DELTA
from tests.unit.coordinator.services.conftest import Federation, Peer, manifest, tensor_file


async def until_aggregated(federation: Federation, **distillation: object) -> tuple[Peer, agent_pb2.Task]:
    """The house agent and its DISTILL task of round 1, in which two sites were counted."""
    house, one, two = federation.site("hq", role=Role.HOUSE), federation.site("one"), federation.site("two")
    cohort = {"gather_seconds": 600, "retries": 0, "quorum": 2, "sites": ["one", "two"]}
    await federation.submit(cohort=cohort, distillation=distillation)
    task = await house.lease()
    assert task.kind == agent_pb2.TASK_KIND_INIT
    blob = await house.upload(task, tensor_file(fill=0.0))
    await house.finish(task, manifest=manifest(blob))
    # Both ask at once: the round begins when both are there.
    tasks = await asyncio.gather(one.lease(), two.lease())
    for site, task, fill in ((one, tasks[0], 1.0), (two, tasks[1], 3.0)):
        assert not task.members
        blob = await site.upload(task, tensor_file(fill=fill))
        done = await site.finish(task, manifest=manifest(blob), examples=10)
        assert done.fate == agent_pb2.FATE_ACCEPTED, done.reason
    task = await house.lease()
    assert task.kind == agent_pb2.TASK_KIND_DISTILL
    return house, task


async def shown(federation: Federation) -> operator_pb2.GetJobResponse:
    return await federation.operator().operator("GetJob", operator_pb2.GetJobRequest(job="trial"))


async def until_committed(federation: Federation) -> operator_pb2.RoundView:
    while (state := await shown(federation)).job.head_version < 1:
        pass
    return next(found for found in state.rounds if found.number == 1)


async def test_what_the_house_agent_makes_of_the_aggregate_is_the_version(federation: Federation) -> None:
    house, task = await until_aggregated(federation, labels=False)
    assert await house.read(task.model.digest) == tensor_file(fill=2.0)
    members = {await house.read(member.blob.digest): member.weight for member in task.members}
    assert members == {tensor_file(fill=1.0): 0.5, tensor_file(fill=3.0): 0.5}
    blob = await house.upload(task, tensor_file(fill=2.5))
    done = await house.finish(task, manifest=manifest(blob), metrics={"distillation_kept": 1.0})
    assert done.fate == agent_pb2.FATE_ACCEPTED, done.reason
    record = await until_committed(federation)
    assert record.metrics["distillation_kept"] == 1.0 and not record.undistilled
    found = await federation.operator().operator("GetModel", operator_pb2.GetModelRequest(job="trial", version=1))
    assert found.model.digest == digest_of(tensor_file(fill=2.5))


async def test_an_agent_that_finds_no_better_student_hands_in_the_aggregate_itself(federation: Federation) -> None:
    house, task = await until_aggregated(federation)
    assert not task.members
    blob = await house.upload(task, tensor_file(fill=2.0))
    assert blob.digest == task.model.digest
    await house.finish(task, manifest=manifest(blob), metrics={"distillation_kept": 0.0})
    record = await until_committed(federation)
    assert record.metrics["distillation_kept"] == 0.0 and not record.undistilled
    assert await federation.operator().read(blob.digest) == tensor_file(fill=2.0)


@pytest.mark.parametrize("wrong", ["another shape", "not finite", "a difference"])
async def test_a_result_that_is_no_version_is_rejected_and_the_aggregate_is_committed(
    federation: Federation, wrong: str
) -> None:
    house, task = await until_aggregated(federation)
    contents = {
        "another shape": tensor_file(fill=2.0, elements=999),
        "not finite": tensor_file(fill=float("nan")),
        "a difference": tensor_file(fill=2.0),
    }
    told = manifest(await house.upload(task, contents[wrong]))
    if wrong == "a difference":
        told.form = FORM_DELTA
    done = await house.finish(task, manifest=told)
    assert done.fate == agent_pb2.FATE_REJECTED
    record = await until_committed(federation)
    assert record.undistilled == f"hq failed: {done.reason}"
    found = await federation.operator().operator("GetModel", operator_pb2.GetModelRequest(job="trial", version=1))
    assert found.model.digest == task.model.digest


async def test_the_version_that_the_round_began_with_is_none_of_its_business(federation: Federation) -> None:
    house, task = await until_aggregated(federation)
    assert task.version == 0
    with pytest.raises(NotFound):
        await house.read(digest_of(tensor_file(fill=0.0)))
