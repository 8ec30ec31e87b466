from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from client_agent import identity, reports, settings
from client_agent.hold import Pause, PauseFile
from client_agent.home import Home
from client_agent.main import Agent, compose
from client_agent.policy import Approvals
from client_agent.taskdir import Checkpoint, checkpoint_step, read_spec, write_checkpoint
from protos.metrics import METRICS
from protos.v1 import agent_pb2
from tests.unit.client_agent.coordinator_in_memory import Coordinator
from tests.unit.client_agent.work_to_do import model_bytes, spec, task

MODEL = model_bytes()


@asynccontextmanager
async def running(home: Home, agent: Agent | None = None) -> AsyncIterator[Agent]:
    agent = agent or compose(home, settings.load(home.site_file), gpu="", rows={})
    working = asyncio.create_task(agent.daemon.run())
    try:
        yield agent
    finally:
        agent.runner.cancel_seconds = 1
        working.cancel()
        await asyncio.wait({working})
        await agent.runner.close()
        await agent.session.close()


async def finish_of(coordinator: Coordinator, number: int = 0) -> agent_pb2.FinishTaskRequest:
    await coordinator.until(lambda: len(coordinator.finished) > number)
    return coordinator.finished[number]


def stages_seen(coordinator: Coordinator) -> set[int]:
    return {beat.progress.stage for beat in coordinator.beats}


async def test_version_0_is_built_and_handed_in(home: Home, coordinator: Coordinator) -> None:
    coordinator.add_task(task("init", round=0))
    async with running(home):
        finish = await finish_of(coordinator)
    blob = finish.succeeded.manifest.blob
    assert len(coordinator.sealed[blob.digest]) == blob.size
    assert finish.succeeded.manifest.base_version == 0


async def test_a_model_is_fetched_trained_and_handed_in(home: Home, coordinator: Coordinator) -> None:
    coordinator.add_task(task(round=3), model=MODEL)
    async with running(home) as agent:
        finish = await finish_of(coordinator)
        # The task directory is the journal: it goes only after the coordinator's answer.
        await coordinator.until(lambda: not list(home.tasks.iterdir()))
        assert agent.daemon.not_ready() == ""
    done = finish.succeeded
    assert coordinator.sealed[done.manifest.blob.digest] != MODEL
    assert (done.manifest.base_version, done.examples, done.steps) == (2, 107, 4)
    assert {"fetch", "train", "save", "upload", "first_step"} <= set(done.seconds)
    metrics = agent.metrics.registry
    assert metrics.get_sample_value("silotune_transfer_bytes_total", {"direction": "down"}) == len(MODEL)
    finished = {"kind": "train", "outcome": "succeeded"}
    assert metrics.get_sample_value("silotune_tasks_finished_total", finished) == 1


async def test_an_evaluation_sends_numbers_and_no_bytes(home: Home, coordinator: Coordinator) -> None:
    coordinator.add_task(task("evaluate", split="validation"), model=MODEL)
    async with running(home):
        finish = await finish_of(coordinator)
    assert dict(finish.succeeded.metrics) == {"accuracy": 0.8, "loss": 0.25}
    assert not finish.succeeded.HasField("manifest")
    assert coordinator.bytes_written == 0


async def test_without_a_policy_every_task_is_declined_and_the_reason_told(
    home: Home, coordinator: Coordinator
) -> None:
    home.site_file.write_text("")
    coordinator.add_task(task(), model=MODEL)
    async with running(home) as agent:
        finish = await finish_of(coordinator)
        assert "no [policy]" in agent.daemon.not_ready()
    assert "no [policy]" in finish.declined.reason
    assert coordinator.reads == []


async def test_a_base_model_that_the_site_does_not_hold_is_declined(home: Home, coordinator: Coordinator) -> None:
    job = spec(
        task={"type": "classification", "labels": ["a", "b"]}, data={"name": "answers"}, base_model={"name": "minilm"}
    )
    coordinator.add_task(task(job=job), model=MODEL)
    async with running(home):
        finish = await finish_of(coordinator)
    assert "holds no base model named 'minilm'" in finish.declined.reason


async def test_a_kind_of_task_from_a_newer_coordinator_is_declined(home: Home, coordinator: Coordinator) -> None:
    coordinator.add_task(task(kind="train", id="new"))
    coordinator.tasks[0].kind = 77
    async with running(home):
        finish = await finish_of(coordinator)
    assert "too old for this kind of task" in finish.declined.reason


async def test_a_trainers_failure_is_reported_once_with_its_reason(home: Home, coordinator: Coordinator) -> None:
    coordinator.add_task(task(), model=b"not a tensor file" * 100)
    async with running(home):
        finish = await finish_of(coordinator)
        await coordinator.until(lambda: not list(home.tasks.iterdir()))
    assert "header" in finish.failed.reason
    assert len(coordinator.finished) == 1


