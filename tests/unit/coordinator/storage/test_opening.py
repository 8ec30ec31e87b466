from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.settings import Public, Settings, Storage
from coordinator.storage.opening import open_storage
from protos.errors import Conflict

PUBLIC = Public(enrollment_address="host:9444")


def settings(**storage: str) -> Settings:
    return Settings(public=PUBLIC, storage=Storage(**storage))


def test_a_database_is_served_with_its_own_blobs_only(tmp_path: Path):
    with open_storage(settings(), tmp_path) as (store, blobs):
        location = blobs.location
    (tmp_path / "blobs").rename(tmp_path / "moved")
    refused = pytest.raises(Conflict, match=r"The database belongs to the blob store .* names ")
    with refused as caught, open_storage(settings(), tmp_path):
        pass
    assert "blobs" in caught.value.hint
    with open_storage(settings(blobs="moved"), tmp_path) as (store, blobs):
        assert blobs.location == location
        assert store.views.jobs() == []


def test_two_coordinators_cannot_have_one_blob_directory(tmp_path: Path):
    shared = str(tmp_path / "shared")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = (open_storage(settings(blobs=shared), tmp_path / name) for name in ("one", "two"))
    with one, pytest.raises(Conflict, match=f"serves from {shared}"), two:
        pass
