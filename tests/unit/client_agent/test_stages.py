"""What becomes of a training when the disk is full, when it is to stop, and when its trainer dies late."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import textwrap
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from client_agent import runner as runner_module
from client_agent import settings
from client_agent.home import Home
from client_agent.journal import Journal, work_of
from client_agent.main import compose
from client_agent.reports import failed_by_surprise
from client_agent.taskdir import Checkpoint, write_checkpoint
from protos.v1 import agent_pb2
from tests.unit.client_agent.coordinator_in_memory import Coordinator
from tests.unit.client_agent.test_loop import MODEL, finish_of, log_of, running, stages_seen
from tests.unit.client_agent.work_to_do import spec, task


def use_trainer(monkeypatch: pytest.MonkeyPatch, directory: Path, body: str) -> None:
    """Lets the daemon start a trainer of the test's own for synthetic tasks."""
    (directory / "trainer_of_the_test.py").write_text(textwrap.dedent(body))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(directory), str(Path.cwd())]))
    monkeypatch.setitem(runner_module.MODULES, "synthetic", "trainer_of_the_test")


@pytest.mark.parametrize("file", ["update.safetensors", "result.json.new", "journal.json.new", "spec.json.new"])
async def test_a_full_disk_is_said_and_waited_for_and_costs_no_training(
    home: Home, coordinator: Coordinator, file: str
) -> None:
    granted = task()
    coordinator.add_task(granted, model=MODEL)
    journal = Journal(home.tasks)
    journal.open(work_of(granted), generation=0)
    # Whatever is written there meets "No space left on device".
    obstacle = journal.path(work_of(granted)) / file
    obstacle.symlink_to("/dev/full")
    with capture_logs() as said:
        async with running(home) as agent:
            await coordinator.until(lambda: "disk is full" in agent.daemon.not_ready())
            await coordinator.until(lambda: agent_pb2.STAGE_WAITING_FOR_DISK in stages_seen(coordinator))
            # It is tried again at least once, and nothing is written.
            beats = len(coordinator.beats)
            await coordinator.until(lambda: len(coordinator.beats) > beats + 2)
            assert coordinator.finished == []
            obstacle.unlink()
            finish = await finish_of(coordinator)
            await coordinator.until(lambda: not agent.daemon.not_ready())
            assert agent.metrics.registry.get_sample_value("silotune_disk_spare_bytes") > 0
    assert finish.HasField("succeeded")
    assert len(log_of(said, "The trainer begins.")) == 1, "nothing was trained twice"


def mount(path: Path, *, options: str) -> None:
    """A file system in memory of its own at `path`; the test is skipped where none may be mounted."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"NOT CHECKED: no small file system can be mounted here: {done.stderr.strip()}")


async def test_a_model_that_finds_no_room_is_said_and_waited_for(home: Home, coordinator: Coordinator) -> None:
    mount(home.blobs, options="size=64k")
    try:
        coordinator.add_task(task(), model=MODEL)
        async with running(home) as agent:
            await coordinator.until(lambda: "disk is full" in agent.daemon.not_ready())
            await coordinator.until(lambda: agent_pb2.STAGE_WAITING_FOR_DISK in stages_seen(coordinator))
            mount(home.blobs, options="remount,size=64m")
            assert (await finish_of(coordinator)).HasField("succeeded")
    finally:
        subprocess.run(["umount", "--lazy", home.blobs], check=True)


async def test_what_the_trainer_finds_the_policy_to_forbid_is_declined(
    home: Home, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_trainer(
        monkeypatch,
        tmp_path,
        """
        import json, sys
        sys.stdin.readline()
        print(json.dumps({"event": "failed", "reason": "Too many epochs.", "hint": "", "declined": True}), flush=True)
        sys.stdin.read()
        """,
    )
    coordinator.add_task(task(), model=MODEL)
    async with running(home):
        finish = await finish_of(coordinator)
    assert finish.declined.reason == "Too many epochs."


async def test_a_trainer_that_dies_after_its_result_was_written_does_not_train_again(
    home: Home, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_trainer(
        monkeypatch,
        tmp_path,
        """
        import os, signal
        from client_agent import synthetic
        say = synthetic.say
        def say_or_die(event, **fields):
            if event == "done":
                os.kill(os.getpid(), signal.SIGKILL)
            say(event, **fields)
        synthetic.say = say_or_die
        synthetic.main()
        """,
    )
    coordinator.add_task(task(), model=MODEL)
    with capture_logs() as said:
        async with running(home):
            finish = await finish_of(coordinator)
    assert finish.HasField("succeeded")
    assert len(log_of(said, "The trainer begins.")) == 1


async def test_a_stop_that_comes_too_soon_for_a_step_says_what_was_not_saved(
    home: Home, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_trainer(
        monkeypatch,
        tmp_path,
        """
        import json, sys, time
        sys.stdin.readline()
        progress = {"event": "progress", "stage": "training", "done": 7, "total": 9, "unit": "steps", "metrics": {}}
        print(json.dumps(progress), flush=True)
        time.sleep(3600)
        """,
    )
    granted = task(job=spec(train_seconds=600))
    coordinator.add_task(granted, model=MODEL)
    journal = Journal(home.tasks)
    journal.open(work_of(granted), generation=0)
    write_checkpoint(journal.path(work_of(granted)), Checkpoint("work", 3))
    with capture_logs() as said:
        async with running(home) as agent:
            await coordinator.until(lambda: agent_pb2.STAGE_TRAINING in stages_seen(coordinator))
            agent.runner.shut_down(within_seconds=0.1)
    (line,) = log_of(said, "The training since step 3 was not saved.")
    assert line["reached_step"] == 7


def test_only_an_error_with_a_number_is_one_of_the_disk() -> None:
    full = failed_by_surprise(OSError(errno.EIO, "Input/output error", "/srv/patients"))
    assert full.reason == "The agent could not use its disk: Input/output error."
    assert failed_by_surprise(TimeoutError()).reason == "The agent failed with TimeoutError."
    assert "Ola" not in str(failed_by_surprise(ValueError("Ola Nordmann")))


async def test_an_upload_that_takes_long_does_not_keep_another_site_from_the_device_that_they_share(
    home: Home, coordinator: Coordinator
) -> None:
    device = asyncio.Lock()
    agent = compose(home, settings.load(home.site_file), gpu="", rows={}, device=device)
    coordinator.add_task(task(), model=MODEL)
    # Nothing of an upload comes through, for as long as this lasts.
    coordinator.cut_write_at, coordinator.cuts_for_good = 0, True
    async with running(home, agent):
        await coordinator.until(lambda: agent_pb2.STAGE_UPLOADING in stages_seen(coordinator))
        async with asyncio.timeout(60), device:
            assert not coordinator.finished
        coordinator.cut_write_at = None
        assert (await finish_of(coordinator)).WhichOneof("outcome") == "succeeded"
