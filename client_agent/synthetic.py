"""A trainer without a model: returns the received tensors plus small deterministic noise, after a set time.

It speaks the protocol of client_agent/taskdir.py, so that tests, fault injection and benchmarks go through the real
agent. It walks its files in blocks: a model of any size passes in a few megabytes of memory, at the speed of the disk.

    version 0   TENSORS of the job's payload size; values 0.02 N(0, 1) from the job's seed, one block repeated
    train       x + noise * p, where p is a block of N(0, 1) from the task's seed, repeated; a checkpoint holds the time
                that has passed and the steps that it stands for. While a file hold-<round> lies beside the task's
                directory it has begun and does not go on: so a test catches it on a machine of any speed
    distill     the aggregate + noise * p, like a training. Its teacher only counts its lessons, 1 / `teacher_loss`; of
                members it is checked that the aggregate is their mean
    evaluate    metrics computed from the first values of the model
"""

from __future__ import annotations

import json
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from client_agent.taskdir import (
    FILES,
    ROOM_LOOK_SECONDS,
    UPDATE,
    Checkpoint,
    Paused,
    TaskResult,
    TaskSpec,
    VersionNeeded,
    is_full,
    read_checkpoint,
    read_json,
    read_spec,
    tidy_checkpoints,
    until_written,
    wait_for_room,
    write_checkpoint,
    write_json,
    write_result,
)
from client_agent.training.encoding import is_encoded, version_file, write_update
from protos.encoded_files import Part, Source, TensorFile
from protos.errors import InvalidInput, SilotuneError
from protos.rounding import Values
from protos.tensors import Layout, header_length, make_header, parse_header

BLOCK_VALUES = 1 << 20
PROGRESS_SECONDS = 0.5
HOLD_LOOK_SECONDS = 0.05
VALUE_BYTES = 4
TEACHER = "teacher-{round}.json"


class Cancelled(Exception):
    pass


class Control:
    """Commands from the daemon, read by a thread so that a cancel or the end of input is seen in mid-work."""

    def __init__(self) -> None:
        self._runs: queue.Queue[str | None] = queue.Queue()
        self._cancelled = threading.Event()
        self._pausing = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            command = json.loads(line)
            if "run" in command:
                self._cancelled.clear()
                self._pausing.clear()
                self._runs.put(command["run"])
            elif command.get("cancel"):
                self._cancelled.set()
            elif command.get("pause"):
                self._pausing.set()
        self._cancelled.set()
        self._runs.put(None)

    def runs(self) -> Iterator[Path]:
        while (directory := self._runs.get()) is not None:
            yield Path(directory)

    def check(self) -> None:
        """Cancelled when the daemon asked for it."""
        self.wait(0, pauses=False)

    def wait(self, seconds: float, *, pauses: bool = True) -> None:
        """Cancelled when the daemon asked for it, now or within `seconds`; Paused after them."""
        if self._cancelled.wait(seconds):
            raise Cancelled
        if pauses and self._pausing.is_set():
            raise Paused


def say(event: str, **fields: object) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