async def test_a_job_waits_for_approval_and_other_jobs_run_meanwhile(home: Home, coordinator: Coordinator) -> None:
    home.site_file.write_text('[policy]\ntasks = ["*"]\napproval = "ask"\n')
    approvals = Approvals(home.approvals)
    asked, known = spec(name="asked"), spec(name="known")
    for job in (asked, known):
        coordinator.add_task(task(job=job, id=job.name, job_id=job.name), model=MODEL)
    approvals.ask(known.canonical_json, spec_hash=known.hash, job_name="known")
    approvals.settle(known.hash, approved=True)
    async with running(home):
        assert (await finish_of(coordinator)).task_id == "known"
        assert agent_pb2.STAGE_APPROVING in {
            beat.progress.stage for beat in coordinator.beats if beat.task_id == "asked"
        }
        approvals.settle(asked.hash, approved=True)
        finish = await finish_of(coordinator, 1)
    assert (finish.task_id, finish.WhichOneof("outcome")) == ("asked", "succeeded")


async def test_a_denied_job_is_declined(home: Home, coordinator: Coordinator) -> None:
    home.site_file.write_text('[policy]\ntasks = ["*"]\napproval = "ask"\n')
    approvals = Approvals(home.approvals)
    approvals.ask(spec().canonical_json, spec_hash=spec().hash, job_name="job")
    approvals.settle(spec().hash, approved=False)
    coordinator.add_task(task(), model=MODEL)
    async with running(home):
        finish = await finish_of(coordinator)
    assert "administrator denied" in finish.declined.reason


async def test_the_coordinator_stops_work_that_it_does_not_want_any_more(home: Home, coordinator: Coordinator) -> None:
    coordinator.add_task(task(job=spec(train_seconds=600)), model=MODEL)
    async with running(home) as agent:
        await coordinator.until(lambda: agent_pb2.STAGE_TRAINING in stages_seen(coordinator))
        coordinator.stop_reason = "round 1 closed"
        coordinator.tasks = []
        await coordinator.until(lambda: not agent.daemon._held)
        assert agent.runner.pid is not None
    assert coordinator.finished == []


async def test_a_fenced_lease_is_asked_for_again_and_the_work_goes_on(home: Home, coordinator: Coordinator) -> None:
    coordinator.add_task(task(job=spec(train_seconds=2)), model=MODEL)
    async with running(home):
        await coordinator.until(lambda: agent_pb2.STAGE_TRAINING in stages_seen(coordinator))
        coordinator.fenced = True
        finish = await finish_of(coordinator)
    assert finish.generation == 2
    assert len(coordinator.reads) == 1
    trained = [beat.progress.done for beat in coordinator.beats if beat.progress.stage == agent_pb2.STAGE_TRAINING]
    assert trained == sorted(trained)


async def test_a_finished_result_survives_the_agent_and_is_handed_in_by_the_next(
    home: Home, coordinator: Coordinator
) -> None:
    coordinator.add_task(task(job=spec(train_seconds=1)), model=MODEL)
    journal = home.tasks / "j1-1-train" / "journal.json"
    async with running(home):
        await coordinator.until(lambda: agent_pb2.STAGE_TRAINING in stages_seen(coordinator))
        coordinator.down = True
        await coordinator.until(lambda: json.loads(journal.read_text())["blobs"])
    coordinator.down = False
    async with running(home) as agent:
        finish = await finish_of(coordinator)
        assert agent.runner.pid is None, "it was not trained again"
    assert finish.HasField("succeeded")
    assert finish.generation == 2
    assert len(coordinator.reads) == 1


async def test_a_result_that_the_coordinator_has_lost_is_uploaded_again_and_not_trained_again(
    home: Home, coordinator: Coordinator
) -> None:
    coordinator.lose_blobs = True
    coordinator.add_task(task(), model=MODEL)
    with capture_logs() as logs:
        async with running(home):
            finish = await finish_of(coordinator)
    blob = finish.succeeded.manifest.blob
    assert len(coordinator.sealed[blob.digest]) == blob.size
    assert coordinator.bytes_written == 2 * blob.size
    assert [line["event"] for line in logs].count("The trainer begins.") == 1


