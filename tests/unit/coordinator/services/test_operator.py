from __future__ import annotations

import json
from typing import Any

import pytest

from protos import errors
from protos.identity import JoinToken, Role
from protos.v1 import agent_pb2, operator_pb2
from tests.unit.coordinator.services.conftest import manifest, recipe, tensor_file

MODEL = tensor_file(fill=0.5)


async def test_a_dry_run_forecasts_and_submits_nothing(federation: Any):
    operator = federation.operator()
    request = operator_pb2.SubmitJobRequest(spec_json=recipe(cohort={"sites": ["st-olav"]}), dry_run=True)
    response = await operator.operator("SubmitJob", request)
    assert (response.job_id, bool(response.estimates)) == ("", True)
    assert "st-olav is not enrolled." in response.warnings
    assert not (await operator.operator("ListJobs", operator_pb2.ListJobsRequest())).jobs


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "x", "surplus": 1}', recipe(rounds=0)])
async def test_a_bad_recipe_is_refused_with_the_reason(federation: Any, text: str):
    with pytest.raises(errors.RecipeInvalid):
        await federation.operator().operator("SubmitJob", operator_pb2.SubmitJobRequest(spec_json=text))


async def test_a_job_is_found_by_its_id_and_by_its_name(federation: Any):
    operator, job_id = federation.operator(), await federation.submit(name="Trial_2026/a")
    assert job_id.startswith("trial-2026-a-")
    for key in (job_id, "Trial_2026/a"):
        view = await operator.operator("GetJob", operator_pb2.GetJobRequest(job=key))
        assert view.job.id == job_id
        assert json.loads(view.spec_json)["name"] == "Trial_2026/a"
    for method, request in (
        ("GetJob", operator_pb2.GetJobRequest(job="none")),
        ("ListEvents", operator_pb2.ListEventsRequest(job="none")),
        ("ControlJob", operator_pb2.ControlJobRequest(job="none", action=operator_pb2.JOB_ACTION_PAUSE)),
        ("GetModel", operator_pb2.GetModelRequest(job="none")),
    ):
        with pytest.raises(errors.NotFound):
            await operator.operator(method, request)


async def test_a_job_is_paused_resumed_and_cancelled_but_not_out_of_order(federation: Any):
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=MODEL)
    operator = federation.operator()

    async def control(action: int) -> int:
        request = operator_pb2.ControlJobRequest(job=task.job_id, action=action)
        return (await operator.operator("ControlJob", request)).job.state

    assert await control(operator_pb2.JOB_ACTION_PAUSE) == operator_pb2.JOB_STATE_PAUSED
    assert await control(operator_pb2.JOB_ACTION_RESUME) == operator_pb2.JOB_STATE_RUNNING
    assert await control(operator_pb2.JOB_ACTION_CANCEL) == operator_pb2.JOB_STATE_CANCELLED
    with pytest.raises(errors.Conflict):
        await control(operator_pb2.JOB_ACTION_PAUSE)
    for action in (operator_pb2.JOB_ACTION_UNSPECIFIED, 99):
        with pytest.raises(errors.InvalidInput):
            await control(action)


async def test_events_are_read_on_from_the_last_one_seen(federation: Any):
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=MODEL)
    operator = federation.operator()
    events = (await operator.operator("ListEvents", operator_pb2.ListEventsRequest(job=task.job_id))).events
    assert len(events) > 3
    later = operator_pb2.ListEventsRequest(job=task.job_id, after_id=events[1].id)
    assert list((await operator.operator("ListEvents", later)).events)[: len(events) - 2] == list(events[2:])


async def test_the_best_model_comes_with_its_files_and_evaluations(federation: Any):
    site = federation.site("st-olav")
    await federation.submit(evaluation={"where": ["sites"], "metric": "loss"}, rounds=2)
    task = await site.lease()
    model, config = await site.upload(task, MODEL), await site.upload(task, b"{}")
    files = [{"name": "config.json", "blob": config}]
    await site.finish(task, manifest=manifest(model), files=files)
    seen = [await site.lease()]
    seen.append(await site.lease(holding=(seen[0].id,)))
    (evaluate,) = [one for one in seen if one.kind == agent_pb2.TASK_KIND_EVALUATE]
    assert (evaluate.version, evaluate.split) == (0, "validation")
    done = await site.finish(evaluate, examples=5, metrics={"loss": 0.25})
    assert done.fate == agent_pb2.FATE_ACCEPTED
    operator = federation.operator()
    answer = await operator.operator("GetModel", operator_pb2.GetModelRequest(job=task.job_id))
    assert (answer.version, answer.model, answer.files[0].name) == (0, model, "config.json")
    assert [(e.site, e.examples, dict(e.metrics)) for e in answer.evaluations] == [("st-olav", 5, {"loss": 0.25})]
    assert await operator.read(config.digest) == b"{}"
    with pytest.raises(errors.NotFound, match="no version 7"):
        await operator.operator("GetModel", operator_pb2.GetModelRequest(job=task.job_id, version=7))


