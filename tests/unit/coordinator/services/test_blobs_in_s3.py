"""A whole coordinator whose blobs are in S3."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from coordinator.rounds.state import JobState
from coordinator.settings import Storage
from protos.digests import digest_of
from protos.errors import Conflict
from protos.v1 import agent_pb2
from tests.servers.s3 import S3Server, s3
from tests.unit.coordinator.services.conftest import manifest, tensor_file

MODEL, UPDATE = tensor_file(fill=0.5), tensor_file(fill=0.25)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3(tmp_path_factory.mktemp("s3")) as started, pytest.MonkeyPatch.context() as patch:
        for name, value in started.environment.items():
            patch.setenv(name, value)
        yield started


async def test_a_round_commits_and_an_update_that_s3_damaged_is_asked_for_again(
    start: Callable[..., Any], server: S3Server
):
    bucket = server.bucket("silotune-rounds")
    storage = Storage(blobs=f"s3://{bucket}/rounds", s3_endpoint_url=server.url, reserve_bytes=0)
    federation = await start(storage=storage)
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=MODEL)
    assert await site.read(digest_of(MODEL)) == MODEL
    blob = await site.upload(task, UPDATE)
    key = f"rounds/blobs/{blob.digest[:2]}/{blob.digest}"
    server.client().put_object(Bucket=bucket, Key=key, Body=UPDATE[:-1] + b"!")
    # As another replica sees it.
    shutil.rmtree(federation.directory / "cache" / "blobs" / blob.digest[:2])
    with pytest.raises(Conflict, match="is damaged in s3://"):
        await site.finish(task, manifest=manifest(blob), examples=1)
    assert await site.upload(task, UPDATE) == blob
    done = await site.finish(task, manifest=manifest(blob), examples=1)
    assert done.fate == agent_pb2.FATE_ACCEPTED, done.reason
    while not (job := federation.store.views.jobs()[0]).state.ended:
        await asyncio.sleep(0.05)
    assert job.state is JobState.COMPLETED
    # One site and no server optimizer: version 1 is its update to the bit.
    assert await federation.operator().read(blob.digest) == UPDATE