async def test_an_outage_in_mid_work_loses_nothing(home: Home, coordinator: Coordinator) -> None:
    coordinator.add_task(task(job=spec(train_seconds=1)), model=MODEL)
    coordinator.cut_read_at = 0
    async with running(home) as agent:
        await coordinator.until(lambda: agent_pb2.STAGE_TRAINING in stages_seen(coordinator))
        coordinator.down = True
        await coordinator.until(lambda: "being restarted" in agent.daemon.not_ready())
        coordinator.down = False
        finish = await finish_of(coordinator)
    assert finish.HasField("succeeded")


@pytest.mark.parametrize("hostile", ["job_id", "split"])
async def test_a_hostile_coordinator_reaches_no_directory_outside_the_home(
    home: Home, coordinator: Coordinator, tmp_path: Path, hostile: str
) -> None:
    victim = tmp_path / ("victim-1-train" if hostile == "job_id" else "victim")
    victim.mkdir()
    (victim / "thesis.txt").write_text("years of work")
    if hostile == "job_id":
        coordinator.add_task(task(job_id=str(tmp_path / "victim")), model=MODEL)
    else:
        # As much of the path as an earlier task may have made.
        (home.tasks / "j1-1-evaluate-0-").mkdir()
        coordinator.add_task(task("evaluate", split="/../../../victim"), model=MODEL)
    async with running(home) as agent:
        finish = await finish_of(coordinator)
        await coordinator.until(lambda: not agent.daemon._held)
    assert finish.WhichOneof("outcome") == "failed"
    assert (victim / "thesis.txt").read_text() == "years of work"


async def test_a_disk_that_cannot_be_written_does_not_end_the_agent_and_is_said(
    home: Home, coordinator: Coordinator
) -> None:
    # A full disk cannot be had here; a directory in the file's place gives the same kind of error.
    obstacle = home.status_file.with_suffix(".json.new")
    obstacle.mkdir()
    async with running(home) as agent:
        await coordinator.until(lambda: "Writing the status file failed" in agent.daemon.not_ready())
        coordinator.add_task(task(), model=MODEL)
        assert (await finish_of(coordinator)).HasField("succeeded")
        obstacle.rmdir()
        await coordinator.until(lambda: not agent.daemon.not_ready())
        assert home.status_file.exists()


async def test_task_directories_that_cannot_be_read_or_removed_do_not_end_the_agent(
    home: Home, coordinator: Coordinator
) -> None:
    (home.tasks / "gone").symlink_to(home.path / "nowhere")
    (home.tasks / "unreadable" / "journal.json").mkdir(parents=True)
    async with running(home):
        for number in (1, 2):
            coordinator.add_task(task(round=number), model=MODEL)
            assert (await finish_of(coordinator, number - 1)).HasField("succeeded")


async def test_a_renewal_that_the_disk_refuses_does_not_end_the_agent(home: Home, coordinator: Coordinator) -> None:
    old = identity.load(home.identity)
    aged = coordinator.authority.sign(identity.make_csr(old.key, name="st-olav"), name="st-olav", days=3, age_days=2.5)
    (home.identity / identity.CERTIFICATE).write_bytes(aged)
    agent = compose(home, settings.load(home.site_file), gpu="", rows={})
    (home.identity / "key.pem.new").mkdir()
    async with running(home, agent):
        await coordinator.until(lambda: "Renewing the certificate failed" in agent.daemon.not_ready())
        coordinator.add_task(task(), model=MODEL)
        assert (await finish_of(coordinator)).HasField("succeeded")


async def test_a_home_that_cannot_be_looked_at_does_not_end_the_agent(home: Home, coordinator: Coordinator) -> None:
    home.models_file.mkdir()
    async with running(home) as agent:
        await coordinator.until(lambda: "Looking at the agent's home failed" in agent.daemon.not_ready())
        coordinator.add_task(task(), model=MODEL)
        assert (await finish_of(coordinator)).HasField("succeeded")


async def test_rows_that_are_added_are_told_with_the_next_request_for_work(
    home: Home, coordinator: Coordinator
) -> None:
    file = home.path / "answers.csv"
    file.write_text("text,label\nfever,a\ncough,b\n")
    home.site_file.write_text('[policy]\n[data.answers]\npath = "answers.csv"\nvalidation = 0.0\n')

    def told(rows: int) -> bool:
        return bool(coordinator.asked) and coordinator.asked[-1].agent.data_sets[0].rows == rows

    async with running(home):
        await coordinator.until(lambda: told(2))
        file.write_text("text,label\nfever,a\ncough,b\nrash,a\n")
        await coordinator.until(lambda: told(3))


def log_of(said: list[Any], event: str) -> list[Any]:
    return [line for line in said if line["event"] == event]


def shorten_the_rest(directory: Path, *, steps: int) -> None:
    """Makes the checkpoint of a long synthetic training one of which almost all is done."""
    work = read_spec(directory).work_digest()
    write_checkpoint(directory, Checkpoint(work, steps - 1, {"seconds": 599.99}))


