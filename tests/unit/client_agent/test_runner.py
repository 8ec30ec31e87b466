from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from structlog.testing import capture_logs

from client_agent import runner as runner_module
from client_agent.runner import Failure, Finished, Paused, Runner
from client_agent.taskdir import CHECKPOINT, TaskSpec, read_result, write_spec
from tests.unit.client_agent.work_to_do import model_bytes, spec


@pytest.fixture
async def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Runner]:
    # As long as a busy machine may take.
    monkeypatch.setattr(runner_module, "EXIT_SECONDS", 60)
    monkeypatch.setattr(runner_module, "KILL_GRACE_SECONDS", 60)
    running = Runner(log_directory=tmp_path / "log", idle_seconds=600)
    yield running
    await running.close()


def task(directory: Path, *, train_seconds: float = 0.0) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "model").write_bytes(model_bytes())
    fields: dict[str, Any] = {
        "spec": spec(train_seconds=train_seconds).model_dump(mode="json"),
        "model_path": str(directory / "model"),
    }
    write_spec(
        directory,
        TaskSpec(
            task_id="t", job_id="j1", round=1, kind="train", seed=7, split="", base_model_path=None, base_digest="",
            data_set=None, device="cpu", threads=1, **fields,
        ),
    )  # fmt: skip
    return directory


def ignore(event: dict[str, Any]) -> None:
    pass


def use_script(monkeypatch: pytest.MonkeyPatch, directory: Path, body: str) -> None:
    """Lets `kind="broken"` start a trainer of the test's own."""
    (directory / "broken_trainer.py").write_text(textwrap.dedent(body))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(directory), str(Path.cwd())]))
    monkeypatch.setitem(runner_module.MODULES, "broken", "broken_trainer")


async def test_the_trainer_stays_warm_between_tasks(runner: Runner, tmp_path: Path) -> None:
    assert await runner.run(task(tmp_path / "a"), kind="synthetic", on_progress=ignore) == Finished()
    first = runner.pid
    assert await runner.run(task(tmp_path / "b"), kind="synthetic", on_progress=ignore) == Finished()
    assert runner.pid == first
    assert read_result(tmp_path / "b") is not None


