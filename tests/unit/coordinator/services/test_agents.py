from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import pytest

from protos import errors, jobspec
from protos.v1 import agent_pb2, operator_pb2
from protos.v1.manifest_pb2 import BlobRef
from tests.unit.coordinator.services.conftest import manifest, recipe, tensor_file

MODEL = tensor_file(fill=0.5)
UPDATE = tensor_file(fill=0.25)


async def test_a_waiting_agent_gets_its_task_as_soon_as_a_job_is_submitted(federation: Any):
    site = federation.site("st-olav")
    poll = asyncio.create_task(site.agent("LeaseTask", agent_pb2.LeaseTaskRequest(wait_seconds=30)))
    await asyncio.sleep(0.3)
    await federation.submit(seed=5)
    task = (await poll).task
    assert (task.kind, task.round, task.generation) == (agent_pb2.TASK_KIND_INIT, 0, 1)
    spec = jobspec.from_json(task.spec_json)
    assert task.spec_hash == spec.hash
    assert task.seed == jobspec.task_seed(5, round_number=0, site="st-olav")
    assert not task.HasField("model")


async def test_without_work_the_answer_comes_after_the_asked_time_with_a_sentence(federation: Any):
    response = await federation.site("st-olav").agent("LeaseTask", agent_pb2.LeaseTaskRequest(wait_seconds=0.1))
    assert not response.HasField("task")
    assert response.sentence


async def test_a_round_goes_from_lease_to_committed_model(federation: Any):
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=MODEL)
    assert (task.round, task.version, task.model.size) == (1, 0, len(MODEL))
    update = await site.upload(task, UPDATE)
    report = {"manifest": manifest(update), "examples": 7, "steps": 1, "metrics": {"loss": 0.5}}
    done = await site.finish(task, **report)
    assert done.fate == agent_pb2.FATE_ACCEPTED
    again = await site.finish(task, **report)
    assert again.fate == agent_pb2.FATE_ACCEPTED
    operator, job = federation.operator(), operator_pb2.GetJobRequest(job=task.job_id)
    while (view := await operator.operator("GetJob", job)).job.state != operator_pb2.JOB_STATE_COMPLETED:
        await asyncio.sleep(0.1)
    assert view.job.head_version == 1
    model = await operator.operator("GetModel", operator_pb2.GetModelRequest(job=task.job_id, version=1))
    assert await operator.read(model.model.digest) == UPDATE
    assert [(one.site, one.examples) for one in model.contributors] == [("st-olav", 7)]


async def test_another_result_for_the_same_round_is_refused(federation: Any):
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=MODEL)
    first, second = await site.upload(task, UPDATE), await site.upload(task, tensor_file(fill=3))
    await site.finish(task, manifest=manifest(first), examples=1)
    with pytest.raises(errors.AlreadyExists):
        await site.finish(task, manifest=manifest(second), examples=1)


@pytest.mark.parametrize(
    ("content", "changes", "reason"),
    [
        (tensor_file(fill=math.nan), {}, "not finite"),
        (tensor_file(fill=math.inf), {}, "not finite"),
        (tensor_file(fill=1, name="other"), {}, "missing"),
        (tensor_file(fill=1, elements=999), {}, "shape"),
        (b"no tensors at all", {}, "header"),
        (UPDATE, {"examples": 0}, "no rows"),
        (UPDATE, {"examples": 10**12}, "claims"),
        (UPDATE, {"metrics": {"loss": math.nan}}, "not a finite"),
        (UPDATE, {"metrics": {"patient": 1.0}}, "not a number that a site may report"),
        (UPDATE, {"seconds": {"lunch": 1.0}}, "not a number that a site may report"),
    ],
)
async def test_an_invalid_update_is_rejected_with_its_reason(
    federation: Any, content: bytes, changes: dict[str, Any], reason: str
):
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=MODEL)
    update = await site.upload(task, content)
    done = await site.finish(task, **{"manifest": manifest(update), "examples": 1, **changes})
    assert done.fate == agent_pb2.FATE_REJECTED
    assert reason in done.reason
    view = await federation.operator().operator("GetJob", operator_pb2.GetJobRequest(job=task.job_id, last_rounds=2))
    updates = [update for one in view.rounds for update in one.updates]
    assert [(one.fate, reason in one.reason) for one in updates] == [(agent_pb2.FATE_REJECTED, True)]


async def test_an_update_from_another_version_or_in_an_unknown_encoding_is_rejected(federation: Any):
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=MODEL)
    update = await site.upload(task, UPDATE)
    done = await site.finish(task, manifest=manifest(update, base_version=3), examples=1)
    assert (done.fate, "version 3" in done.reason) == (agent_pb2.FATE_REJECTED, True)


async def test_a_report_before_its_upload_is_no_reason_to_reject(federation: Any):
    site, other = federation.site("st-olav"), federation.site("other")
    task = await federation.job_with_version_0(site, content=MODEL, others=(other,))
    theirs = await other.lease()
    update = await site.upload(task, UPDATE)
    with pytest.raises(errors.Conflict, match="not been uploaded"):
        await other.finish(theirs, manifest=manifest(update), examples=1)
    await other.upload(theirs, UPDATE)
    assert (await other.finish(theirs, manifest=manifest(update), examples=1)).fate == agent_pb2.FATE_ACCEPTED


