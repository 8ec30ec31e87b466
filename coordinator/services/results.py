"""Whether what a site hands in with a finished task may count.

Nothing of it is believed: numbers come from a closed list and are finite, blobs were uploaded by this very site under
this digest and size, and tensors are what the round expects.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from coordinator.aggregation.admission import check_update, read_layout
from coordinator.rounds.state import Task, TaskKind
from coordinator.storage.blobs import BlobStore
from coordinator.storage.store import Store
from coordinator.storage.work import Result
from protos.digests import check_digest
from protos.errors import Conflict, InvalidInput, UpdateRejected
from protos.metrics import METRICS, STAGE_SECONDS, check_numbers
from protos.tensors import Layout
from protos.v1 import agent_pb2, manifest_pb2

MAX_FILES = 64
MAX_COUNT = 10**9
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{0,199}")


def parse(succeeded: agent_pb2.Succeeded) -> Result:
    """The result as the store keeps it. InvalidInput or UpdateRejected for what is wrong by itself."""
    for name, count in (("examples", succeeded.examples), ("steps", succeeded.steps)):
        if count > MAX_COUNT:
            raise UpdateRejected(f"The report claims {count} {name}; no more than {MAX_COUNT} are believed.")
    if len(succeeded.files) > MAX_FILES:
        raise InvalidInput(f"The result has {len(succeeded.files)} files; {MAX_FILES} at most.")
    names = [file.name for file in succeeded.files]
    for name in names:
        if not _FILE_NAME.fullmatch(name) or names.count(name) > 1:
            raise InvalidInput(f"{name[:80]!r} is not a usable file name, or occurs twice.")
    has_blob = succeeded.HasField("manifest")
    return Result(
        digest=check_digest(succeeded.manifest.blob.digest) if has_blob else "",
        size=succeeded.manifest.blob.size if has_blob else 0,
        examples=succeeded.examples,
        steps=succeeded.steps,
        metrics=check_numbers(succeeded.metrics, allowed=METRICS),
        seconds=check_numbers(succeeded.seconds, allowed=STAGE_SECONDS),
        files=tuple((file.name, check_digest(file.blob.digest), file.blob.size) for file in succeeded.files),
        base_digest=check_digest(succeeded.base_digest) if succeeded.base_digest else "",
    )


def check(succeeded: agent_pb2.Succeeded, *, task: Task, store: Store, blobs: BlobStore) -> Result | str:
    """The result, or the sentence why it is rejected. Reads the whole update: call it in a thread.

    Conflict when a blob has not been uploaded: that is no reason to reject, only to upload.
    """
    try:
        result = parse(succeeded)
        _check_kind(succeeded, result, task=task)
    except InvalidInput as error:
        return str(error)
    wanted = [(result.digest, result.size)] if result.digest else []
    wanted += [(digest, size) for _, digest, size in result.files]
    known = store.uploads.known(task.site, [digest for digest, _ in wanted])
    for digest, size in wanted:
        if digest not in known:
            raise Conflict(f"The blob {digest[:16]} has not been uploaded yet.", hint="Upload it, then report again.")
        if blobs.size(digest) != size:
            return f"The blob {digest[:16]} has another size than the {size} bytes that the report names."
    try:
        if result.digest:
            check_update(blobs.path(result.digest), expected=_expected(task, store=store, blobs=blobs))
    except UpdateRejected as error:
        return str(error)
    return result


def _check_kind(succeeded: agent_pb2.Succeeded, result: Result, *, task: Task) -> None:
    if task.kind is TaskKind.EVALUATE:
        if result.digest or result.files:
            raise InvalidInput("An evaluation hands in numbers only.")
        return
    manifest = succeeded.manifest
    if not result.digest:
        raise InvalidInput("The result has no manifest.")
    if manifest.encoding != manifest_pb2.ENCODING_RAW or manifest.form != manifest_pb2.FORM_VALUES:
        raise UpdateRejected(
            "The update is encoded in a way that this coordinator does not know.", hint="Update the coordinator first."
        )
    if task.kind is TaskKind.INIT:
        return
    if manifest.base_version != task.version:
        raise UpdateRejected(
            f"The update was trained from version {manifest.base_version}; this round begins at {task.version}."
        )
    if result.examples < 1:
        raise UpdateRejected("The update was trained on no rows, so it has no weight.")


def _expected(task: Task, *, store: Store, blobs: BlobStore) -> Layout | None:
    if task.kind is TaskKind.INIT:
        return None
    return _layout_of(blobs.path(store.views.model(task.job_id, version=task.version).digest))


@lru_cache(maxsize=4)
def _layout_of(path: Path) -> Layout:
    return read_layout(path)
