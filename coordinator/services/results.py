"""Whether what a site hands in with a finished task may count.

Nothing of it is believed: numbers come from a closed list and are finite, blobs were uploaded by this very site under
this digest and size, and tensors are what the round expects.
"""

from __future__ import annotations

from pathlib import Path

from coordinator.aggregation.admission import check_update, read_layout
from coordinator.rounds.state import Task, TaskKind
from coordinator.storage.blobs import BlobStore
from coordinator.storage.garbage import drop_damaged
from coordinator.storage.store import Store
from coordinator.storage.work import Result
from protos.adapters import update_tensors
from protos.digests import check_digest
from protos.encodings import block_of
from protos.errors import Conflict, CorruptData, InvalidInput, UpdateRejected
from protos.jobspec import DRIFT_RULES, BaseModelRef, JobSpec
from protos.metrics import METRICS, STAGE_SECONDS, check_numbers
from protos.model_files import check_file_name
from protos.tensors import Layout, header_length, parse_header
from protos.v1 import agent_pb2, manifest_pb2

MAX_FILES = 64
MAX_COUNT = 10**9


def parse(succeeded: agent_pb2.Succeeded) -> Result:
    """The result as the store keeps it. InvalidInput or UpdateRejected for what is wrong by itself."""
    for name, count in (("examples", succeeded.examples), ("steps", succeeded.steps)):
        if count > MAX_COUNT:
            raise UpdateRejected(f"The report claims {count} {name}; no more than {MAX_COUNT} are believed.")
    if len(succeeded.files) > MAX_FILES:
        raise InvalidInput(f"The result has {len(succeeded.files)} files; {MAX_FILES} at most.")
    names = [file.name for file in succeeded.files]
    for name in names:
        if names.count(check_file_name(name)) > 1:
            raise InvalidInput(f"The file name {name!r} occurs twice.")
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
        _check_kind(succeeded, result, task=task, store=store)
    except InvalidInput as error:
        return str(error)
    wanted = [(result.digest, result.size)] if result.digest else []
    wanted += [(digest, size) for _, digest, size in result.files]
    known = store.uploads.known(task.site, [digest for digest, _ in wanted])
    for digest, size in wanted:
        # Whatever became of a blob that was handed in, the site still has its bytes.
        if digest not in known or blobs.size(digest) is None:
            raise Conflict(f"The blob {digest[:16]} has not been uploaded yet.", hint="Upload it, then report again.")
        if blobs.size(digest) != size:
            return f"The blob {digest[:16]} has another size than the {size} bytes that the report names."
    try:
        if result.digest:
            with blobs.local(result.digest) as path:
                _check_tensors(path, task, store=store, blobs=blobs)
    except UpdateRejected as error:
        return str(error)
    except CorruptData as error:
        drop_damaged(store.database, blobs, result.digest)
        raise Conflict(error.message, hint="Upload it again, then report again.") from error
    return result


def _check_kind(succeeded: agent_pb2.Succeeded, result: Result, *, task: Task, store: Store) -> None:
    if task.kind is TaskKind.EVALUATE:
        if result.digest or result.files:
            raise InvalidInput("An evaluation hands in numbers only.")
        return
    manifest = succeeded.manifest
    if not result.digest:
        raise InvalidInput("The result has no manifest.")
    spec = store.views.job(task.job_id).spec
    up = spec.encoding.up if task.kind is TaskKind.TRAIN else "raw"
    _check_encoding(manifest, encoding=up, block=block_of(up, spec.encoding.block))
    if task.kind is TaskKind.INIT:
        _check_base_model(result, wanted=spec.base_model)
        return
    if task.kind is TaskKind.DISTILL:
        if result.files:
            raise InvalidInput("Only version 0 comes with files.")
        return
    if manifest.base_version != task.version:
        raise UpdateRejected(
            f"The update was trained from version {manifest.base_version}; this round begins at {task.version}."
        )
    if result.examples < 1:
        raise UpdateRejected("The update was trained on no rows, so it has no weight.")
    if result.steps < 1:
        raise UpdateRejected("The update was trained for no step, so it has no weight.")
    _check_steps(result, spec=spec)
    if spec.data is not None:
        _check_examples(result, site=task.site, data_set=spec.data.name, store=store)


