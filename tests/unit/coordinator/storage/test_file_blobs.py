from __future__ import annotations

import os
from pathlib import Path

import pytest

from coordinator.storage.file_blobs import FileBlobStore
from protos.digests import digest_of

CONTENT = os.urandom(300_000)
DIGEST = digest_of(CONTENT)


def test_a_kill_before_the_rename_keeps_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    upload = FileBlobStore(tmp_path, reserve_bytes=0).open_upload("st-olav", DIGEST, size=len(CONTENT))
    upload.append(CONTENT, offset=0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        upload.seal()
    store = FileBlobStore(tmp_path, reserve_bytes=0)
    assert store.size(DIGEST) is None
    assert store.committed_size("st-olav", DIGEST) == len(CONTENT)
    store.open_upload("st-olav", DIGEST, size=len(CONTENT)).seal()
    assert store.path(DIGEST).read_bytes() == CONTENT


def test_a_directory_that_was_moved_is_the_same_store_and_another_is_not(tmp_path: Path):
    first = FileBlobStore(tmp_path / "one", reserve_bytes=0).location
    (tmp_path / "one").rename(tmp_path / "moved")
    assert FileBlobStore(tmp_path / "moved", reserve_bytes=0).location == first
    assert FileBlobStore(tmp_path / "two", reserve_bytes=0).location != first


def test_a_blob_is_young_when_it_is_sealed_however_long_its_part_waited(tmp_path: Path):
    store = FileBlobStore(tmp_path, reserve_bytes=0)
    upload = store.open_upload("st-olav", DIGEST, size=len(CONTENT))
    upload.append(CONTENT, offset=0)
    os.utime(tmp_path / "uploads/st-olav" / f"{DIGEST}.part", (0, 0))
    upload.seal()
    (blob,) = store.stored()
    assert abs(blob.age_seconds) < 3600


def test_a_file_that_the_file_system_made_is_no_blob_and_no_upload(tmp_path: Path):
    store = FileBlobStore(tmp_path, reserve_bytes=0)
    for directory in ("blobs/ab", "uploads/st-olav"):
        (tmp_path / directory).mkdir(parents=True)
        (tmp_path / directory / ".nfs000000000000a1b200000001").touch()
    assert [*store.stored(), *store.unfinished()] == []


def test_a_directory_that_is_gone_is_told(tmp_path: Path):
    store = FileBlobStore(tmp_path / "blobs", reserve_bytes=0)
    (tmp_path / "blobs").rename(tmp_path / "unmounted")
    assert store.check() == "the blob directory cannot be written: No such file or directory"
