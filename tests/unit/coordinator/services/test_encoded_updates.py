"""A job with encodings: what a site gets, what it may hand in, and how everything else is refused."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.services import agents
from protos.encoded_files import TensorFile, rebuild, write_encoded
from protos.errors import NotFound
from protos.v1 import agent_pb2
from protos.v1.manifest_pb2 import ENCODING_INT4, ENCODING_INT8, FORM_DELTA, FORM_VALUES, BlobRef, Manifest
from tests.unit.coordinator.services.conftest import Federation, Peer, manifest, tensor_file

VERSION_0 = tensor_file(fill=0.5)
ENCODED = {"encoding": {"up": "int4", "down": "int8"}, "rounds": 2}


def update(directory: Path, *, block: int = 64, seed: int = 0, fill: float = 0.25) -> bytes:
    """What a site sends whose values have become `fill` somewhere, and stayed 0.5 elsewhere."""
    base = directory / "base"
    base.write_bytes(VERSION_0)
    values = np.where(np.arange(1000) % 7, np.float32(0.5), np.float32(fill))
    write_encoded(
        lambda _: lambda start, count: values[start : start + count], tensors=[("layer.weight", "F32", (1000,))],
        base=base, encoding="int4", block=block, seed=seed, output=directory / "update",
    )  # fmt: skip
    return (directory / "update").read_bytes()


def told(blob: BlobRef, **changes: Any) -> Manifest:
    return Manifest(**{"blob": blob, "encoding": ENCODING_INT4, "form": FORM_DELTA, "block": 64, **changes})


async def hand_in(site: Peer, task: agent_pb2.Task, content: bytes, **changes: Any) -> agent_pb2.FinishTaskResponse:
    return await site.finish(task, manifest=told(await site.upload(task, content), **changes), examples=1)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"encoding": ENCODING_INT8}, "holds int8 delta in blocks of 64; this job's updates hold int4 delta in blocks"),
        ({"block": 32}, "holds int4 delta in blocks of 32; this job's updates hold int4 delta in blocks of 64"),
        ({"form": FORM_VALUES}, "holds int4 values in blocks of 64; this job's"),
        ({"encoding": 77}, "in a way that this coordinator does not know"),
    ],
)
async def test_another_encoding_than_the_recipes_is_refused(
    federation: Federation, tmp_path: Path, changes: dict[str, Any], sentence: str
):
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=VERSION_0, **ENCODED)
    done = await hand_in(site, task, update(tmp_path), **changes)
    assert (done.fate, sentence in done.reason) == (agent_pb2.FATE_REJECTED, True), done.reason


async def test_raw_values_where_differences_are_due_are_refused_and_the_other_way_round(
    federation: Federation, tmp_path: Path
):
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=VERSION_0, **ENCODED)
    done = await site.finish(task, manifest=manifest(await site.upload(task, VERSION_0)), examples=1)
    assert "holds raw values; this job's updates hold int4 delta in blocks of 64" in done.reason
    other = await federation.job_with_version_0(site, content=VERSION_0, name="raw")
    done = await hand_in(site, other, update(tmp_path))
    assert "holds int4 delta in blocks of 64; this job's updates hold raw values" in done.reason


def with_scale(content: bytes, scale: bytes) -> bytes:
    """The update with another scale in its last block."""
    at = len(content) - 34
    return content[:at] + scale + content[at + 2 :]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda content, _: with_scale(content, b"\x80\x7f"), "'layer.weight' has values that are not finite"),
        (lambda content, _: with_scale(content, b"\xc0\x7f"), "'layer.weight' has values that are not finite"),
        (lambda content, _: with_scale(content, b"\x7f\x7f"), "'layer.weight' has values that are not finite"),
        (lambda content, _: content[:-1], "its header describes"),
        (lambda _, path: update(path, block=32), r"'layer.weight' has shape [576]; [544] was expected"),
        (lambda *_: VERSION_0, "'layer.weight' has shape [1000]; [544] was expected"),
    ],
    ids=["infinite scale", "no number as scale", "absurd scale", "truncated", "other block", "raw"],
)
async def test_an_update_that_does_not_hold_what_it_claims_is_refused(
    federation: Federation, tmp_path: Path, damage: Any, sentence: str
):
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=VERSION_0, **ENCODED)
    content = update(tmp_path, fill=1e3)
    done = await hand_in(site, task, damage(content, tmp_path))
    assert (done.fate, sentence in done.reason) == (agent_pb2.FATE_REJECTED, True), done.reason


async def test_a_site_gets_the_difference_from_version_0_and_hears_which_of_its_updates_counted(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    site, other = federation.site("st-olav"), federation.site("haukeland")
    task = await federation.job_with_version_0(site, content=VERSION_0, **ENCODED)
    assert task.initial == task.model.digest and not task.HasField("encoded") and task.counted_round == 0
    done = await hand_in(site, task, update(tmp_path))
    assert done.fate == agent_pb2.FATE_ACCEPTED, done.reason

    task = await site.lease()
    assert (task.round, task.version, task.counted_round) == (2, 1, 1)
    assert task.initial != task.model.digest
    assert (task.encoded.encoding, task.encoded.form, task.encoded.block) == (ENCODING_INT8, FORM_DELTA, 64)
    assert task.encoded.base_version == 0
    content = await site.read(task.encoded.blob.digest)
    assert len(content) == task.encoded.blob.size < task.model.size / 3
    with pytest.raises(NotFound):
        await other.read(task.encoded.blob.digest)
    (tmp_path / "encoded").write_bytes(content)
    digest = rebuild(
        tmp_path / "encoded", base=tmp_path / "base", encoding="int8", block=64, output=tmp_path / "version"
    )
    assert digest == task.model.digest
    assert (tmp_path / "version").read_bytes() == await site.read(task.model.digest)
    with TensorFile(tmp_path / "version") as file:
        values = file.leading("layer.weight", (1000,))(0, 1000)
    assert values == pytest.approx(np.where(np.arange(1000) % 7, 0.5, 0.25), abs=0.05)

    asked = agent_pb2.LeaseTaskRequest(
        agent=agent_pb2.AgentInfo(version="1"), keeps=[task.job_id, "unknown-1"], holding=[task.id]
    )
    assert (await site.agent("LeaseTask", asked)).ended == ["unknown-1"]
    # Whoever waits for work hears of the end at once: long before its wait is over.
    monkeypatch.setattr(agents, "MAX_WAIT_SECONDS", 3600)
    asked.wait_seconds = 3600
    waiting = asyncio.ensure_future(site.agent("LeaseTask", asked))
    done = await hand_in(site, task, update(tmp_path, seed=1), base_version=1)
    assert done.fate == agent_pb2.FATE_ACCEPTED, done.reason
    assert (await waiting).ended == [task.job_id, "unknown-1"]
