"""A site that is paused by its administrator, through the real commands: the work waits, and nothing is lost."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from client_agent.taskdir import Checkpoint, read_spec, write_checkpoint
from tests.federation.conftest import Jobs, start

ONE = "quorum = 1\ngather_seconds = 60"


def stage(jobs: Jobs, job: str) -> str:
    return next((task["progress"]["stage"] for task in jobs.show(job)["tasks"] if task["state"] == "RUNNING"), "")


def test_a_paused_site_keeps_its_work_over_a_kill_and_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    with start(tmp_path, "alfa") as federation:
        jobs = Jobs(federation)
        calm = jobs.submit(rounds=1, cohort=ONE)
        assert jobs.end(calm)["job"]["state"] == "COMPLETED"

        home = federation.home("alfa")
        job = jobs.submit(rounds=1, task="payload_mb = 1\ntrain_seconds = 3600", cohort=ONE)
        jobs.wait(job, lambda _: stage(jobs, job) == "TRAINING", saying="training")
        federation.run("silotune-agent", "pause", "--home", str(home))
        jobs.wait(job, lambda _: stage(jobs, job) == "PAUSED", saying="the pause")
        shown = json.loads(federation.run("silotune-agent", "status", "--home", str(home), "--format", "json"))["data"]
        assert shown["connected"] and "paused by its administrator" in shown["hold"]
        assert [task["stage"] for task in shown["tasks"]] == ["paused"]

        federation.nodes["alfa"].kill(signal.SIGKILL)
        federation.start_agent("alfa", wait=False)
        log = federation.nodes["alfa"].log
        jobs.wait(job, lambda _: log.read_text().count("The task is paused.") == 2, saying="the pause after the kill")
        # As if all but the last moment of the hour had passed before the pause.
        directory = home / "tasks" / f"{job}-1-train"
        write_checkpoint(directory, Checkpoint(read_spec(directory).work_digest(), 3, {"seconds": 3599.9}))
        federation.run("silotune-agent", "resume", "--home", str(home))
        assert jobs.end(job)["job"]["state"] == "COMPLETED"
        assert "resumed_step=3" in log.read_text()
        assert jobs.digest(job, 1) == jobs.digest(calm, 1)
