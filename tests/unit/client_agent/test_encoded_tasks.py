"""An agent fetches as little as it can, and the whole version where it has to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs

from client_agent.home import Home
from client_agent.job_states import JobStates
from client_agent.synthetic import tensor_shapes
from protos.digests import digest_of
from protos.encoded_files import TensorFile, rebuild, write_encoded
from protos.encodings import encoded_header
from protos.errors import InvalidInput
from protos.tensors import make_header
from protos.v1 import agent_pb2
from protos.v1.manifest_pb2 import ENCODING_INT4, ENCODING_INT8, FORM_DELTA, BlobRef, Manifest
from tests.unit.client_agent.coordinator_in_memory import Coordinator
from tests.unit.client_agent.test_loop import finish_of, log_of, running
from tests.unit.client_agent.work_to_do import spec, task

JOB = spec(encoding={"up": "int4", "down": "int8"})
NAMED = tensor_shapes(200_000)


def version_0() -> bytes:
    """As the synthetic trainer builds it from seed 0."""
    header, layout = make_header(NAMED)
    values = 0.02 * np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32)
    return header + values[: layout.data_bytes // 4].tobytes()


def version_1(directory: Path) -> tuple[bytes, bytes]:
    """(the version, its difference from version 0)."""
    base, encoded, version = (directory / name for name in ("base", "encoded", "version"))
    base.write_bytes(version_0())
    with TensorFile(base) as file:

        def values(name: str):  # type: ignore[no-untyped-def]
            before = file.leading(name, file.shape(name))
            return lambda start, count: before(start, count) + np.float32(0.001)

        write_encoded(values, tensors=NAMED, base=base, encoding="int8", block=64, seed=0, output=encoded)
    rebuild(encoded, base=base, encoding="int8", block=64, output=version)
    return version.read_bytes(), encoded.read_bytes()


def second_round(coordinator: Coordinator, directory: Path, *, initial: bytes) -> agent_pb2.Task:
    model, encoded = version_1(directory)
    blob = BlobRef(digest=digest_of(encoded), size=len(encoded))
    coordinator.blobs[blob.digest] = encoded
    granted = task(
        round=2, job=JOB, initial=digest_of(initial), counted_round=1,
        encoded=Manifest(blob=blob, encoding=ENCODING_INT8, form=FORM_DELTA, block=64),
    )  # fmt: skip
    coordinator.add_task(granted, model=model)
    return granted


async def test_round_1_fetches_nothing_and_sends_the_difference_in_four_bits(
    home: Home, coordinator: Coordinator
) -> None:
    granted = task(job=JOB, initial=digest_of(version_0()))
    coordinator.add_task(granted, model=version_0())
    async with running(home):
        finish = await finish_of(coordinator)
        # The agent asks about what it keeps.
        await coordinator.until(lambda: ["j1"] in [list(request.keeps) for request in coordinator.asked])
    manifest = finish.succeeded.manifest
    assert coordinator.bytes_read == 0
    assert (manifest.encoding, manifest.form, manifest.block) == (ENCODING_INT4, FORM_DELTA, 64)
    assert manifest.blob.size == encoded_header(NAMED, encoding="int4", block=64)[1].file_bytes
    assert sorted(path.name for path in (home.jobs / "j1").iterdir()) == [
        "initial.safetensors",
        "residual-1.safetensors",
    ]


async def test_later_rounds_fetch_the_difference_from_version_0_only(
    home: Home, coordinator: Coordinator, tmp_path: Path
) -> None:
    granted = second_round(coordinator, tmp_path, initial=version_0())
    async with running(home):
        finish = await finish_of(coordinator)
    assert finish.HasField("succeeded")
    assert coordinator.bytes_read == granted.encoded.blob.size


async def test_an_agent_that_builds_another_version_0_fetches_the_whole_version_and_loses_no_task(
    home: Home, coordinator: Coordinator, tmp_path: Path
) -> None:
    # Here another library or processor has built version 0 of the job.
    other = bytearray(version_0())
    other[-1] ^= 1
    model = bytearray(version_1(tmp_path)[0])
    granted = second_round(coordinator, tmp_path, initial=bytes(other))
    model[-2] ^= 1
    coordinator.tasks.clear()
    coordinator.add_task(granted, model=bytes(model))
    with capture_logs() as said:
        async with running(home):
            first = await finish_of(coordinator)
            assert coordinator.bytes_read == granted.encoded.blob.size + granted.model.size
            # It knows now, and does not try again with this job.
            again = agent_pb2.Task()
            again.CopyFrom(granted)
            again.id, again.round = "train-3", 3
            coordinator.blobs.pop(granted.encoded.blob.digest)
            coordinator.tasks.clear()
            coordinator.tasks.append(again)
            second = await finish_of(coordinator, 1)
    assert first.HasField("succeeded") and second.HasField("succeeded")
    assert len(log_of(said, "The whole version is fetched.")) == 1


async def test_a_difference_that_the_coordinator_has_lost_is_done_without(
    home: Home, coordinator: Coordinator, tmp_path: Path
) -> None:
    granted = second_round(coordinator, tmp_path, initial=version_0())
    del coordinator.blobs[granted.encoded.blob.digest]
    async with running(home):
        assert (await finish_of(coordinator)).HasField("succeeded")
    assert coordinator.bytes_read == granted.model.size


async def test_what_is_kept_of_a_job_goes_when_the_coordinator_says_that_it_has_ended(
    home: Home, coordinator: Coordinator
) -> None:
    for job in ("ended-1", "going-on"):
        (home.jobs / job).mkdir(parents=True)
        (home.jobs / job / "initial.safetensors").write_bytes(b"x")
    coordinator.ended = {"ended-1", "never-heard-of"}
    async with running(home):
        await coordinator.until(lambda: not (home.jobs / "ended-1").exists())
    assert (home.jobs / "going-on" / "initial.safetensors").exists()


def test_no_job_has_a_directory_outside_its_own(tmp_path: Path) -> None:
    states = JobStates(tmp_path / "jobs")
    (tmp_path / "jobs" / "one").mkdir(parents=True)
    (tmp_path / "jobs" / "..one").mkdir()
    assert states.jobs() == ["one"]
    for name in ("../x", "", "A"):
        with pytest.raises(InvalidInput):
            states.path(name)
    states.drop(["../jobs", "nobody", "one"])
    assert states.jobs() == [] and (tmp_path / "jobs" / "..one").exists()
