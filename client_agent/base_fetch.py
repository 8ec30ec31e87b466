"""A base model that this site lacks, fetched from the coordinator: once, for all jobs, and checked before it counts.

The files arrive one after the other in a directory that is named after the model's digest; a file that is there is
whole, because it was checked before it was put there. The name is registered when all of them are.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

from client_agent.models import Models
from client_agent.taskdir import sync_directory
from protos.digests import base_model_digest, check_digest
from protos.errors import InvalidInput, NotFound
from protos.jobspec import JobSpec
from protos.model_files import check_base_file
from protos.v1 import agent_pb2
from protos.v1.manifest_pb2 import BlobRef


def digest_for(task: agent_pb2.Task, *, name: str, models: Models, may_fetch: bool) -> str:
    """The digest of this site's base model of this name, or else of the one that the task offers, if it may be fetched.

    NotFound: there is neither. InvalidInput: the model here is not usable, or the offer is none.
    """
    try:
        return models.current(name).digest
    except NotFound:
        if not task.base_files or not may_fetch:
            raise
    return _offered_digest(task)


def _offered_digest(task: agent_pb2.Task) -> str:
    return base_model_digest(
        (check_base_file(file.name), file.blob.size, check_digest(file.blob.digest)) for file in task.base_files
    )


async def fetch_missing(
    task: agent_pb2.Task,
    spec: JobSpec,
    *,
    models: Models,
    directory: Path,
    download: Callable[[BlobRef], Awaitable[Path]],
) -> None:
    """Registers the job's base model where this site has none of that name; asked only where it may be fetched.

    `download` gives a verified file, which is moved from where it lies into `directory`. InvalidInput: what lies there
    in the end is no usable model, or another one.
    """
    if spec.base_model is None or spec.base_model.name in {model.name for model in models.all()}:
        return
    name, digest = spec.base_model.name, _offered_digest(task)
    place = directory / digest
    place.mkdir(parents=True, exist_ok=True)
    for file in task.base_files:
        target = place / check_base_file(file.name)
        if not target.exists():
            (await download(file.blob)).rename(target)
            sync_directory(place)
    try:
        await asyncio.to_thread(models.add, name, place, digest=digest)
    except InvalidInput:
        # Damaged here since it was fetched: the next task fetches it anew.
        await asyncio.to_thread(shutil.rmtree, place, ignore_errors=True)
        raise