async def test_a_model_comes_with_the_evaluations_of_the_newest_version_too(federation: Any):
    site = federation.site("st-olav")
    await federation.submit(evaluation={"where": ["sites"], "metric": "loss"}, rounds=1)
    task = await site.lease()
    await site.finish(task, manifest=manifest(await site.upload(task, MODEL)))
    losses = {0: 0.25, 1: 0.75}
    while losses:
        task = await site.lease()
        if task.kind == agent_pb2.TASK_KIND_EVALUATE:
            await site.finish(task, examples=5, metrics={"loss": losses.pop(task.version)})
        else:
            await site.finish(task, manifest=manifest(await site.upload(task, MODEL)), examples=7, steps=1)
    request = operator_pb2.GetModelRequest(job=task.job_id, version=0)
    answer = await federation.operator().operator("GetModel", request)
    assert [(one.version, one.metrics["loss"]) for one in answer.evaluations] == [(0, 0.25), (1, 0.75)]


@pytest.mark.parametrize("name", ["config/x.json", "..", "", "a" * 300])
async def test_a_file_of_version_0_has_a_plain_name(federation: Any, name: str):
    site = federation.site("st-olav")
    await federation.submit()
    task = await site.lease()
    blob = await site.upload(task, MODEL)
    done = await site.finish(task, manifest=manifest(blob), files=[{"name": name, "blob": blob}])
    assert (done.fate, "file name" in done.reason) == (agent_pb2.FATE_REJECTED, True)


async def test_a_site_is_invited_listed_and_revoked(federation: Any):
    operator = federation.operator()
    invite = operator_pb2.InviteSiteRequest(name="house", house=True, valid_seconds=60)
    answer = await operator.operator("InviteSite", invite)
    token = JoinToken.decode(answer.token)
    assert (token.name, token.enrollment_address) == ("house", "localhost:1")
    federation.site("st-olav", role=Role.SITE)
    with pytest.raises(errors.AlreadyExists):
        await operator.operator("InviteSite", operator_pb2.InviteSiteRequest(name="st-olav"))
    with pytest.raises(errors.InvalidInput):
        await operator.operator("InviteSite", operator_pb2.InviteSiteRequest(name="St Olav"))
    sites = (await operator.operator("ListSites", operator_pb2.ListSitesRequest())).sites
    assert [(one.name, one.house, one.state) for one in sites] == [
        ("house", True, "INVITED"),
        ("st-olav", False, "ENROLLED"),
    ]
    await operator.operator("RevokeSite", operator_pb2.RevokeSiteRequest(name="st-olav"))
    with pytest.raises(errors.NotFound):
        await operator.operator("RevokeSite", operator_pb2.RevokeSiteRequest(name="nobody"))
    assert (await operator.operator("InviteSite", operator_pb2.InviteSiteRequest(name="st-olav"))).token


async def test_a_site_that_has_paused_its_task_is_listed_so(federation: Any):
    site, operator = federation.site("st-olav"), federation.operator()
    task = await federation.job_with_version_0(site, content=MODEL)

    async def listed() -> list[tuple[str, bool]]:
        sites = (await operator.operator("ListSites", operator_pb2.ListSitesRequest())).sites
        return [(one.name, one.paused) for one in sites]

    for stage, paused in ((agent_pb2.STAGE_TRAINING, False), (agent_pb2.STAGE_PAUSED, True)):
        progress = agent_pb2.Progress(stage=stage)
        beat = agent_pb2.HeartbeatRequest(task_id=task.id, generation=task.generation, progress=progress)
        await site.agent("Heartbeat", beat)
        assert await listed() == [("st-olav", paused)]


async def test_one_site_is_readmitted_by_name(federation: Any):
    site, operator = federation.site("st-olav"), federation.operator()
    task = await federation.job_with_version_0(site, content=MODEL)
    declined = agent_pb2.Declined(reason="not at night")
    await site.agent(
        "FinishTask", agent_pb2.FinishTaskRequest(task_id=task.id, generation=task.generation, declined=declined)
    )
    readmit = operator_pb2.ControlJobRequest(job=task.job_id, action=operator_pb2.JOB_ACTION_READMIT, site="other")
    with pytest.raises(errors.NotFound, match="other is not set aside"):
        await operator.operator("ControlJob", readmit)
    readmit.site = "st-olav"
    await operator.operator("ControlJob", readmit)
    assert federation.store.jobs.facts(task.job_id, now_unix_seconds=0.0)[1].set_aside == {}