def _check_encoding(manifest: manifest_pb2.Manifest, *, encoding: str, block: int) -> None:
    """Only what the recipe says is taken."""
    names, forms = manifest_pb2.Encoding, manifest_pb2.Form
    if manifest.encoding not in names.values() or manifest.form not in forms.values():
        raise UpdateRejected(
            "The update is encoded in a way that this coordinator does not know.", hint="Update the coordinator first."
        )
    form = "values" if encoding == "raw" else "delta"
    told = names.Name(manifest.encoding).removeprefix("ENCODING_").lower()
    told_form = forms.Name(manifest.form).removeprefix("FORM_").lower()
    if (told, told_form, manifest.block) != (encoding, form, block):
        raise UpdateRejected(
            f"The update holds {_way(told, told_form, manifest.block)}; "
            f"this job's updates hold {_way(encoding, form, block)}.",
            hint="An agent that is older than this coordinator has to be updated.",
        )


def _way(encoding: str, form: str, block: int) -> str:
    return f"{encoding} {form}" + (f" in blocks of {block}" if block else "")


def _check_base_model(result: Result, *, wanted: BaseModelRef | None) -> None:
    if wanted is None:
        return
    if not result.base_digest:
        raise InvalidInput("The result does not say which base model version 0 was built from.")
    if wanted.digest and result.base_digest != wanted.digest:
        raise InvalidInput(
            f"Version 0 was built from a base model with the digest {result.base_digest[:12]}; "
            f"the recipe pins {wanted.digest[:12]}."
        )


def _check_steps(result: Result, *, spec: JobSpec) -> None:
    """Where a site's weight, or what its gradient is the mean of, are steps: they follow from the recipe and the rows.

    Rows that are packed make fewer, and so does what has no rows.
    """
    how = spec.aggregation
    if how.rule not in DRIFT_RULES and how.weights != "steps":
        return
    most = spec.local.step_count(result.examples)
    may_be_fewer = spec.local.steps is None and (spec.data is None or getattr(spec.task, "packing", False))
    if result.steps > most or (result.steps < most and not may_be_fewer):
        raise UpdateRejected(f"The report claims {result.steps} steps; {result.examples} examples make {most}.")


def _check_examples(result: Result, *, site: str, data_set: str, store: Store) -> None:
    """A site cannot weigh more than the rows that it told of before the round."""
    row = store.sites.get(site)
    told = row.agent.get("data_sets", []) if row else []
    # Numbers of 64 bits are texts in protobuf's JSON, and 0 is left out: not counted, or nothing that can be read.
    rows = next((int(each.get("rows", 0)) for each in told if each.get("name") == data_set), 0)
    if 0 < rows < result.examples:
        raise UpdateRejected(
            f"The report claims {result.examples} examples; the site's data set {data_set!r} has {rows} rows.",
            hint="If rows were added, the agent tells of them when it asks for work again.",
        )


def _check_tensors(path: Path, task: Task, *, store: Store, blobs: BlobStore) -> None:
    if task.kind is TaskKind.INIT:
        check_update(path, expected=None)
        return
    if task.kind is TaskKind.DISTILL:
        digest, size = store.views.aggregate(task.job_id, round_number=task.round)
    else:
        version = store.views.model(task.job_id, version=task.version)
        digest, size = version.digest, version.size
    spec = store.views.job(task.job_id).spec
    try:
        first = blobs.read(digest, offset=0, length=8)
        header = first + blobs.read(digest, offset=8, length=header_length(first) - 8)
        _check_update(path, task, spec=spec, version=parse_header(header, file_bytes=size))
    except UpdateRejected:
        # Finished training is not thrown away for bytes that nobody compared with the version's digest.
        with blobs.local(digest) as whole:
            _check_update(path, task, spec=spec, version=read_layout(whole))


def _check_update(path: Path, task: Task, *, spec: JobSpec, version: Layout) -> None:
    if task.kind is TaskKind.DISTILL:
        check_update(path, expected=version.named)
        return
    expected = update_tensors(spec, version, round_number=task.round, site=task.site)
    check_update(path, expected=expected, encoding=spec.encoding.up, block=spec.encoding.block)
