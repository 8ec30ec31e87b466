"""A committed version as a directory that the Hugging Face libraries open, in a process that has no silotune.

Full method: the federated tensors, joined with those that were frozen, in model.safetensors. LoRA: the version is
adapter_model.safetensors as it stands, or made into a plain adapter (adapter_export.py). But for that, the bytes pass
through: no tensor is held in memory and no torch is needed.

Everything is put together in a hidden folder inside the target, so that an interrupted export goes on where it stopped
and the target never shows half a model.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from coordinator import model_card
from coordinator.adapter_export import is_plain, write_plain_adapter
from coordinator.client import OperatorClient
from protos import jobspec, tensors
from protos.adapters import CONTROL
from protos.digests import new_hasher
from protos.errors import AlreadyExists, CorruptData, OutOfSpace, SilotuneError
from protos.jobspec import JobSpec, Lora, Synthetic
from protos.model_files import ADAPTER_CONFIG, ADAPTER_TENSORS, EXPORT_MANIFEST, FROZEN, FULL_TENSORS, check_file_name
from protos.v1 import manifest_pb2, operator_pb2

STAGING = ".silotune-export"
COPY_BYTES = 8 << 20
# A download is given up after so many attempts in a row without a byte; the pauses add up to about half a minute.
ATTEMPTS = 7


@dataclass(frozen=True)
class Exported:
    facts: dict[str, Any]
    sentence: str
    usage: str


def export(
    client: OperatorClient, *, job: str, version: int | None, directory: Path, force: bool, show_progress: bool
) -> Exported:
    """Writes `version`, by default the best, else the latest, into `directory`.

    AlreadyExists: the directory holds something else, or an earlier export and not `force`. NotFound: no such job or
    version. CorruptData, Unavailable: what was loaded so far is kept for the next attempt. OutOfSpace.
    """
    model: operator_pb2.GetModelResponse = client.ask(
        "GetModel", operator_pb2.GetModelRequest(job=job, version=version)
    )
    spec = jobspec.from_json(model.spec_json)
    blobs = _blobs(model, spec=spec)
    earlier = _claim(directory, force=force)
    staging = directory / STAGING
    ready = staging / "ready"
    shutil.rmtree(ready, ignore_errors=True)
    ready.mkdir(parents=True)
    _check_space(blobs, directory=staging, spec=spec)
    _download_all(client, blobs, directory=staging, show_progress=show_progress)
    _assemble(blobs, spec=spec, staging=staging, ready=ready)
    files = {path.name: {"size": path.stat().st_size, "digest": _digest(path)} for path in sorted(ready.iterdir())}
    if not isinstance(spec.task, Synthetic):
        (ready / "README.md").write_text(model_card.card(model, spec=spec, files=files), encoding="utf-8")
    manifest = {
        "schema_version": "1",
        "job": model.job_id,
        "version": model.version,
        "version_digest": model.model.digest,
        "base_digest": model.base_digest,
        "files": files,
    }
    _publish(ready, directory=directory, manifest=manifest, earlier=earlier)
    return Exported(
        facts={**manifest, "directory": str(directory)},
        sentence=f"Version {model.version} of {spec.name} is in {directory}.",
        usage=model_card.usage(spec, directory=str(directory)),
    )


def _blobs(model: operator_pb2.GetModelResponse, *, spec: JobSpec) -> dict[str, manifest_pb2.BlobRef]:
    """What to load, by the name under which it is needed; the version itself comes under the name of its kind."""
    found = {_tensor_file(spec): model.model}
    for file in model.files:
        # The coordinator refused such a name before; what lands on this machine does not rest on that.
        found[check_file_name(file.name)] = file.blob
    return found


def _tensor_file(spec: JobSpec) -> str:
    return ADAPTER_TENSORS if isinstance(spec.method, Lora) else FULL_TENSORS


def _claim(directory: Path, *, force: bool) -> list[str]:
    """Makes sure that the directory is ours to write; the names that an earlier export left there."""
    directory.mkdir(parents=True, exist_ok=True)
    present = {path.name for path in directory.iterdir()}
    manifest = directory / EXPORT_MANIFEST
    if EXPORT_MANIFEST in present:
        earlier = json.loads(manifest.read_text())
        if not force and STAGING not in present:
            raise AlreadyExists(
                f"{directory} holds version {earlier['version']} of job {earlier['job']}.",
                hint="Name another directory, or replace it with --force.",
            )
        return [*earlier["files"], "README.md"]
    if present - {STAGING}:
        raise AlreadyExists(f"{directory} is not empty and not an earlier export.", hint="Name another directory.")
    return []


def _check_space(blobs: dict[str, manifest_pb2.BlobRef], *, directory: Path, spec: JobSpec) -> None:
    missing = 0
    for blob in blobs.values():
        part = directory / blob.digest
        missing += blob.size - (part.stat().st_size if part.exists() else 0)
    if not is_plain(spec):
        missing += blobs[ADAPTER_TENSORS].size
    if _is_rewritten(blobs, spec=spec):
        # The joined file lies beside its parts until they are deleted.
        missing += sum(blob.size for blob in blobs.values())
    free = shutil.disk_usage(directory).free
    if missing > free:
        raise OutOfSpace(f"{directory.parent} needs {missing} bytes for this export; {free} are free.")


def _download_all(
    client: OperatorClient, blobs: dict[str, manifest_pb2.BlobRef], *, directory: Path, show_progress: bool
) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show_progress) as progress:
        for name, blob in blobs.items():
            bar = progress.add_task(name, total=blob.size)
            _download(client, blob, path=directory / blob.digest, progress=progress, bar=bar)


def _download(
    client: OperatorClient, blob: manifest_pb2.BlobRef, *, path: Path, progress: Progress, bar: TaskID
) -> None:
    """Loads what is missing of `path`, through lost connections, and checks the whole."""
    failures = 0
    with path.open("ab") as file:
        while file.tell() < blob.size:
            before = file.tell()
            progress.update(bar, completed=before)
            try:
                _continue(client, blob, file=file, progress=progress, bar=bar)
            except SilotuneError as error:
                failures = 0 if file.tell() > before else failures + 1
                if not error.retryable or failures == ATTEMPTS:
                    raise
                time.sleep(0.25 * 2**failures)
    progress.update(bar, completed=blob.size)
    if path.stat().st_size != blob.size or _digest(path) != blob.digest:
        path.unlink()
        raise CorruptData(
            f"Blob {blob.digest} does not match its digest after it was loaded.", hint="Run the command again."
        )


def _continue(
    client: OperatorClient, blob: manifest_pb2.BlobRef, *, file: BinaryIO, progress: Progress, bar: TaskID
) -> None:
    for frame in client.read(blob.digest, offset=file.tell()):
        if frame.offset != file.tell() or frame.offset + len(frame.data) > blob.size:
            raise CorruptData(f"Blob {blob.digest}: bytes for {file.tell()} came as {frame.offset}.")
        file.write(frame.data)
        progress.update(bar, completed=file.tell())
    if file.tell() < blob.size:
        raise CorruptData(f"Blob {blob.digest} ended at byte {file.tell()} of {blob.size}.")


def _assemble(blobs: dict[str, manifest_pb2.BlobRef], *, spec: JobSpec, staging: Path, ready: Path) -> None:
    """The model directory in `ready`; the loaded blobs are moved, not copied, where they are wanted as they are."""
    parts = dict(blobs)
    if _is_rewritten(parts, spec=spec):
        tensor_file = _tensor_file(spec)
        sources = [staging / parts.pop(name).digest for name in (tensor_file, FROZEN) if name in parts]
        join(sources, target=ready / tensor_file, leave_out=CONTROL if spec.aggregation.rule == "scaffold" else None)
    version = None if is_plain(spec) else staging / parts.pop(ADAPTER_TENSORS).digest
    by_digest: dict[str, Path] = {}
    for name, blob in parts.items():
        # Two files may have the same bytes.
        source = by_digest.setdefault(blob.digest, staging / blob.digest)
        if source.parent == staging:
            by_digest[blob.digest] = source.rename(ready / name)
        else:
            shutil.copyfile(source, ready / name)
    if version is not None:
        assert isinstance(spec.method, Lora)
        config = ready / ADAPTER_CONFIG
        write_plain_adapter(version, config=config, method=spec.method, target=ready / ADAPTER_TENSORS)


def _is_rewritten(blobs: Collection[str], *, spec: JobSpec) -> bool:
    """Whether the exported tensors are not the version's: frozen ones come to them, or the controls go."""
    return FROZEN in blobs or spec.aggregation.rule == "scaffold"


