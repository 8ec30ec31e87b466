"""Base models that the operator gives to the coordinator, at its gRPC door."""

from __future__ import annotations

from typing import Any

import pytest

from protos import errors
from protos.digests import base_model_digest, digest_of
from protos.v1 import operator_pb2, transfer_pb2
from protos.v1.manifest_pb2 import BlobRef, FileRef
from tests.unit.coordinator.services.conftest import tensor_file, upload_frames

WEIGHTS = tensor_file(fill=0.5, elements=300_000)
FILES = {"config.json": b'{"hidden_size": 8}', "model.safetensors": WEIGHTS}
DIGEST = base_model_digest((name, len(content), digest_of(content)) for name, content in FILES.items())
JOB = {
    "task": {"type": "classification", "labels": ["a", "b"]},
    "data": {"name": "notes"},
    "base_model": {"name": "org/tiny"},
}


def listed(**files: bytes) -> list[FileRef]:
    return [
        FileRef(name=name, blob=BlobRef(digest=digest_of(content), size=len(content)))
        for name, content in (files or FILES).items()
    ]


async def announce(operator: Any, *, name: str = "org/tiny", files: list[FileRef] | None = None) -> list[str]:
    """The names of the files that are still missing."""
    request = operator_pb2.AddBaseModelRequest(name=name, files=files or listed())
    answer = await operator.operator("AddBaseModel", request)
    assert files or answer.digest == DIGEST
    return [file.name for file in answer.missing]


async def upload(operator: Any, content: bytes, *, until: int | None = None) -> bool:
    # An operator has no task, so the target names none.
    nobody = type("NoTask", (), {"id": "", "generation": 0})()
    return (await operator.write(upload_frames(nobody, content, until=until))).sealed


async def test_a_base_model_is_served_to_a_site_only_while_a_task_of_its_needs_it(federation: Any):
    operator, site, other = federation.operator(), federation.site("st-olav"), federation.site("other")
    assert await announce(operator) == ["config.json", "model.safetensors"]
    for content in FILES.values():
        assert await upload(operator, content)
    assert await announce(operator) == []
    with pytest.raises(errors.NotFound):
        await site.read(digest_of(WEIGHTS))

    await federation.submit(**JOB, cohort={"sites": ["st-olav"]})
    task = await site.lease()
    assert list(task.base_files) == listed()
    assert await site.read(digest_of(WEIGHTS)) == WEIGHTS
    assert await site.read(digest_of(WEIGHTS), offset=1_000_000) == WEIGHTS[1_000_000:]
    with pytest.raises(errors.NotFound):
        await other.read(digest_of(WEIGHTS))


async def test_an_upload_of_a_base_model_goes_on_where_it_stopped(federation: Any):
    operator = federation.operator()
    await announce(operator)
    assert not await upload(operator, WEIGHTS, until=1 << 20)
    blob = BlobRef(digest=digest_of(WEIGHTS), size=len(WEIGHTS))
    status = await operator.transfer("QueryWriteStatus", transfer_pb2.QueryWriteStatusRequest(blob=blob))
    assert (status.committed_size, status.sealed) == (1 << 20, False)
    models = await operator.operator("ListBaseModels", operator_pb2.ListBaseModelsRequest())
    assert [(model.name, model.complete) for model in models.models] == [("org/tiny", False)]


async def test_a_base_model_that_is_not_whole_is_offered_to_nobody(federation: Any):
    operator, site = federation.operator(), federation.site("st-olav")
    await announce(operator)
    await upload(operator, FILES["config.json"])
    assert await announce(operator) == ["model.safetensors"]
    await federation.submit(**JOB)
    assert list((await site.lease()).base_files) == []
    with pytest.raises(errors.NotFound):
        await site.read(digest_of(FILES["config.json"]))


async def test_a_job_that_pins_another_digest_is_not_offered_it(federation: Any):
    operator, site = federation.operator(), federation.site("st-olav")
    await announce(operator)
    for content in FILES.values():
        await upload(operator, content)
    assert await announce(operator) == []
    await federation.submit(**{**JOB, "base_model": {"name": "org/tiny", "digest": "b" * 64}})
    assert list((await site.lease()).base_files) == []


async def test_a_name_does_not_change_its_meaning(federation: Any):
    operator = federation.operator()
    await announce(operator)
    with pytest.raises(errors.AlreadyExists, match="another digest"):
        await announce(operator, files=listed(**{"config.json": b"{}", "model.safetensors": WEIGHTS}))


async def test_only_files_of_an_announced_model_are_taken_and_none_that_may_hold_code(federation: Any):
    operator = federation.operator()
    with pytest.raises(errors.InvalidInput, match="no file of a base model that was announced"):
        await upload(operator, WEIGHTS)
    for name in ("modeling.py", "../config.json", "pytorch_model.bin"):
        with pytest.raises(errors.InvalidInput, match="is not a file of a base model"):
            await announce(operator, files=listed(**{name: b"x"}))
    with pytest.raises(errors.InvalidInput, match="not a model name"):
        await announce(operator, name="../x")


async def test_a_base_model_that_was_removed_is_served_no_more(federation: Any):
    operator, site = federation.operator(), federation.site("st-olav")
    await announce(operator)
    for content in FILES.values():
        await upload(operator, content)
    assert await announce(operator) == []
    await operator.operator("RemoveBaseModel", operator_pb2.RemoveBaseModelRequest(name="org/tiny"))
    models = await operator.operator("ListBaseModels", operator_pb2.ListBaseModelsRequest())
    assert list(models.models) == []
    await federation.submit(**JOB)
    assert list((await site.lease()).base_files) == []
    with pytest.raises(errors.Conflict, match="relies on the base model"):
        await announce(operator)
        await operator.operator("RemoveBaseModel", operator_pb2.RemoveBaseModelRequest(name="org/tiny"))