def tensor_shapes(payload_bytes: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) like those of a small transformer, float32, together `payload_bytes` to within one row."""
    width = 1024
    while width > 16 and 12 * width * width * VALUE_BYTES > payload_bytes / 6:
        width //= 2
    shapes: list[tuple[str, str, tuple[int, ...]]] = []
    left = payload_bytes // VALUE_BYTES
    layer = [("attention.query", (width, width)), ("attention.key", (width, width)),
             ("attention.value", (width, width)), ("attention.output", (width, width)),
             ("feed_forward.up", (4 * width, width)), ("feed_forward.down", (width, 4 * width))]  # fmt: skip
    layer_values = sum(math.prod(shape) for _, shape in layer)
    for index in range(max(0, left - layer_values) // layer_values):
        shapes += [(f"layers.{index:04}.{name}.weight", "F32", shape) for name, shape in layer]
        left -= layer_values
    shapes.append(("embeddings.weight", "F32", (max(1, left // width), width)))
    return shapes


def init(task: TaskSpec, directory: Path, control: Control) -> TaskResult:
    (directory / FILES).mkdir(exist_ok=True)
    _write_initial(task, directory / UPDATE, control)
    return TaskResult()


def _write_initial(task: TaskSpec, path: Path, control: Control) -> None:
    payload_bytes = int(task.spec["task"]["payload_mb"] * 1e6)
    header, layout = make_header(tensor_shapes(payload_bytes))
    values = 0.02 * np.random.default_rng(task.spec["seed"]).standard_normal(BLOCK_VALUES, dtype=np.float32)
    block = memoryview(values).cast("B")  # type: ignore[arg-type]
    with path.open("wb") as file:
        file.write(header)
        for done in range(0, layout.data_bytes, block.nbytes):
            control.check()
            file.write(block[: layout.data_bytes - done])
            say("progress", stage="loading", done=done, total=layout.data_bytes, unit="bytes", metrics={})
        file.flush()
        os.fsync(file.fileno())


def train(task: TaskSpec, directory: Path, control: Control) -> TaskResult:
    steps = task.spec["local"]["steps"] or 1
    update = directory / UPDATE
    version = _version(task, directory, control)
    wait_for_room(update, size_bytes=version.stat().st_size, waits=lambda: _wait_for_room(control, done=0, steps=steps))
    spent = _pass_time(task, directory, steps=steps, stage="training", control=control)
    began = time.monotonic()
    until_written(
        lambda: _write_update(task, directory, control, version=version),
        waits=lambda: _wait_for_room(control, done=steps, steps=steps),
        partial=update,
    )
    saved = time.monotonic() - began
    loss = 1.0 / task.round
    return TaskResult(
        examples=_examples(task), steps=steps, metrics={"loss": loss}, seconds={"train": spent, "save": saved}
    )


def distill(task: TaskSpec, directory: Path, control: Control) -> TaskResult:
    aggregate = _version(task, directory, control)
    spent = _pass_time(task, directory, steps=1, stage="training", control=control)
    if task.members:
        _check_members(task, aggregate)
    _write_update(task, directory, control, version=aggregate)
    states = Path(task.state_directory)
    states.mkdir(parents=True, exist_ok=True)
    before = read_json(states / TEACHER.format(round=task.counted_round)) or {"lessons": 0}
    lessons = before["lessons"] + 1
    write_json(states / TEACHER.format(round=task.round), {"lessons": lessons})
    return TaskResult(
        examples=_examples(task), steps=1, metrics={"teacher_loss": 1.0 / lessons, "distillation_kept": 1.0},
        seconds={"train": spent},
    )  # fmt: skip


def _check_members(task: TaskSpec, aggregate: Path) -> None:
    total = np.zeros(0)
    for path, weight in [(member["path"], member["weight"]) for member in task.members] + [(aggregate, -1.0)]:
        with open(path, "rb") as source:
            _, layout = _read_layout(source)
            count = min(layout.data_bytes, BLOCK_VALUES * VALUE_BYTES)
            values = weight * np.frombuffer(source.read(count), dtype=np.float32).astype(np.float64)
        total = total + values if total.size else values
    if not np.allclose(total, 0, atol=1e-6):
        raise InvalidInput("The aggregate is not the mean of the updates that came with it.")


def _write_update(task: TaskSpec, directory: Path, control: Control, *, version: Path) -> None:
    pattern = np.random.default_rng(task.seed).standard_normal(BLOCK_VALUES, dtype=np.float32)
    pattern *= np.float32(task.spec["task"]["noise"])
    if task.kind == "train" and is_encoded(task):
        with TensorFile(version) as old:
            write_update(
                task, _noisy(old, pattern, control), tensors=old.layout.named, version=version, directory=directory
            )
        return
    with version.open("rb") as source, (directory / UPDATE).open("wb") as target:
        header, layout = _read_layout(source)
        target.write(header)
        values = np.empty(BLOCK_VALUES, dtype=np.float32)
        block = memoryview(values).cast("B")  # type: ignore[arg-type]
        for count in _blocks(layout):
            control.check()
            source.readinto(block[: count * VALUE_BYTES])
            values[:count] += pattern[:count]
            target.write(block[: count * VALUE_BYTES])
        target.flush()
        os.fsync(target.fileno())


def _noisy(old: TensorFile, pattern: Values, control: Control) -> Source:
    """The values of a raw update: the pattern goes on from tensor to tensor."""
    places = {tensor.name: (tensor.shape, tensor.offset // VALUE_BYTES) for tensor in old.layout.tensors}

    def values(name: str) -> Part:
        shape, place = places[name]
        before = old.leading(name, shape)

        def read(start: int, count: int) -> Values:
            control.check()
            return before(start, count) + pattern[(place + start + np.arange(count)) % BLOCK_VALUES]

        return read

    return values


def _wait_for_room(control: Control, *, done: int, steps: int) -> None:
    say("progress", stage="waiting_for_disk", done=done, total=steps, unit="steps", metrics={})
    control.wait(ROOM_LOOK_SECONDS)


def evaluate(task: TaskSpec, directory: Path, control: Control) -> TaskResult:
    spent = _pass_time(task, directory, steps=1, stage="evaluating", control=control)
    with _version(task, directory, control).open("rb") as source:
        _, layout = _read_layout(source)
        values = np.frombuffer(source.read(min(layout.data_bytes, 4096)), dtype=np.float32).astype(np.float64)
    mean_square = float(np.mean(values**2)) if values.size else 0.0
    metrics = {"accuracy": 1.0 / (1.0 + mean_square), "loss": mean_square}
    return TaskResult(examples=_examples(task), metrics=metrics, seconds={"evaluate": spent})


def _examples(task: TaskSpec) -> int:
    return 100 + task.seed % 100


def _version(task: TaskSpec, directory: Path, control: Control) -> Path:
    if task.model_path is None and not task.model_digest:
        raise InvalidInput(f"A synthetic {task.kind} task needs a model to start from.")
    return version_file(task, directory=directory, make_initial=lambda path: _write_initial(task, path, control))


def _read_layout(source: Any) -> tuple[bytes, Layout]:
    """The header bytes and the layout; leaves the file at its first value."""
    file_bytes = os.fstat(source.fileno()).st_size
    first = source.read(8)
    header = first + source.read(header_length(first) - 8)
    layout = parse_header(header, file_bytes=file_bytes)
    if any(tensor.dtype != "F32" for tensor in layout.tensors):
        raise InvalidInput("The synthetic trainer knows only float32 tensors.")
    return header, layout


def _blocks(layout: Layout) -> Iterator[int]:
    """Values in each block of the data section."""
    left = layout.data_bytes // VALUE_BYTES
    while left:
        yield min(left, BLOCK_VALUES)
        left -= min(left, BLOCK_VALUES)


def _pass_time(task: TaskSpec, directory: Path, *, steps: int, stage: str, control: Control) -> float:
    """Stands for the work itself: `train_seconds`, with the progress of `steps` equal steps."""
    total_seconds = task.spec["task"]["train_seconds"]
    every_seconds = task.spec["local"].get("checkpoint_seconds") or math.inf
    work = task.work_digest()
    found = read_checkpoint(directory, work=work) if task.kind == "train" else None
    before = saved = found.state["seconds"] if found else 0.0
    done = found.step if found else 0
    hold = directory.parent / f"hold-{task.round}"
    if task.kind in ("train", "distill") and hold.exists():
        say("progress", stage=stage, done=done, total=steps, unit="steps", metrics={})
        while hold.exists():
            control.wait(HOLD_LOOK_SECONDS)
    began = time.monotonic() - before

    def save() -> None:
        nonlocal saved
        saved = time.monotonic() - began
        if task.kind == "train":
            _save(directory, Checkpoint(work, int(steps * saved / total_seconds), {"seconds": saved}))

    while (spent := time.monotonic() - began) < total_seconds:
        say("progress", stage=stage, done=done, total=steps, unit="steps", metrics={})
        try:
            control.wait(min(PROGRESS_SECONDS, total_seconds - spent))
        except Paused:
            save()
            raise
        if time.monotonic() - began - saved >= every_seconds:
            save()
        done = int(steps * (time.monotonic() - began) / total_seconds)
    say("progress", stage=stage, done=steps, total=steps, unit="steps", metrics={})
    return spent - before


def _save(directory: Path, checkpoint: Checkpoint) -> None:
    try:
        write_checkpoint(directory, checkpoint)
    except OSError as error:
        tidy_checkpoints(directory)
        say("warning", sentence=f"A checkpoint could not be saved: {error.strerror}.")


KINDS = {"init": init, "train": train, "distill": distill, "evaluate": evaluate}


def run(directory: Path, control: Control) -> None:
    """One task, from its spec to its result and its closing event."""
    began = time.monotonic()
    try:
        task = read_spec(directory)
        result = KINDS[task.kind](task, directory, control)
        work_seconds = sum(result.seconds.values())
        load_seconds = max(0.0, time.monotonic() - began - work_seconds)
        result = replace(result, seconds={**result.seconds, "load": load_seconds})
        until_written(
            lambda: write_result(directory, result),
            waits=lambda: _wait_for_room(control, done=result.steps, steps=result.steps),
        )
    except VersionNeeded as needed:
        say("failed", reason=str(needed), hint="", needs_version=True)
    except Cancelled:
        say("cancelled")
    except Paused:
        say("paused")
    except SilotuneError as error:
        say("failed", reason=error.message, hint=error.hint)
    except OSError as error:
        reason = f"The trainer could not use its disk: {error.strerror}."
        say("failed", reason=reason, hint="", full_disk=is_full(error))
    else:
        say("done")


def main() -> None:
    control = Control()
    for directory in control.runs():
        run(directory, control)


if __name__ == "__main__":
    main()
