"""A backup is one state that was real, whatever goes on meanwhile, and can be restored into any engine."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Connection, select

from coordinator import backup as backup_module
from coordinator import ca, settings
from coordinator.backup import backup, restore, with_storage_key
from coordinator.settings import Listen, Public, blob_directory
from coordinator.storage import database, schema
from coordinator.storage.file_blobs import FileBlobStore
from coordinator.storage.garbage import GarbageCollector, all_named
from coordinator.storage.store import Store
from protos.digests import digest_of
from protos.errors import AlreadyExists, Conflict, CorruptData, NotFound
from tests.contract.test_garbage import Federation
from tests.contract.test_store import drive
from tests.servers.s3 import s3


@pytest.fixture
def data(tmp_path: Path, url: str) -> Path:
    directory = tmp_path / "coordinator"
    directory.mkdir()
    ca.create(now=ca.utc_now()).save(directory)
    write_settings(directory, url)
    return directory


@pytest.fixture
def federation(store: Store, data: Path) -> Iterator[Federation]:
    made = Federation(store, data)
    assert blob_directory(settings.load(data), data) == data / "blobs"
    made.begin()
    yield made


def write_settings(directory: Path, url: str) -> None:
    text = settings.new_file(listen=Listen(), public=Public(enrollment_address="fl.example.org:9444"), hosts=("fl",))
    (directory / settings.FILE_NAME).write_text(with_storage_key(text, "database", url))


def make(data: Path, to: Path, **more):  # type: ignore[no-untyped-def]
    return backup(data, settings.load(data), to=to, **more)


def rows(store: Store) -> dict[str, list[dict]]:
    with store.database.read() as connection:
        return {
            table.name: sorted(
                (dict(row) for row in connection.execute(select(table)).mappings()), key=lambda row: json.dumps(row)
            )
            for table in schema.metadata.sorted_tables
        }


def test_what_is_restored_is_what_was_backed_up_in_every_pair_of_engines(
    federation: Federation, data: Path, tmp_path: Path, new_url: Callable[[], str]
) -> None:
    federation.round(1)
    federation.hand_in("a", b"a2")
    manifest = make(data, tmp_path / "backup")
    before = rows(federation.store)
    federation.hand_in("b", b"b2")

    where, other = tmp_path / "restored", new_url()
    assert restore(tmp_path / "backup", data=where, storage={"database": other, "blobs": "kept"}) == manifest
    found = settings.load(where)
    assert (found.storage.database, found.storage.blobs) == (other, "kept")
    assert ca.load(where).pem == ca.load(data).pem
    with closing(Store.open(other)) as again:
        assert rows(again) == before
        blobs = FileBlobStore(blob_directory(found, where), reserve_bytes=0)
        with again.database.read() as connection:
            assert all_named(connection) <= {blob.digest for blob in blobs.stored()}
        restored = Federation(again, where)
        restored.blobs = blobs
        restored.hand_in("b", b"b2")
        assert "aggregates 2 updates" in drive(again)
        assert restored.aggregate(b"version 2")
        drive(again)
        assert again.views.job("j").head_version == 2


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("new_url", ["postgresql"], indirect=True)
def test_a_copy_of_all_rows_is_not_cut_off_while_the_other_ends_disk_is_slow(
    federation: Federation, data: Path, tmp_path: Path, new_url: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "IDLE_SECONDS", 2)
    copy = backup_module._copy_rows

    def slow_copy(reading: Connection, writing: Connection) -> None:
        for connection in (reading, writing):
            connection.execute(select(schema.jobs)).all()
        time.sleep(3)
        copy(reading, writing)

    monkeypatch.setattr(backup_module, "_copy_rows", slow_copy)
    manifest = make(data, tmp_path / "backup")
    where = {"database": new_url(), "blobs": "kept"}
    assert restore(tmp_path / "backup", data=tmp_path / "restored", storage=where) == manifest


def test_blobs_that_are_collected_meanwhile_make_the_rows_be_read_again(
    federation: Federation, data: Path, tmp_path: Path
) -> None:
    for site in ("a", "b"):
        federation.hand_in(site, site.encode())
    drive(federation.store)
    looks = []

    def go_on(sentence: str) -> None:
        looks.append(sentence)
        if len(looks) == 1:
            federation.aggregate(b"version 1")
            drive(federation.store)
            assert GarbageCollector(federation.store.database, federation.blobs).collect() == 2

    make(data, tmp_path / "backup", say=go_on)
    assert len(looks) == 2
    restore(tmp_path / "backup", data=tmp_path / "restored", storage={"database": "sqlite:///c.db"})
    with closing(Store.open(f"sqlite:///{tmp_path}/restored/c.db")) as again:
        assert again.views.job("j").head_version == 1


def test_a_backup_into_an_earlier_one_copies_what_is_new_and_replaces_the_rest(
    federation: Federation, data: Path, tmp_path: Path
) -> None:
    to = tmp_path / "backup"
    federation.hand_in("a", b"a1")
    make(data, to)
    version = next(to.glob(f"blobs/*/{federation.store.views.model('j', version=0).digest}"))
    first = version.stat().st_ino
    federation.hand_in("b", b"b1")
    drive(federation.store)
    federation.aggregate(b"version 1")
    drive(federation.store)
    federation.collect()
    manifest = make(data, to)
    assert version.stat().st_ino == first
    assert {path.read_bytes() for path in to.glob("blobs/*/*")} == {b"version 0", b"{}", b"version 1"}
    assert [path.name for path in to.glob("database-*")] == [manifest.database]
    assert sorted(path.name for path in to.iterdir()) == ["blobs", manifest.database, "manifest.json", "settings"]


def test_nothing_is_overwritten(federation: Federation, data: Path, tmp_path: Path, url: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").touch()
    with pytest.raises(AlreadyExists, match="not empty"):
        make(data, other)
    make(data, tmp_path / "backup")
    ca.create(now=ca.utc_now()).save(data)
    with pytest.raises(AlreadyExists, match="another coordinator"):
        make(data, tmp_path / "backup")
    with pytest.raises(AlreadyExists, match="not empty"):
        restore(tmp_path / "backup", data=other, storage={})
    with pytest.raises(AlreadyExists, match="database"):
        restore(tmp_path / "backup", data=tmp_path / "new", storage={"database": url})
    with pytest.raises(AlreadyExists, match="blob store"):
        restore(
            tmp_path / "backup",
            data=tmp_path / "newer",
            storage={"blobs": str(data / "blobs"), "database": "sqlite:///c.db"},
        )
    assert not (tmp_path / "new/coordinator.toml").exists() and not (tmp_path / "newer/coordinator.toml").exists()


def test_damage_is_found_when_it_is_copied_and_when_it_is_put_back(
    federation: Federation, data: Path, tmp_path: Path
) -> None:
    digest = federation.store.views.model("j", version=0).digest
    make(data, tmp_path / "good")
    copy = next((tmp_path / "good").glob(f"blobs/*/{digest}"))
    content = copy.read_bytes()
    copy.unlink()
    copy.write_bytes(b"x" + content[1:])
    with pytest.raises(CorruptData):
        restore(tmp_path / "good", data=tmp_path / "restored", storage={"database": "sqlite:///c.db"})
    federation.blobs.path(digest).write_bytes(b"x" + content[1:])
    with pytest.raises(CorruptData, match=digest[:16]):
        make(data, tmp_path / "bad")
    with pytest.raises(NotFound, match="no complete backup"):
        restore(tmp_path / "bad", data=tmp_path / "from-bad", storage={})


def test_a_lost_blob_that_can_be_done_without_is_named_and_the_rest_is_kept(
    federation: Federation, data: Path, tmp_path: Path
) -> None:
    federation.round(1)
    old, config = federation.store.views.model("j", version=0).digest, federation.seal(b"{}")
    federation.blobs.delete(config)
    federation.blobs.path(old).write_bytes(b"damaged")
    said: list[str] = []
    manifest = make(data, tmp_path / "backup", say=said.append)
    assert manifest.missing == tuple(sorted((old, config)))
    assert f"The blob {config[:16]} is not where the coordinator keeps its blobs: config.json of job j." in str(said)
    assert f"The blob {old[:16]} is damaged where the coordinator keeps it: version 0 of job j." in str(said)
    restored = restore(tmp_path / "backup", data=tmp_path / "new", storage={"database": "sqlite:///c.db"})
    assert restored == manifest
    kept = FileBlobStore(tmp_path / "new/blobs", reserve_bytes=0)
    with federation.store.database.read() as connection:
        assert all_named(connection) - {blob.digest for blob in kept.stored()} == {old, config}
    head = federation.store.views.model("j", version=None).digest
    federation.blobs.delete(head)
    with pytest.raises(CorruptData, match=f"{head[:16]} is not .*: version 1 of job j"):
        make(data, tmp_path / "other")
    assert make(data, tmp_path / "backup").missing == manifest.missing, "the earlier backup has it"


def test_an_encoded_job_cannot_go_on_without_version_0_and_its_residual(
    federation: Federation, data: Path, tmp_path: Path
) -> None:
    federation.round(1, encoded=True)
    for content, name in ((b"version 0", "version 0"), (b"residual 1", "version 1")):
        digest = federation.seal(content)
        federation.blobs.delete(digest)
        with pytest.raises(CorruptData, match=f"{digest[:16]} is not .*: {name} of job j"):
            make(data, tmp_path / f"without {name}")
        federation.seal(content)
    # Sites that cannot have the difference fetch the whole version.
    encoded = federation.seal(b"encoded 1")
    federation.blobs.delete(encoded)
    assert make(data, tmp_path / "backup").missing == (encoded,)


def test_a_blob_that_is_collected_while_it_is_opened_makes_the_rows_be_read_again(
    federation: Federation, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for site in ("a", "b"):
        federation.hand_in(site, site.encode())
    drive(federation.store)
    looks: list[str] = []
    copy = shutil.copyfile

    def copied_late(source: Path, target: Path, **more: bool) -> Path:
        if not looks[1:] and source.name in (digest_of(b"a"), digest_of(b"b")) and source.exists():
            federation.aggregate(b"version 1")
            drive(federation.store)
            federation.collect()
        return copy(source, target, **more)

    monkeypatch.setattr(shutil, "copyfile", copied_late)
    manifest = make(data, tmp_path / "backup", say=looks.append)
    assert len(looks) == 2 and manifest.missing == ()


def test_a_backup_shares_no_file_with_the_original(federation: Federation, data: Path, tmp_path: Path) -> None:
    make(data, tmp_path / "backup")
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "backup").rglob("*") if path.is_file())


def test_a_database_of_another_schema_is_not_migrated_by_a_backup(
    federation: Federation, data: Path, tmp_path: Path
) -> None:
    with federation.store.database.write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0001'")
    with pytest.raises(Conflict, match="schema 0001"):
        make(data, tmp_path / "backup")


def test_one_key_of_the_settings_changes_and_the_rest_stays_as_it_was_written(data: Path) -> None:
    text = (data / settings.FILE_NAME).read_text()
    changed = with_storage_key(text, "blobs", "s3://bucket/prefix")
    assert [line for line in changed.splitlines() if line not in text.splitlines()] == ['blobs = "s3://bucket/prefix"']
    assert with_storage_key("[log]\n", "blobs", "b") == '[log]\n\n[storage]\nblobs = "b"\n'
    assert with_storage_key("[storage]\n\n[log]\n", "blobs", "b") == '[storage]\nblobs = "b"\n\n[log]\n'


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_a_coordinator_moves_from_files_to_s3_and_back(
    federation: Federation, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation.round(1)
    before = rows(federation.store)
    with s3(tmp_path) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        server.bucket("moved")
        make(data, tmp_path / "backup")
        place = {"database": "sqlite:///c.db", "blobs": "s3://moved/prefix", "s3_endpoint_url": server.url}
        restore(tmp_path / "backup", data=tmp_path / "moved", storage=place)
        make(tmp_path / "moved", tmp_path / "again")
        with pytest.raises(AlreadyExists, match="blob store"):
            restore(tmp_path / "again", data=tmp_path / "twice", storage=place)
    restore(tmp_path / "again", data=tmp_path / "back", storage={"database": "sqlite:///c.db", "blobs": "blobs"})
    with closing(Store.open(f"sqlite:///{tmp_path}/back/c.db")) as again:
        assert rows(again) == before
        with again.database.read() as connection:
            wanted = all_named(connection)
    assert wanted == {blob.digest for blob in FileBlobStore(tmp_path / "back/blobs", reserve_bytes=0).stored()}