LONG = spec(train_seconds=600, local={"steps": 600_000, "checkpoint_seconds": 0.2})


async def test_a_killed_trainer_and_a_pause_cost_no_training_and_change_no_bit(
    home: Home, coordinator: Coordinator
) -> None:
    coordinator.add_task(task(job=LONG), model=MODEL)
    directory = home.tasks / "j1-1-train"
    pause = PauseFile(home.pause_file)
    with capture_logs() as said:
        async with running(home) as agent:
            await coordinator.until(lambda: checkpoint_step(directory))
            assert agent.runner.pid is not None
            os.kill(agent.runner.pid, signal.SIGKILL)
            await coordinator.until(lambda: len(log_of(said, "The trainer begins.")) == 2)
            pause.write(Pause(None))
            await coordinator.until(lambda: agent_pb2.STAGE_PAUSED in stages_seen(coordinator))
            assert agent.runner.pid is None, "the device's memory is given back"
            assert "paused by its administrator" in agent.daemon.not_ready()
            progress = coordinator.beats[-1].progress
            assert (progress.unit, progress.total) == ("steps", 600_000) and progress.done > 0
            shorten_the_rest(directory, steps=600_000)
            pause.remove()
            finish = await finish_of(coordinator)
    assert finish.succeeded.steps == 600_000
    assert finish.generation == 1 and len(coordinator.finished) == 1, "the coordinator was told of nothing"
    resumed = [line["resumed_step"] for line in log_of(said, "The trainer begins.")]
    assert 0 == resumed[0] < resumed[1] < resumed[2]
    for event in ("A task was granted.", "The task is paused.", "The task goes on.", "The trainer has finished."):
        (line,) = log_of(said, event)
        assert (line["job"], line["round"], line["task"], line["generation"]) == ("j1", 1, "train", 1)
    (sealed,), (sent,), (done,) = (
        log_of(said, f"The {what}.") for what in ("result is sealed", "result was uploaded", "task succeeded")
    )
    assert sealed["digest"] == sent["digest"] == done["digest"] == finish.succeeded.manifest.blob.digest
    assert sent["sent_bytes"] == sent["bytes"] == coordinator.bytes_written
    # The noise follows from the task's seed alone, however long the training took.
    coordinator.add_task(task(round=1, id="calm", job_id="j2"), model=MODEL)
    async with running(home):
        calm = await finish_of(coordinator, 1)
    assert calm.succeeded.manifest.blob.digest == done["digest"]


async def test_a_trainer_that_dies_without_getting_further_is_reported(home: Home, coordinator: Coordinator) -> None:
    coordinator.add_task(task(job=spec(train_seconds=600)), model=MODEL)
    async with running(home) as agent:
        await coordinator.until(lambda: agent_pb2.STAGE_TRAINING in stages_seen(coordinator))
        assert agent.runner.pid is not None
        os.kill(agent.runner.pid, signal.SIGKILL)
        finish = await finish_of(coordinator)
    assert "killed by the system" in finish.failed.reason


async def test_outside_its_hours_a_site_holds_its_task_and_stays_connected(
    home: Home, coordinator: Coordinator
) -> None:
    begin = datetime.now() + timedelta(hours=12)
    hours = f"{begin:%H:%M}-{begin + timedelta(minutes=1):%H:%M}"
    home.site_file.write_text(f'[policy]\ntasks = ["*"]\n[schedule]\nhours = ["{hours}"]\n')
    coordinator.add_task(task(), model=MODEL)
    async with running(home) as agent:
        await coordinator.until(lambda: agent_pb2.STAGE_PAUSED in stages_seen(coordinator))
        assert f"outside this site's hours ({hours}) until" in agent.daemon.not_ready()
        beats = len(coordinator.beats)
        await coordinator.until(lambda: len(coordinator.beats) > beats + 1)
        assert agent.runner.pid is None and agent.daemon._session.connected
    assert coordinator.finished == []


def test_paths_do_not_leave_the_site(home: Home) -> None:
    site = settings.SiteSettings(data={"answers": settings.DataSet(path="/srv/oncology/patients.csv")})
    agent = compose(home, site, gpu="", rows={})
    told = agent.daemon._stages.without_paths(f"/srv/oncology/patients.csv and {home.path}/x cannot be read")
    assert told == "data set 'answers' and the agent's home/x cannot be read"


def test_only_listed_finite_numbers_are_reported() -> None:
    numbers = {"loss": 0.5, "accuracy": float("nan"), "patient_age": 52.0}
    assert reports.reportable(numbers, allowed=METRICS) == {"loss": 0.5}