async def test_progress_is_told_while_it_runs(runner: Runner, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    await runner.run(task(tmp_path / "a", train_seconds=0.1), kind="synthetic", on_progress=events.append)
    assert events[-1] == {
        "event": "progress", "stage": "training", "done": 4, "total": 4, "unit": "steps", "metrics": {},
    }  # fmt: skip


async def test_a_cancelled_task_leaves_the_trainer_warm_for_the_next(runner: Runner, tmp_path: Path) -> None:
    started = asyncio.Event()
    running = asyncio.create_task(
        runner.run(task(tmp_path / "a", train_seconds=60), kind="synthetic", on_progress=lambda event: started.set())
    )
    await started.wait()
    first = runner.pid
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert read_result(tmp_path / "a") is None
    assert await runner.run(task(tmp_path / "b"), kind="synthetic", on_progress=ignore) == Finished()
    assert runner.pid == first


async def test_a_trainer_that_does_not_stop_is_killed(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_script(
        monkeypatch,
        tmp_path,
        """
        import sys, time
        sys.stdin.readline()
        print('{"event": "progress", "stage": "loading", "done": 0, "total": 1, "unit": "rows"}', flush=True)
        time.sleep(600)
        """,
    )
    runner.cancel_seconds = 0.2
    started = asyncio.Event()
    running = asyncio.create_task(runner.run(tmp_path, kind="broken", on_progress=lambda event: started.set()))
    await started.wait()
    pid = runner.pid
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert pid is not None
    assert not psutil.pid_exists(pid)


async def test_a_trainer_that_is_to_pause_saves_what_it_has_and_stays(runner: Runner, tmp_path: Path) -> None:
    pausing = asyncio.Event()
    directory = task(tmp_path / "a", train_seconds=600)
    ended = await runner.run(directory, kind="synthetic", on_progress=lambda event: pausing.set(), pausing=pausing)
    assert ended == Paused()
    assert (directory / CHECKPOINT).exists() and read_result(directory) is None
    # One that is to pause before it has begun does so too.
    assert await runner.run(directory, kind="synthetic", on_progress=ignore, pausing=pausing) == Paused()
    assert runner.pid is not None


async def test_a_trainer_that_does_not_pause_is_killed(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "PAUSE_SECONDS", 0.2)
    use_script(monkeypatch, tmp_path, "import time; time.sleep(600)")
    pausing = asyncio.Event()
    pausing.set()
    assert await runner.run(tmp_path, kind="broken", on_progress=ignore, pausing=pausing) == Paused()
    assert runner.pid is None


async def test_a_trainer_that_a_kill_does_not_end_at_once_holds_up_nobody(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if it waited for a disk or a driver in the system: no time is left to see it end.
    monkeypatch.setattr(runner_module, "EXIT_SECONDS", 0)
    monkeypatch.setattr(runner_module, "KILL_GRACE_SECONDS", 0)
    use_script(
        monkeypatch,
        tmp_path,
        """
        import sys, time
        sys.stdin.readline()
        print('{"event": "failed", "reason": "no rows"}', flush=True)
        time.sleep(600)
        """,
    )
    await runner.run(tmp_path, kind="broken", on_progress=ignore)
    process = runner._process
    assert process is not None
    with capture_logs() as said:
        await runner.close()
    # Its end is seen before the loop ends, or its pipes are left open.
    await process.wait()
    assert "The trainer was killed and has not ended yet." in [line["event"] for line in said]


async def test_at_the_daemons_end_the_trainer_saves_what_it_has(runner: Runner, tmp_path: Path) -> None:
    started = asyncio.Event()
    directory = task(tmp_path / "a", train_seconds=600)
    running = asyncio.create_task(runner.run(directory, kind="synthetic", on_progress=lambda event: started.set()))
    await started.wait()
    runner.shut_down(within_seconds=120)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert (directory / CHECKPOINT).exists()


async def test_a_killed_trainer_is_reported_as_out_of_memory_and_replaced(runner: Runner, tmp_path: Path) -> None:
    started = asyncio.Event()
    running = asyncio.create_task(
        runner.run(task(tmp_path / "a", train_seconds=60), kind="synthetic", on_progress=lambda event: started.set())
    )
    await started.wait()
    assert runner.pid is not None
    os.kill(runner.pid, signal.SIGKILL)
    ended = await running
    assert isinstance(ended, Failure)
    assert "killed by the system" in ended.reason
    assert await runner.run(task(tmp_path / "b"), kind="synthetic", on_progress=ignore) == Finished()


async def test_an_exception_is_reported_by_its_kind_and_its_text_stays_in_the_log(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_script(monkeypatch, tmp_path, "raise ValueError('patient Ola Nordmann has a cough')")
    ended = await runner.run(tmp_path, kind="broken", on_progress=ignore)
    assert ended == Failure(
        "The trainer ended with ValueError (exit code 1).",
        hint="The site's log/trainer.log has the details.",
        died=True,
    )
    assert "Ola Nordmann" in (tmp_path / "log" / "trainer.log").read_text()


async def test_what_a_library_prints_is_no_event(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_script(
        monkeypatch,
        tmp_path,
        """
        import sys
        sys.stdin.readline()
        print("Loading weights: 100 %")
        print('{"event": "failed", "reason": "no rows"}', flush=True)
        sys.stdin.read()
        """,
    )
    assert await runner.run(tmp_path, kind="broken", on_progress=ignore) == Failure("no rows")


async def test_an_idle_trainer_gives_its_memory_back(tmp_path: Path) -> None:
    runner = Runner(log_directory=tmp_path / "log", idle_seconds=0.05)
    await runner.run(task(tmp_path / "a"), kind="synthetic", on_progress=ignore)
    pid = runner.pid
    assert pid is not None
    async with asyncio.timeout(60):
        while psutil.pid_exists(pid):
            await asyncio.sleep(0.02)
    assert await runner.run(task(tmp_path / "b"), kind="synthetic", on_progress=ignore) == Finished()
    await runner.close()


async def test_the_trainer_takes_nothing_from_the_network(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_script(
        monkeypatch,
        tmp_path,
        """
        import json, os, sys
        sys.stdin.readline()
        reason = " ".join(os.environ[name] for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
        print(json.dumps({"event": "failed", "reason": reason}), flush=True)
        """,
    )
    assert await runner.run(tmp_path, kind="broken", on_progress=ignore) == Failure("1 1")


def test_a_trainer_does_not_outlive_a_killed_daemon(tmp_path: Path) -> None:
    daemon = textwrap.dedent(
        """
        import os, subprocess, sys, time
        command = [sys.executable, "-m", "client_agent.tether", "client_agent.synthetic", str(os.getpid())]
        keep_open, _ = os.pipe()
        print(subprocess.Popen(command, stdin=keep_open).pid, flush=True)
        time.sleep(600)
        """
    )
    with subprocess.Popen([sys.executable, "-c", daemon], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        trainer = psutil.Process(int(process.stdout.readline()))
        # The tether has begun its work when the trainer's module is imported.
        while trainer.is_running() and not any("numpy" in map.path for map in trainer.memory_maps()):
            pass
        process.kill()
        assert psutil.wait_procs([trainer], timeout=60)[1] == []
