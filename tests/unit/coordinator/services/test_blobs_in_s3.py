"""A whole coordinator whose blobs are in S3."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.rounds import machine
from coordinator.rounds.state import JobState
from coordinator.settings import Storage
from coordinator.storage.bucket import Bucket
from protos.digests import digest_of
from protos.errors import Conflict, Unavailable
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


def rot(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


async def test_one_wrong_answer_of_s3_or_a_rotten_copy_is_served_to_nobody_for_good(
    start: Callable[..., Any], server: S3Server, monkeypatch: pytest.MonkeyPatch
):
    storage = Storage(blobs=f"s3://{server.bucket('silotune-wrong')}", s3_endpoint_url=server.url, reserve_bytes=0)
    federation = await start(storage=storage)
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=MODEL)
    copy = federation.directory / "cache" / "blobs" / task.model.digest[:2] / task.model.digest
    copy.unlink()
    download = Bucket.download

    def wrong_once(bucket: Bucket, key: str, path: Path) -> None:
        monkeypatch.setattr(Bucket, "download", download)
        download(bucket, key, path)
        rot(path)

    monkeypatch.setattr(Bucket, "download", wrong_once)
    with pytest.raises(Unavailable, match="is damaged in s3://"):
        await site.read(task.model.digest)
    operator = federation.operator()
    # Has the copy made; no frame is made of it yet.
    assert await operator.read(task.model.digest, offset=len(MODEL)) == b""
    rot(copy)
    assert await site.read(task.model.digest) != MODEL
    # The site finds the wrong digest and begins anew.
    assert await site.read(task.model.digest) == MODEL
    assert await operator.read(task.model.digest) == MODEL


async def test_copies_that_rot_cost_neither_an_update_nor_the_round(
    start: Callable[..., Any], server: S3Server, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(machine, "COMMAND_RETRY_SECONDS", 0.0)
    storage = Storage(blobs=f"s3://{server.bucket('silotune-rot')}", s3_endpoint_url=server.url, reserve_bytes=0)
    federation = await start(storage=storage)
    site = federation.site("st-olav")
    optimizer = {"server_optimizer": {"type": "fedavgm"}}
    task = await federation.job_with_version_0(site, content=MODEL, rounds=2, aggregation=optimizer)
    blob = await site.upload(task, UPDATE)
    await site.finish(task, manifest=manifest(blob), examples=1)
    task = await site.lease()
    last = tensor_file(fill=0.125)
    blob = await site.upload(task, last)
    [job] = federation.store.jobs.active()
    before = federation.store.jobs.previous(job.id, version=1)
    for digest in (blob.digest, before["digest"], before["optimizer_digest"]):
        rot(federation.directory / "cache" / "blobs" / digest[:2] / digest)
    done = await site.finish(task, manifest=manifest(blob, base_version=1), examples=1)
    assert done.fate == agent_pb2.FATE_ACCEPTED, done.reason
    while not (view := federation.store.views.jobs()[0]).state.ended:
        await asyncio.sleep(0.05)
    assert view.state is JobState.COMPLETED, view.sentence
