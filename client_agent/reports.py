"""What is reported of a task. Only closed lists of numbers, names of files of a model, and sentences without paths."""

from __future__ import annotations

import math
from collections.abc import Mapping

from client_agent.grant import Grant
from client_agent.home import Home
from client_agent.journal import Entry
from client_agent.settings import SiteSettings
from client_agent.taskdir import FILES, UPDATE, TaskResult
from protos.encodings import block_of
from protos.errors import SilotuneError
from protos.jobspec import JobSpec
from protos.metrics import METRICS, STAGE_SECONDS
from protos.v1 import agent_pb2
from protos.v1.manifest_pb2 import FORM_DELTA, FORM_VALUES, BlobRef, FileRef, Manifest

Outcome = agent_pb2.Succeeded | agent_pb2.Failed | agent_pb2.Declined


def succeeded(
    grant: Grant, spec: JobSpec, entry: Entry, result: TaskResult, *, seconds: Mapping[str, float]
) -> agent_pb2.Succeeded:
    """`seconds` are those of the daemon's own stages."""
    blobs = {blob.file: BlobRef(digest=blob.digest, size=blob.size) for blob in entry.blobs or ()}
    outcome = agent_pb2.Succeeded(
        examples=result.examples,
        steps=result.steps,
        metrics=reportable(result.metrics, allowed=METRICS),
        seconds=reportable({**result.seconds, **seconds}, allowed=STAGE_SECONDS),
    )
    if UPDATE in blobs:
        up = spec.encoding.up if grant.work.kind == "train" else "raw"
        outcome.manifest.CopyFrom(
            Manifest(
                blob=blobs[UPDATE],
                encoding=f"ENCODING_{up.upper()}",
                form=FORM_VALUES if up == "raw" else FORM_DELTA,
                base_version=grant.work.version,
                block=block_of(up, spec.encoding.block),
            )
        )
    if grant.work.kind == "init":
        prefix = f"{FILES}/"
        outcome.files.extend(
            FileRef(name=file.removeprefix(prefix), blob=blob)
            for file, blob in blobs.items()
            if file.startswith(prefix)
        )
        outcome.base_digest = entry.base_digest
    return outcome


def failed(error: SilotuneError) -> agent_pb2.Failed:
    return agent_pb2.Failed(reason=error.message, hint=error.hint)


def failed_by_surprise(error: Exception) -> agent_pb2.Failed:
    """Of an error that is none of ours: its text may quote anything, so only its kind leaves the site."""
    # Some errors are an OSError by descent only, a TimeoutError for one; those of a disk have a number.
    if isinstance(error, OSError) and error.errno is not None:
        return agent_pb2.Failed(reason=f"The agent could not use its disk: {error.strerror}.")
    return agent_pb2.Failed(
        reason=f"The agent failed with {type(error).__name__}.", hint="The agent's log at the site has the details."
    )


def reportable(numbers: Mapping[str, float], *, allowed: frozenset[str]) -> dict[str, float]:
    """Only what may leave the site, and only what is a number."""
    return {name: value for name, value in numbers.items() if name in allowed and math.isfinite(value)}


def without_paths(text: str, *, home: Home, settings: SiteSettings) -> str:
    """`text` with this site's paths replaced by what they are: a path may name a patient or a study."""
    directory = home.site_file.parent
    hidden = {str(home.path): "the agent's home"}
    for name, data_set in settings.data.items():
        place = data_set.at(directory)
        for path in (place.path, data_set.path, place.validation, data_set.validation, place.test, data_set.test):
            if isinstance(path, str):
                hidden[path] = f"data set {name!r}"
    for path in sorted(hidden, key=len, reverse=True):
        text = text.replace(path, hidden[path])
    return text
