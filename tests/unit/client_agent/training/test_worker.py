"""The trainer as the daemon meets it: a process that is spoken to in lines of JSON."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client_agent.settings import trainer_environment
from client_agent.taskdir import UPDATE, checkpoint_step, read_result
from client_agent.training.warm import Warm
from tests.unit.client_agent.training.conftest import Site

ROOT = Path(__file__).resolve().parents[4]


class Worker:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "client_agent.training.worker"],
            cwd=ROOT,
            env={**trainer_environment(), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def send(self, **command: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def events(self) -> Iterator[dict[str, Any]]:
        """Every line up to the one that ends a task; each must be an event."""
        assert self.process.stdout
        while True:
            event = json.loads(self.process.stdout.readline())
            yield event
            if event["event"] != "progress":
                return

    def run(self, directory: Path) -> list[dict[str, Any]]:
        self.send(run=str(directory))
        return list(self.events())

    def close(self) -> tuple[int, str, str]:
        """The exit status, and what was left to read from its output and its log."""
        out, log = self.process.communicate(timeout=300)
        return self.process.returncode, out, log


@pytest.fixture
def worker() -> Iterator[Worker]:
    started = Worker()
    yield started
    started.process.kill()
    started.process.communicate()


def test_a_worker_does_task_after_task_and_its_output_equals_that_of_a_fresh_one(site: Site, worker: Worker) -> None:
    recipe = site.recipe()
    init = site.write("init", site.task("init", recipe=recipe))
    assert worker.run(init)[-1] == {"event": "done"}
    task = site.task("train", recipe=recipe, model=init / UPDATE)
    first = site.write("first", task)
    events = worker.run(first)
    training = [event for event in events if event.get("stage") == "training"]
    assert (training[0]["done"], training[-1]["done"], training[-1]["total"]) == (0, 3, 3)
    assert training[-1]["unit"] == "steps"
    assert training[-1]["metrics"].keys() == {"loss", "learning_rate", "tokens_per_second"}
    evaluation = site.write("evaluation", site.task("evaluate", recipe=recipe, model=first / UPDATE))
    assert worker.run(evaluation)[-1] == {"event": "done"}

    # A wrong row fails its task only, and what the row holds stays here.
    path = site.directory / "wrong.jsonl"
    path.write_text('{"text": "secret cough", "label": "jane doe"}\n')
    wrong = replace(task, data_set={**(task.data_set or {}), "path": str(path)})
    (failed,) = [event for event in worker.run(site.write("wrong", wrong)) if event["event"] != "progress"]
    assert failed["event"] == "failed"
    assert "row 1" in failed["reason"] and "jane" not in failed["reason"] + failed["hint"]

    # What the site's policy does not allow is declined.
    often = site.recipe(local={"steps": 100, "batch_size": 8})
    (declined,) = worker.run(site.write("often", replace(task, spec=often, max_epochs=2)))[-1:]
    assert declined["declined"] and "more than max_epochs = 2" in declined["reason"]

    second = site.write("second", task)
    assert worker.run(second)[-1] == {"event": "done"}
    status, rest, log = worker.close()
    assert (status, rest) == (0, "")
    assert "secret" not in log and "jane" not in log
    (result,) = {read_result(directory).metrics["loss"] for directory in (first, second)}  # type: ignore[union-attr]
    cold, cold_result = site.run("cold", task, warm=Warm())
    assert cold_result.metrics["loss"] == result
    assert (first / UPDATE).read_bytes() == (second / UPDATE).read_bytes() == (cold / UPDATE).read_bytes()


def test_a_cancelled_task_stops_at_the_next_step_and_the_worker_goes_on(site: Site, worker: Worker) -> None:
    recipe = site.recipe()
    init = site.write("init", site.task("init", recipe=recipe))
    worker.run(init)
    # Comes when nothing is to be cancelled any more, and must not hit the next task.
    worker.send(cancel=True)
    endless = site.recipe(local={"steps": 10_000_000, "batch_size": 8})
    long = site.write("long", site.task("train", recipe=endless, model=init / UPDATE))
    worker.send(run=str(long))
    events = []
    for event in worker.events():
        events.append(event)
        if event.get("done") == 1:
            worker.send(cancel=True)
    assert events[-1] == {"event": "cancelled"}
    assert not (long / UPDATE).exists() and read_result(long) is None
    short = site.write("short", site.task("train", recipe=recipe, model=init / UPDATE))
    assert worker.run(short)[-1] == {"event": "done"}
    # The end of input ends the process, also in mid-task.
    worker.send(run=str(site.write("again", site.task("train", recipe=endless, model=init / UPDATE))))
    assert worker.close()[0] == 0


def test_a_paused_training_answers_and_goes_on_when_it_is_run_again(site: Site, worker: Worker) -> None:
    recipe = site.recipe()
    init = site.write("init", site.task("init", recipe=recipe))
    worker.run(init)
    endless = site.recipe(local={"steps": 10_000_000, "batch_size": 8})
    long = site.write("long", site.task("train", recipe=endless, model=init / UPDATE))
    reached = 0
    for _ in range(2):
        worker.send(run=str(long))
        steps = []
        for event in worker.events():
            if event.get("stage") == "training":
                steps.append(event["done"])
                worker.send(pause=True)
        assert event == {"event": "paused"}
        assert steps[0] == reached < checkpoint_step(long)
        reached = checkpoint_step(long)


def test_a_full_disk_costs_no_training_and_ends_on_command(site: Site, worker: Worker) -> None:
    recipe = site.recipe()
    init = site.write("init", site.task("init", recipe=recipe))
    worker.run(init)
    task = site.task("train", recipe=recipe, model=init / UPDATE)
    calm = site.write("calm", task)
    assert worker.run(calm)[-1] == {"event": "done"}
    ends = {"room": "done", "pause": "paused", "cancel": "cancelled"}
    for name, file in (
        ("room", "update.new"),
        ("room", "result.json.new"),
        ("pause", "update.new"),
        ("cancel", "update.new"),
    ):
        directory = site.write(f"{name}-{file}", task)
        # Whatever is written there meets "No space left on device".
        obstacle = directory / file
        obstacle.symlink_to("/dev/full")
        worker.send(run=str(directory))
        stages, done = [], []
        for event in worker.events():
            stages.append(event.get("stage"))
            if event.get("stage") == "training":
                done.append(event["done"])
            if stages.count("waiting_for_disk") == 2 and event["event"] == "progress":
                # The second time, so that it has been tried again meanwhile.
                obstacle.unlink() if name == "room" else worker.send(**{name: True})
        assert event == {"event": ends[name]}
        assert done.count(0) == done.count(3) == 1, "trained once"
        if name == "room":
            assert (directory / UPDATE).read_bytes() == (calm / UPDATE).read_bytes()


def test_a_killed_trainer_goes_on_from_its_checkpoint_with_the_same_bits(site: Site, worker: Worker) -> None:
    recipe = site.recipe(local={"steps": 60, "batch_size": 8, "checkpoint_seconds": 1e-6})
    init = site.write("init", site.task("init", recipe=recipe))
    worker.run(init)
    task = site.task("train", recipe=recipe, model=init / UPDATE)
    rough = site.write("rough", task)
    worker.send(run=str(rough))
    # In short turns, so that it cannot have finished before it is looked at.
    while not checkpoint_step(rough):
        worker.process.send_signal(signal.SIGCONT)
        time.sleep(0.02)
        worker.process.send_signal(signal.SIGSTOP)
    worker.process.kill()
    assert read_result(rough) is None
    saved = checkpoint_step(rough)
    second = Worker()
    try:
        events = second.run(rough)
    finally:
        second.close()
    assert events[-1] == {"event": "done"}
    assert next(event["done"] for event in events if event.get("stage") == "training") == saved > 0
    calm, _ = site.run("calm", task, warm=Warm())
    assert (rough / UPDATE).read_bytes() == (calm / UPDATE).read_bytes()


def test_an_unexpected_error_names_only_its_kind(site: Site, worker: Worker) -> None:
    directory = site.directory / "damaged"
    directory.mkdir()
    (directory / "spec.json").write_text('{"patient": "jane doe"}')
    (failed,) = worker.run(directory)
    assert failed["reason"] == "The trainer met an unexpected TypeError."
    (gone,) = worker.run(site.directory / "absent")
    assert gone["reason"] == "The trainer could not use its disk: No such file or directory."
