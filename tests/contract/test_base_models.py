"""What the coordinator keeps of the base models that it serves, on every engine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from coordinator.storage.file_blobs import FileBlobStore
from coordinator.storage.garbage import GarbageCollector, all_named
from coordinator.storage.store import Store
from protos import jobspec
from protos.digests import base_model_digest, digest_of
from protos.errors import AlreadyExists, Conflict, NotFound

WEIGHTS = b"weights of a base model"
FILES = (("model.safetensors", digest_of(WEIGHTS), len(WEIGHTS)),)


def test_what_was_announced_is_not_garbage_though_no_site_has_uploaded_it(store: Store, tmp_path: Path) -> None:
    blobs = FileBlobStore(tmp_path / "blobs", reserve_bytes=0)
    store.base_models.announce("m", FILES, complete=False)
    (tmp_path / "new").write_bytes(WEIGHTS)
    digest, size = blobs.adopt(tmp_path / "new")
    store.uploads.add("operator", digest=digest, size=size, sealed_size=blobs.size)
    GarbageCollector(store.database, blobs).collect()
    # The row of the upload is settled; the model still names the blob.
    assert store.uploads.known("operator", [digest]) == set()
    assert blobs.size(digest) == len(WEIGHTS)
    with store.database.read() as connection:
        assert all_named(connection) == {digest}


def test_a_model_is_announced_again_until_it_is_complete_and_never_with_other_content(store: Store) -> None:
    digest = base_model_digest([(FILES[0][0], FILES[0][2], FILES[0][1])])
    assert store.base_models.announce("m", FILES, complete=False) == digest
    assert [row.complete for row in store.base_models.all()] == [False]
    assert store.base_models.announce("m", FILES, complete=True) == digest
    assert [(row.name, row.files, row.complete) for row in store.base_models.all()] == [("m", FILES, True)]
    assert store.base_models.expects(FILES[0][1], size=FILES[0][2])
    assert not store.base_models.expects(FILES[0][1], size=1)
    with pytest.raises(AlreadyExists, match="another digest"):
        store.base_models.announce("m", (("config.json", "a" * 64, 2),), complete=True)


def test_a_model_that_was_removed_is_garbage_unless_a_job_under_way_names_it(store: Store, tmp_path: Path) -> None:
    blobs = FileBlobStore(tmp_path / "blobs", reserve_bytes=0)
    (tmp_path / "new").write_bytes(WEIGHTS)
    digest, _ = blobs.adopt(tmp_path / "new")
    os.utime(blobs.path(digest), (0, 0))
    store.base_models.announce("m", FILES, complete=True)
    fields = {
        "name": "notes",
        "task": {"type": "classification", "labels": ["a", "b"]},
        "data": {"name": "notes"},
        "base_model": {"name": "m"},
        "local": {"steps": 1},
        "rounds": 1,
    }
    store.jobs.create(jobspec.parse(fields), job_id="j1", submit_token="", now_unix_seconds=0.0)
    with pytest.raises(Conflict, match="Job j1 relies on the base model m"):
        store.base_models.remove("m")
    store.jobs.control("j1", action="cancel", site="", now_unix_seconds=1.0)
    GarbageCollector(store.database, blobs).collect()
    assert blobs.size(digest) == len(WEIGHTS)
    store.base_models.remove("m")
    assert store.base_models.all() == []
    assert GarbageCollector(store.database, blobs).collect() == 1
    assert blobs.size(digest) is None
    with pytest.raises(NotFound, match="'m'"):
        store.base_models.remove("m")
