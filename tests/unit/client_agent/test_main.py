"""The agent as a process: what an operator's signals, a crash and a scrape find."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import psutil

from client_agent import identity
from client_agent.home import Home
from client_agent.taskdir import RESULT, checkpoint_step
from protos.v1 import agent_pb2
from tests.unit.client_agent.coordinator_in_memory import Coordinator
from tests.unit.client_agent.work_to_do import model_bytes, spec, task

MODEL = model_bytes(8)


@asynccontextmanager
async def agent(home: Home) -> AsyncIterator[asyncio.subprocess.Process]:
    command = [sys.executable, "-m", "client_agent.cli", "run", "--home", str(home.path), "--log-format", "json"]
    process = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def first_line(process: asyncio.subprocess.Process) -> dict[str, str]:
    assert process.stderr is not None
    return json.loads(await process.stderr.readline())


async def training(coordinator: Coordinator) -> None:
    wanted = agent_pb2.STAGE_TRAINING
    await coordinator.until(lambda: any(beat.progress.stage == wanted for beat in coordinator.beats))


async def test_a_killed_agent_does_not_download_twice_and_resumes_its_upload(
    home: Home, coordinator: Coordinator
) -> None:
    coordinator.add_task(task(job=spec(payload_mb=8)), model=MODEL)
    coordinator.cut_write_at = 3 << 20
    # The first agent dies while its upload is cut in the middle.
    async with agent(home) as first:
        await coordinator.until(lambda: coordinator.cut_write_at is None)
        first.kill()
        await first.wait()
    assert (home.tasks / "j1-1-train" / RESULT).exists()
    written = coordinator.bytes_written
    async with agent(home):
        await coordinator.until(lambda: coordinator.finished)
    finish = coordinator.finished[0]
    assert finish.HasField("succeeded")
    assert len(coordinator.reads) == 1
    assert written > 0
    assert coordinator.bytes_written == finish.succeeded.manifest.blob.size


async def test_a_killed_agent_takes_its_trainer_with_it_and_trains_again(home: Home, coordinator: Coordinator) -> None:
    coordinator.add_task(task(job=spec(train_seconds=1.5)), model=MODEL)
    async with agent(home) as first:
        await training(coordinator)
        trainers = psutil.Process(first.pid).children()
        first.kill()
        await first.wait()
    assert len(trainers) == 1
    _, alive = await asyncio.to_thread(psutil.wait_procs, trainers, timeout=60)
    assert not alive
    async with agent(home):
        await coordinator.until(lambda: coordinator.finished)
    assert coordinator.finished[0].HasField("succeeded")
    assert len(coordinator.reads) == 1


async def test_sigterm_ends_agent_and_trainer_and_the_task_is_kept(home: Home, coordinator: Coordinator) -> None:
    coordinator.add_task(task(job=spec(train_seconds=600, local={"steps": 6_000_000})), model=MODEL)
    async with agent(home) as process:
        await training(coordinator)
        trainers = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            assert await process.wait() == 0
    assert not any(trainer.is_running() for trainer in trainers)
    assert coordinator.finished == []
    saved = checkpoint_step(home.tasks / "j1-1-train")
    assert saved > 0
    # The next agent goes on where this one stopped.
    coordinator.beats.clear()
    async with agent(home):
        await training(coordinator)
    assert all(beat.progress.done >= saved for beat in coordinator.beats if beat.progress.unit == "steps")


async def test_metrics_health_and_readiness_are_served(home: Home, coordinator: Coordinator) -> None:
    async with agent(home) as process, aiohttp.ClientSession() as http:
        line = await first_line(process)
        assert (line["event"], line["site"]) == ("The agent runs.", "st-olav")
        url = f"http://{line['http']}"
        await coordinator.until(lambda: coordinator.asked)
        await asyncio.sleep(0.3)
        async with http.get(f"{url}/healthz") as answer:
            assert answer.status == 200
        async with http.get(f"{url}/readyz") as answer:
            assert (answer.status, await answer.text()) == (200, "ready\n")
        async with http.get(f"{url}/metrics") as answer:
            metrics = await answer.text()
        coordinator.down = True
        async with asyncio.timeout(60):
            while (await (await http.get(f"{url}/readyz")).text()).startswith("ready"):
                await asyncio.sleep(0.1)
        async with http.get(f"{url}/readyz") as answer:
            assert answer.status == 503
            assert "being restarted" in await answer.text()
    assert "silotune_agent_connected 1.0" in metrics
    names = {name for name in re.findall(r"^# TYPE (\S+)", metrics, flags=re.M) if not name.endswith("_created")}
    assert names == {
        "silotune_build_info",
        "silotune_agent_connected",
        "silotune_task_stage",
        "silotune_transfer_bytes_total",
        "silotune_task_seconds",
        "silotune_first_step_seconds",
        "silotune_train_steps_total",
        "silotune_train_loss",
        "silotune_certificate_expiry_timestamp_seconds",
        "silotune_tasks_finished_total",
        "silotune_disk_spare_bytes",
    }


async def test_a_certificate_beyond_two_thirds_of_its_life_is_renewed(home: Home, coordinator: Coordinator) -> None:
    old = identity.load(home.identity)
    aged = coordinator.authority.sign(identity.make_csr(old.key, name="st-olav"), name="st-olav", days=3, age_days=2.5)
    (home.identity / identity.CERTIFICATE).write_bytes(aged)
    async with agent(home):
        await coordinator.until(lambda: (home.identity / identity.KEY).read_bytes() != old.key)
        asked = len(coordinator.asked)
        await coordinator.until(lambda: len(coordinator.asked) > asked)


async def test_on_a_machine_that_is_not_enrolled_it_says_so_and_leaves_nothing_behind(tmp_path: Path) -> None:
    async with agent(Home(tmp_path / "fresh")) as process:
        _, output = await process.communicate()
    assert process.returncode == 6
    assert b"This agent is not enrolled yet." in output
    assert not (tmp_path / "fresh").exists()


async def test_a_port_in_use_is_said_in_words(home: Home, coordinator: Coordinator) -> None:
    home.site_file.write_text(f'[http]\naddress = "{coordinator.address}"\n')
    async with agent(home) as process:
        _, output = await process.communicate()
    assert process.returncode == 3
    assert b"cannot be listened on" in output


def test_the_daemon_never_imports_torch_or_transformers() -> None:
    heavy = ["torch", "transformers", "peft", "huggingface_hub", "numpy"]
    code = f"import sys, client_agent.cli, client_agent.main; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_agent_never_imports_the_coordinator() -> None:
    code = "import sys, client_agent.main; print([m for m in sys.modules if m.split('.')[0] == 'coordinator'])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert found.stdout.strip() == "[]"