async def test_a_heartbeat_renews_the_lease_and_shows_progress(federation: Any):
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=MODEL)
    progress = agent_pb2.Progress(
        stage=agent_pb2.STAGE_TRAINING, done=3, total=9, unit="steps", metrics={"loss": 1.5, "learning_rate": 0.1}
    )
    beat = agent_pb2.HeartbeatRequest(task_id=task.id, generation=task.generation, progress=progress)
    assert (await site.agent("Heartbeat", beat)).proceed
    view = await federation.operator().operator("GetJob", operator_pb2.GetJobRequest(job=task.job_id))
    (shown,) = [one for one in view.tasks if one.id == task.id]
    assert shown.progress == progress
    assert shown.state == operator_pb2.TASK_STATE_RUNNING
    beat.progress.unit = "patients"
    with pytest.raises(errors.InvalidInput, match="unit"):
        await site.agent("Heartbeat", beat)


async def test_an_old_grant_is_fenced_and_a_foreign_task_is_not_found(federation: Any):
    site, other = federation.site("st-olav"), federation.site("other")
    old = await federation.job_with_version_0(site, content=MODEL)
    new = await site.lease()
    assert (new.id, new.generation) == (old.id, old.generation + 1)
    for task, error, peer in ((old, errors.LeaseFenced, site), (new, errors.NotFound, other)):
        beat = agent_pb2.HeartbeatRequest(task_id=task.id, generation=task.generation)
        with pytest.raises(error):
            await peer.agent("Heartbeat", beat)
        with pytest.raises(error):
            await peer.finish(task, manifest=manifest(BlobRef(digest="0" * 64, size=1)), examples=1)


async def test_a_held_task_is_not_granted_again(federation: Any):
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=MODEL)
    request = agent_pb2.LeaseTaskRequest(holding=[task.id])
    assert not (await site.agent("LeaseTask", request)).HasField("task")


async def test_a_cancelled_job_tells_its_agents_to_stop(federation: Any):
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=MODEL)
    cancel = operator_pb2.ControlJobRequest(job=task.job_id, action=operator_pb2.JOB_ACTION_CANCEL)
    assert (await federation.operator().operator("ControlJob", cancel)).job.state == operator_pb2.JOB_STATE_CANCELLED
    beat = agent_pb2.HeartbeatRequest(task_id=task.id, generation=task.generation)
    response = await site.agent("Heartbeat", beat)
    assert (response.proceed, "cancelled" in response.reason) == (False, True)


@pytest.mark.parametrize("outcome", ["failed", "declined"])
async def test_a_reason_for_failing_reaches_the_operator_without_control_characters(federation: Any, outcome: str):
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=MODEL)
    told = {"failed": agent_pb2.Failed, "declined": agent_pb2.Declined}[outcome](reason="out of\x1b[31m\nmemory" * 100)
    request = agent_pb2.FinishTaskRequest(task_id=task.id, generation=task.generation, **{outcome: told})
    await site.agent("FinishTask", request)
    tasks = federation.store.views.tasks(task.job_id, round_number=1)
    assert all(one.reason.isprintable() and len(one.reason) <= 500 for one in tasks)


async def test_a_report_without_an_outcome_is_refused(federation: Any):
    with pytest.raises(errors.InvalidInput, match="neither"):
        await federation.site("st-olav").agent("FinishTask", agent_pb2.FinishTaskRequest(task_id="x"))


async def test_what_an_agent_says_of_itself_is_shown_and_bounded(federation: Any):
    site = federation.site("st-olav")
    agent = agent_pb2.AgentInfo(
        version="9", device="cpu", data_sets=[agent_pb2.DataSetInfo(name="notes", rows=1 << 40)]
    )
    await site.agent("LeaseTask", agent_pb2.LeaseTaskRequest(agent=agent))
    (shown,) = (await federation.operator().operator("ListSites", operator_pb2.ListSitesRequest())).sites
    assert shown.agent == agent
    assert shown.connected
    assert abs(shown.last_seen_unix_seconds - time.time()) < 30
    with pytest.raises(errors.InvalidInput, match="too much"):
        await site.agent("LeaseTask", agent_pb2.LeaseTaskRequest(agent=agent_pb2.AgentInfo(device="x" * 100_000)))


async def test_long_polls_are_answered_when_the_coordinator_shuts_down(federation: Any):
    site = federation.site("st-olav")
    poll = asyncio.create_task(site.agent("LeaseTask", agent_pb2.LeaseTaskRequest(wait_seconds=30)))
    await asyncio.sleep(0.3)
    federation.stop.set()
    assert "restarting" in (await poll).sentence


async def test_a_repeated_submission_is_the_same_job(federation: Any):
    request = operator_pb2.SubmitJobRequest(spec_json=recipe(), submit_token="once")
    operator = federation.operator()
    first, second = [await operator.operator("SubmitJob", request) for _ in range(2)]
    assert first.job_id == second.job_id


async def test_an_agent_of_a_distant_version_is_refused_in_a_sentence(federation: Any):
    site = federation.site("st-olav")
    request = agent_pb2.LeaseTaskRequest(agent=agent_pb2.AgentInfo(version="7.0.0"))
    with pytest.raises(errors.Conflict, match=r"version 7\.0\.0 .* too far apart"):
        await site.agent("LeaseTask", request)
