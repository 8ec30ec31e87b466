"""The task directories of this site, and what each has reached: what a killed agent goes on from.

One directory for each (job, round, kind), for an evaluation also (version, split). A grant of the same work adopts what
lies there: a finished result goes straight to upload, whatever the grant's generation. The directory is removed after
the coordinator's committed answer, not before, so a result is offered again until it has one.
"""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from client_agent.hashing import hash_file
from client_agent.taskdir import (
    FILES,
    RESULT,
    UPDATE,
    TaskResult,
    read_json,
    read_result,
    remove_checkpoint,
    sync_directory,
    write_json,
)
from protos.errors import InvalidInput
from protos.identity import check_job_id
from protos.v1 import agent_pb2

JOURNAL = "journal.json"
# Directories of work that nobody has asked for again: it may have ended elsewhere (a closed round, a cancelled job), or
# be asked for when the coordinator is back. What is finished is kept for longer, for nothing tells the agent that it is
# not wanted any more. The newest are kept by the order in which they were granted: no clock decides.
KEPT_UNFINISHED = 4
KEPT_FINISHED = 32
MAX_NAME_CHARACTERS = 200
SPLITS = ("", "validation", "test")

KIND_NAMES = {
    agent_pb2.TASK_KIND_INIT: "init",
    agent_pb2.TASK_KIND_TRAIN: "train",
    agent_pb2.TASK_KIND_EVALUATE: "evaluate",
    agent_pb2.TASK_KIND_DISTILL: "distill",
}
UNKNOWN_KIND = "unknown"  # of a newer coordinator


@dataclass(frozen=True)
class Work:
    """What a task asks for, apart from who may do it when: two grants with the same Work are the same work."""

    job_id: str
    round: int
    kind: str
    spec_hash: str
    base_digest: str
    version: int
    model_digest: str
    seed: int
    split: str

    @property
    def directory_name(self) -> str:
        """One plain file name whatever the coordinator wrote: what this names is written, read and deleted."""
        name = f"{self.job_id}-{self.round}-{self.kind}"
        if self.kind == "evaluate":
            name += f"-{self.version}-{self.split}"
        return re.sub(r"[^a-z0-9-]", "_", name)[:MAX_NAME_CHARACTERS]


def check_work(work: Work) -> None:
    """InvalidInput when the task names its job or its split in a way that no sound coordinator does."""
    check_job_id(work.job_id)
    if work.split not in SPLITS:
        raise InvalidInput(f"{work.split[:80]!r} is not a split of a data set.")


def work_of(task: agent_pb2.Task) -> Work:
    return Work(
        job_id=task.job_id,
        round=task.round,
        kind=KIND_NAMES.get(task.kind, UNKNOWN_KIND),
        spec_hash=task.spec_hash,
        base_digest=task.base_digest,
        version=task.version,
        model_digest=task.model.digest,
        seed=task.seed,
        split=task.split,
    )


@dataclass(frozen=True)
class Blob:
    """A file of the result: its name in the task directory, its size and digest."""

    file: str
    size: int
    digest: str


@dataclass(frozen=True)
class Entry:
    """`blobs` is None until the result is sealed; of an evaluation it is then empty."""

    work: Work
    generation: int = 0
    stage: str = "granted"  # granted -> running -> finished
    blobs: tuple[Blob, ...] | None = None
    # INIT: the base model that version 0 was built from; the grant itself may not name one.
    base_digest: str = ""
    # Counts up with each grant at this site.
    number: int = 0

    def update_facts(self) -> dict[str, Any]:
        """Digest and size of the update, as the log names it."""
        update = next((blob for blob in self.blobs or () if blob.file == UPDATE), None)
        return {"digest": update.digest if update else "", "bytes": update.size if update else 0}


class Journal:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # What is being opened is not pruned at the same moment.
        self._opening = threading.Lock()

    def path(self, work: Work) -> Path:
        return self._directory / work.directory_name

    def open(self, work: Work, *, generation: int) -> Entry:
        """The entry for this work: what an earlier grant of it left, else a new one in an empty directory."""
        path = self.path(work)
        with self._opening:
            number = 1 + max((other.number for other in self._entries().values() if other), default=0)
            entry = _read(path)
            if entry is None or entry.work != work:
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir(parents=True)
                sync_directory(self._directory)
                entry = Entry(work)
            return self.record(replace(entry, generation=generation, number=number))

    def record(self, entry: Entry) -> Entry:
        """On disk when this returns."""
        write_json(self.path(entry.work) / JOURNAL, asdict(entry))
        return entry

    def _seal(self, entry: Entry) -> Entry:
        """Names the trainer's output by digest; INIT's tensors come first. Blocks for as long as reading takes."""
        path = self.path(entry.work)
        files = [path / UPDATE] if (path / UPDATE).exists() else []
        files += sorted(file for file in (path / FILES).glob("*") if file.is_file())
        blobs = tuple(
            Blob(str(file.relative_to(path)), file.stat().st_size, hash_file(file).hexdigest()) for file in files
        )
        return replace(entry, stage="finished", blobs=blobs)

    def adopt(self, entry: Entry) -> tuple[Entry, TaskResult] | None:
        """The finished result of an earlier grant or of the trainer that just ended; None when there is no sound one.

        Blocks while it reads the files: what was sealed before is read again, because a disk may have lost it since.
        """
        path = self.path(entry.work)
        result = read_result(path)
        if result is None:
            return None
        sealed = self._seal(entry)
        if entry.blobs is not None and entry.blobs != sealed.blobs:
            return None
        self.record(sealed)
        remove_checkpoint(path)
        return sealed, result

    def restart(self, entry: Entry) -> Entry:
        """Before the trainer runs: nothing of an unfinished or damaged result may be taken for a finished one."""
        (self.path(entry.work) / RESULT).unlink(missing_ok=True)
        return self.record(replace(entry, stage="running", blobs=None))

    def remove(self, work: Work) -> None:
        shutil.rmtree(self.path(work), ignore_errors=True)

    def prune(self, *, held: Iterable[Work], seen: Work) -> None:
        """Removes the directories of work that is not in hand, and that nobody will or may want again.

        `seen` is the work that was in hand until now: a job that trains a round is done with the rounds before.
        """
        in_hand = {work.directory_name for work in held}
        room = {True: KEPT_FINISHED, False: KEPT_UNFINISHED}
        with self._opening:
            found = sorted(self._entries().items(), key=lambda item: item[1].number if item[1] else 0, reverse=True)
            for path, entry in found:
                if path.name in in_hand:
                    continue
                finished = (path / RESULT).exists()
                if entry is None or _is_past(entry.work, seen=seen) or not room[finished]:
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    room[finished] -= 1

    def _entries(self) -> dict[Path, Entry | None]:
        """By directory; None where there is none that can be understood. What cannot be read now is left out."""
        found: dict[Path, Entry | None] = {}
        for path in self._directory.glob("*"):
            with suppress(OSError):
                found[path] = _read(path)
        return found


def _is_past(work: Work, *, seen: Work) -> bool:
    """Whether the job has gone on to a later round than that of this update."""
    return work.job_id == seen.job_id and "evaluate" not in (work.kind, seen.kind) and work.round < seen.round


def _read(path: Path) -> Entry | None:
    """None when there is none, or none that can be understood: then the work begins anew."""
    try:
        fields = dict(read_json(path / JOURNAL))
        work = Work(**fields.pop("work"))
        blobs = fields.pop("blobs")
        return Entry(work=work, blobs=None if blobs is None else tuple(Blob(**blob) for blob in blobs), **fields)
    except (TypeError, ValueError, KeyError):
        return None
