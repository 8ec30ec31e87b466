"""The task directory: where the daemon, which may never touch a GPU, and the trainer, which may never touch the
network, meet.

    spec.json            what to do                                   written by the daemon
    update.safetensors   the trained tensors, or a whole version      written by the trainer
    files/               INIT: config, tokenizer, frozen tensors      written by the trainer
    checkpoint.json      how far an interrupted training came, and the name and digest of its tensors; the newest only
    result.json          numbers; written last and atomically, so its presence means: finished

Control is JSON lines. To the trainer: {"run": "<directory>"}, {"cancel": true}, {"pause": true}; end of input means:
exit. From it: {"event": "progress", "stage", "done", "total", "unit", "metrics"} and {"event": "warning", "sentence"},
then exactly one of {"event": "done"}, {"event": "failed", "reason", "hint", "full_disk", "needs_version", "declined"},
{"event": "cancelled"}, {"event": "paused"}. A training that is paused saves a checkpoint at its next step; the same
directory is run again to go on from there. Other work that is paused has kept nothing and begins anew.

A full disk costs no training: what is trained stays in memory, with progress in the stage "waiting_for_disk", until it
can be written.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from client_agent.hashing import hash_file
from protos.digests import digest_of
from protos.errors import OutOfSpace

SPEC = "spec.json"
UPDATE = "update.safetensors"
FILES = "files"
RESULT = "result.json"
CHECKPOINT = "checkpoint.json"
CHECKPOINT_TENSORS = "checkpoint-{step}.safetensors"
# How often a trainer looks whether there is room again.
ROOM_LOOK_SECONDS = 1.0
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Paused(Exception):
    """Ends a task in the trainer: the daemon wants the device back, and runs the directory again later."""


class TooManyEpochs(Exception):
    """The site declines the training: over its rows it is more epochs than its policy allows."""


class VersionNeeded(Exception):
    """The trainer cannot make the version that the task starts from; the daemon has to fetch it whole."""


@dataclass(frozen=True)
class TaskSpec:
    """Everything a trainer needs; paths are absolute and local."""

    task_id: str
    job_id: str
    round: int
    kind: str  # "init" | "train" | "distill" | "evaluate"
    spec: dict[str, Any]  # the JobSpec as JSON
    seed: int
    split: str  # evaluate: "validation" | "test"
    model_path: str | None  # the version to start from; None for init, and where the trainer makes it from version 0
    base_model_path: str | None  # directory; None for a synthetic task
    base_digest: str
    data_set: dict[str, Any] | None  # settings.DataSet as JSON; None for synthetic, and for init
    device: str  # "cpu" | "cuda:0"
    threads: int
    model_digest: str = ""
    site: str = ""
    # How many trainers work on it together.
    processes: int = 1
    # evaluate: settings.DataSet as JSON of each benchmark of the recipe that this site has and may read
    benchmarks: dict[str, Any] = field(default_factory=dict)
    # What the trainer keeps of this job from task to task; empty: nothing
    state_directory: str = ""
    # The version as the difference from version 0; without it and without `model_path` it is version 0 itself.
    encoded_path: str | None = None
    # train, distill: the latest round in which this site's update counted, or its distillation; 0: none
    counted_round: int = 0
    # train: what the site's policy allows in a round; None: whatever the recipe says
    max_epochs: float | None = None
    # distill: the directory of the teacher's base model; None where the sites' updates are the teacher
    # train: of the mentor's, where there is one
    teacher_model_path: str | None = None
    teacher_digest: str = ""
    # distill without labels: the updates of the round, each {"path": a file of plain tensors, "weight": its share of 1}
    members: list[dict[str, Any]] = field(default_factory=list)
    # distill: settings.DataSet as JSON of what is learnt from; `data_set` is the job's own, where it may be read here
    proxy_data_set: dict[str, Any] | None = None

    def work_digest(self, **more: Any) -> str:
        """Of all that a training follows from, `more` included. The grant, and where the site keeps things, are not."""
        names = ("job_id", "round", "kind", "spec", "seed", "split", "base_digest", "model_digest")
        fields = {name: getattr(self, name) for name in names}
        return digest_of(json.dumps({**fields, **more}, sort_keys=True).encode())


@dataclass(frozen=True)
class Seat:
    """What a trainer that helps another one is told: which one it is (that one is 0), and the file where all meet."""

    rank: int
    meeting: str


@dataclass(frozen=True)
class TaskResult:
    examples: int = 0
    steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)  # names of protos.metrics.METRICS
    seconds: dict[str, float] = field(default_factory=dict)  # names of protos.metrics.STAGE_SECONDS


@dataclass(frozen=True)
class Checkpoint:
    """The state of an interrupted training after `step` steps."""

    work: str  # TaskSpec.work_digest: it belongs to exactly this work
    step: int
    # What is not a tensor, as the trainer needs it.
    state: dict[str, Any] = field(default_factory=dict)
    # The file with the tensors, where there are any.
    file: str = ""
    digest: str = ""


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all, and on disk when this returns: write, fsync, rename, fsync the directory."""
    temporary = path.with_suffix(path.suffix + ".new")
    with temporary.open("w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync_directory(path.parent)


def read_json(path: Path) -> Any:
    """None when there is no such file, or when what lies there is no JSON: a torn file is as good as none."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def sync(path: Path) -> None:
    """What was written to this file, or the names in this directory, are on disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_directory(path: Path) -> None:
    sync(path)


def disk_is_full() -> OutOfSpace:
    return OutOfSpace(
        "The agent's disk is full.", hint="It goes on by itself when there is room in the agent's home directory."
    )


@contextmanager
def full_disk_waits() -> Iterator[None]:
    """Turns the one error of a disk that passes by itself into OutOfSpace, which is waited for."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise disk_is_full() from error


def is_full(error: OSError) -> bool:
    return error.errno in _FULL


def wait_for_room(path: Path, *, size_bytes: int, waits: Callable[[], None]) -> None:
    """Returns when a file of this size has room in the place of `path`. For `waits` see `until_written`."""
    while shutil.disk_usage(path.parent).free + (path.stat().st_size if path.exists() else 0) < size_bytes:
        waits()


def until_written(write: Callable[[], None], *, waits: Callable[[], None], partial: Path | None = None) -> None:
    """`write`, again and again while the disk is full; `partial` is the file that a failed one leaves.

    `waits` says that there is no room and takes a moment; it raises when the task is to end.
    """
    while True:
        try:
            return write()
        except OSError as error:
            if not is_full(error):
                raise
        if partial is not None:
            # What is of no use must not take the room from others meanwhile.
            with suppress(OSError):
                os.truncate(partial, 0)
        waits()


def write_spec(directory: Path, spec: TaskSpec) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / SPEC, asdict(spec))


def read_spec(directory: Path) -> TaskSpec:
    return TaskSpec(**json.loads((directory / SPEC).read_text()))


def write_result(directory: Path, result: TaskResult) -> None:
    """Says that the work is finished: so everything that belongs to it is on disk before."""
    files = [path for path in (directory / UPDATE, *(directory / FILES).glob("*")) if path.is_file()]
    folders = [directory / FILES] if (directory / FILES).is_dir() else []
    for path in (*files, *folders, directory):
        sync(path)
    write_json(directory / RESULT, asdict(result))


def read_result(directory: Path) -> TaskResult | None:
    """None while the work is not finished."""
    fields = read_json(directory / RESULT)
    return TaskResult(**fields) if isinstance(fields, dict) else None


def write_checkpoint(directory: Path, checkpoint: Checkpoint) -> None:
    """Makes it the one that counts. Its tensors, where it has any, lie under `file` and are on disk already."""
    if checkpoint.file:
        checkpoint = replace(checkpoint, digest=hash_file(directory / checkpoint.file).hexdigest())
        sync(directory)
    fields = asdict(checkpoint)
    write_json(directory / CHECKPOINT, {"checkpoint": fields, "digest": _digest(fields)})
    tidy_checkpoints(directory)


def read_checkpoint(directory: Path, *, work: str) -> Checkpoint | None:
    """None when there is none for this work, or none that is whole: what is torn or damaged is not believed."""
    checkpoint = _peek(directory)
    if checkpoint is None or checkpoint.work != work:
        return None
    if checkpoint.file:
        path = directory / Path(checkpoint.file).name
        if not path.exists() or hash_file(path).hexdigest() != checkpoint.digest:
            return None
    return checkpoint


def checkpoint_step(directory: Path) -> int:
    """How far the newest checkpoint came; 0 when there is none. Whether its tensors are whole is not looked at."""
    checkpoint = _peek(directory)
    return checkpoint.step if checkpoint else 0


def tidy_checkpoints(directory: Path) -> None:
    """Removes the tensors of all checkpoints, also of half-written ones, but those of the one that counts."""
    newest = _peek(directory)
    for path in directory.glob("checkpoint-*"):
        if newest is None or path.name != newest.file:
            path.unlink()


def remove_checkpoint(directory: Path) -> None:
    (directory / CHECKPOINT).unlink(missing_ok=True)
    tidy_checkpoints(directory)


def _peek(directory: Path) -> Checkpoint | None:
    found = read_json(directory / CHECKPOINT)
    if not isinstance(found, dict) or found.get("digest") != _digest(found.get("checkpoint")):
        return None
    return Checkpoint(**found["checkpoint"])


def _digest(fields: Any) -> str:
    return digest_of(json.dumps(fields, sort_keys=True).encode())
