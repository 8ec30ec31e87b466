"""The trainer's side of encodings (protos/encodings.py): the version that a task starts from, made from version 0 and
a difference, and the update as a rounded difference from that version. numpy only; both trainers use it.

Nothing here can be added twice: the residual of a round is written from that of an earlier one, which stays as it is
until the coordinator has said that a later one counted (Task.counted_round). So a training that is repeated, or whose
result was never taken, changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from client_agent.hashing import hash_file
from client_agent.taskdir import UPDATE, TaskSpec, VersionNeeded, sync_directory
from protos import jobspec
from protos.adapters import moving
from protos.encoded_files import Part, Source, TensorFile, rebuild, write_encoded
from protos.encodings import Named
from protos.errors import UpdateRejected

INITIAL = "initial.safetensors"
RESIDUAL = "residual-{round}.safetensors"
VERSION = "version.safetensors"


def version_file(task: TaskSpec, *, directory: Path, make_initial: Callable[[Path], None]) -> Path:
    """The version that the task starts from, as a file of plain values: what the daemon fetched, or what is made here.

    `make_initial` writes version 0, just as an INIT task does. VersionNeeded: what comes out is not the version.
    """
    if task.model_path is not None:
        return Path(task.model_path)
    initial = Path(task.state_directory, INITIAL)
    # One that lies here may be damaged; then it is made anew, once.
    for kept in (True, False) if initial.exists() else (False,):
        if not kept:
            initial.parent.mkdir(parents=True, exist_ok=True)
            make_initial(initial)
        path, digest = _version(task, initial=initial, directory=directory)
        if digest == task.model_digest:
            return path
    raise VersionNeeded("Version 0, as this site builds it, is not the job's.")


def _version(task: TaskSpec, *, initial: Path, directory: Path) -> tuple[Path, str]:
    """The file that should be the version, and its digest."""
    if task.encoded_path is None:
        return initial, hash_file(initial).hexdigest()
    path, spec = directory / VERSION, jobspec.parse(task.spec)
    way = spec.encoding
    try:
        with TensorFile(initial) as file:
            moved = moving(spec, file.layout.named)
        digest = rebuild(
            Path(task.encoded_path), base=initial, encoding=way.down, block=way.block, output=path, tensors=moved
        )
    except UpdateRejected:
        # It has other tensors than the job's.
        digest = ""
    return path, digest


def is_encoded(task: TaskSpec) -> bool:
    """Whether updates of this job are encoded."""
    encoding: dict[str, Any] = task.spec.get("encoding") or {}
    return encoding.get("up", "raw") != "raw"


def source_of(tensors: Mapping[str, Any]) -> Source:
    """Of torch's float32 tensors, one at a time in the CPU's memory."""

    def values(name: str) -> Part:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1).numpy()
        return lambda start, count: flat[start : start + count]

    return values


def write_update(task: TaskSpec, values: Source, *, tensors: Sequence[Named], version: Path, directory: Path) -> None:
    """Writes the update of an encoded job, and its residual; both are on disk then.

    `tensors` are what this site trains in this round, and `values` what they are now. UpdateRejected: not finite.
    """
    spec, state = jobspec.parse(task.spec), Path(task.state_directory)
    encoding, before, residual = spec.encoding, None, None
    if encoding.error_feedback:
        state.mkdir(parents=True, exist_ok=True)
        counted, residual = (state / RESIDUAL.format(round=number) for number in (task.counted_round, task.round))
        # Without it, because the home was lost, the next update is as if it were the first.
        before = counted if counted.exists() else None
    write_encoded(
        values,
        tensors=tensors,
        base=version,
        encoding=encoding.up,
        block=encoding.block,
        seed=task.seed,
        output=directory / UPDATE,
        before=before,
        residual=residual,
        energy=encoding.energy(round_number=task.round, rounds=spec.rounds),
    )
    if residual is not None:
        sync_directory(state)
        for path in state.glob(RESIDUAL.format(round="*")):
            if path not in (before, residual):
                path.unlink()
