from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from client_agent.base_fetch import digest_for, fetch_missing
from client_agent.models import Models
from protos import jobspec
from protos.digests import digest_of
from protos.errors import InvalidInput, NotFound, Unavailable
from protos.v1 import agent_pb2
from protos.v1.manifest_pb2 import BlobRef, FileRef
from tests.unit.client_agent.work_to_do import model_bytes

FILES = {"config.json": json.dumps({"hidden_size": 8}).encode(), "model.safetensors": model_bytes()}
SPEC = jobspec.parse(
    {
        "name": "j",
        "task": {"type": "classification", "labels": ["a", "b"]},
        "data": {"name": "notes"},
        "base_model": {"name": "org/tiny"},
        "local": {"steps": 1},
        "rounds": 1,
    }
)


def task(**files: bytes) -> agent_pb2.Task:
    return agent_pb2.Task(
        base_files=[
            FileRef(name=name, blob=BlobRef(digest=digest_of(content), size=len(content)))
            for name, content in (files or FILES).items()
        ]
    )


class Coordinator:
    """Gives files out as a download does: verified, in a directory of its own. `cut` is lost on the first attempt."""

    def __init__(self, directory: Path, *, cut: str = "") -> None:
        self.directory = directory
        self.cut = digest_of(FILES[cut]) if cut else ""
        self.asked: list[str] = []

    async def download(self, blob: BlobRef) -> Path:
        self.asked.append(blob.digest)
        if blob.digest == self.cut:
            self.cut = ""
            raise Unavailable("The connection was lost.")
        path = self.directory / blob.digest
        path.write_bytes(next(content for content in FILES.values() if digest_of(content) == blob.digest))
        return path


def fetch(models: Models, coordinator: Coordinator) -> None:
    directory = coordinator.directory / "models"
    asyncio.run(fetch_missing(task(), SPEC, models=models, directory=directory, download=coordinator.download))


def test_a_fetched_model_is_registered_once_for_all_jobs(tmp_path: Path) -> None:
    models, coordinator = Models(tmp_path / "models.json"), Coordinator(tmp_path)
    expected = digest_for(task(), name="org/tiny", models=models, may_fetch=True)
    fetch(models, coordinator)
    fetch(models, coordinator)
    assert len(coordinator.asked) == 2
    assert models.current("org/tiny").digest == expected
    assert digest_for(agent_pb2.Task(), name="org/tiny", models=models, may_fetch=False) == expected


def test_what_was_fetched_before_the_connection_was_lost_is_not_fetched_again(tmp_path: Path) -> None:
    models, coordinator = Models(tmp_path / "models.json"), Coordinator(tmp_path, cut="model.safetensors")
    with pytest.raises(Unavailable):
        fetch(models, coordinator)
    assert models.all() == []
    fetch(models, coordinator)
    assert coordinator.asked.count(digest_of(FILES["config.json"])) == 1
    assert [model.name for model in models.all()] == ["org/tiny"]


@pytest.mark.parametrize(("offered", "may_fetch"), [(task(), False), (agent_pb2.Task(), True)])
def test_without_permission_or_offer_the_site_has_no_such_model(
    tmp_path: Path, offered: agent_pb2.Task, may_fetch: bool
) -> None:
    with pytest.raises(NotFound, match="holds no base model named 'org/tiny'"):
        digest_for(offered, name="org/tiny", models=Models(tmp_path / "models.json"), may_fetch=may_fetch)


@pytest.mark.parametrize("name", ["../config.json", "modeling.py", "weights.bin"])
def test_a_file_that_is_no_part_of_a_model_is_not_fetched(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match="is not a file of a base model"):
        digest_for(task(**{name: b"x"}), name="org/tiny", models=Models(tmp_path / "m.json"), may_fetch=True)


def test_a_file_that_was_damaged_here_is_fetched_anew_by_the_next_task_and_never_registered(tmp_path: Path) -> None:
    models, coordinator = Models(tmp_path / "models.json"), Coordinator(tmp_path, cut="model.safetensors")
    with pytest.raises(Unavailable):
        fetch(models, coordinator)
    (kept,) = (tmp_path / "models").glob("*/config.json")
    kept.write_text('{"hidden_size": 9}')
    with pytest.raises(InvalidInput, match="are not those that were fetched"):
        fetch(models, coordinator)
    assert models.all() == []
    fetch(models, coordinator)
    assert models.current("org/tiny").hidden_size == 8