def join(sources: Sequence[Path], *, target: Path, leave_out: str | None = None) -> None:
    """One safetensors file with the tensors of all `sources`, of any dtype, sorted by name.

    But for those whose names begin with `leave_out`.

    CorruptData: two tensors have the same name, or a header is not one or does not describe its file.
    """
    where: dict[str, tuple[Path, int, int]] = {}
    header: dict[str, Any] = {}
    for path in sources:
        entries, data_start = _entries(path)
        for name, entry in entries.items():
            if leave_out and name.startswith(leave_out):
                continue
            if name in where:
                raise CorruptData(f"Tensor {name!r} is both federated and frozen.")
            begin, end = entry["data_offsets"]
            where[name] = (path, data_start + begin, end - begin)
            header[name] = entry
    end = 0
    for name in sorted(header):
        begin, end = end, end + where[name][2]
        header[name] = {**header[name], "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(where):
            path, start, length = where[name]
            with path.open("rb") as file:
                file.seek(start)
                _copy(file, out, length=length)


def _entries(path: Path) -> tuple[dict[str, Any], int]:
    """The table of contents, and where the data begins. Integer buffers are allowed here: they do not travel again."""
    with path.open("rb") as file:
        data_start = tensors.header_length(file.read(8))
        try:
            entries = json.loads(file.read(data_start - 8))
            entries.pop("__metadata__", None)
            spans = sorted((begin, end) for begin, end in (entry["data_offsets"] for entry in entries.values()))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CorruptData(f"The header of tensor file {path.name} is not a table of tensors.") from error
    # A site made the frozen tensors. Without holes and overlaps the joined file is no larger than its parts.
    position = 0
    for begin, end in spans:
        if type(begin) is not int or type(end) is not int or begin != position or end < begin:
            raise CorruptData(f"Tensor file {path.name} has a tensor at bytes {begin} to {end}, after byte {position}.")
        position = end
    if data_start + position != path.stat().st_size:
        raise CorruptData(f"Tensor file {path.name} is not as long as its header says.")
    return entries, data_start


def _copy(source: BinaryIO, target: BinaryIO, *, length: int) -> None:
    while length:
        piece = source.read(min(COPY_BYTES, length))
        if not piece:
            raise CorruptData(f"A tensor file ended {length} bytes before its last tensor.")
        target.write(piece)
        length -= len(piece)


def _publish(ready: Path, *, directory: Path, manifest: dict[str, Any], earlier: Sequence[str]) -> None:
    # First the manifest: from here on the directory counts as an export, also when this is cut off half way.
    (directory / EXPORT_MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for name in earlier:
        (directory / name).unlink(missing_ok=True)
    for path in sorted(ready.iterdir()):
        path.rename(directory / path.name)
    shutil.rmtree(ready.parent)


def _digest(path: Path) -> str:
    return new_hasher().update_mmap(path).hexdigest()
