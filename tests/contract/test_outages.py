"""A database that is away, full, held by somebody who sleeps, or none at all: a sentence, and it goes on by itself."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import insert
from structlog.testing import capture_logs

from coordinator.storage import schema
from coordinator.storage.store import Store
from protos.errors import InvalidInput, OutOfSpace, SilotuneError, Unavailable
from tests.contract.conftest import NOW, enroll
from tests.contract.test_store import begun, drive, finish, grant, recipe
from tests.servers.postgres import Postgres, postgres


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Postgres]:
    """A server of this test's own, which keeps what it acknowledged."""
    with postgres(tmp_path) as started:
        yield started


def test_a_store_outlives_its_postgresql_server_and_keeps_what_was_acknowledged(mortal: Postgres) -> None:
    with closing(Store.open(mortal.create("silotune"))) as store, capture_logs() as logs:
        begun(store, "a", "b")
        finish(store, "a", "a")
        task = grant(store, "b").task
        mortal.kill()
        calls: list[Callable[[], object]] = [
            lambda: drive(store),
            lambda: store.work.lease("b", lease_seconds=30),
            lambda: store.work.heartbeat(task.id, site="b", generation=1, progress={}, lease_seconds=30),
            lambda: store.sites.see("a", agent=None, now_unix_seconds=NOW),
            lambda: store.views.jobs(),
        ]
        for call in calls:
            with pytest.raises(Unavailable, match="database cannot be reached"):
                call()
        mortal.start()
        assert "waits for 1 of 2 updates" in drive(store)
        store.work.heartbeat(task.id, site="b", generation=task.generation, progress={}, lease_seconds=30)
        finish(store, "b", "c")
        assert "aggregates 2 updates" in drive(store)
    told = [(line["what"], line["log_level"]) for line in logs]
    for what in ("read", "write"):
        assert [level for of, level in told if of == what] == ["warning", "info"], "once, and once that it is over"


def test_a_write_that_the_server_did_not_survive_is_not_there(mortal: Postgres) -> None:
    with closing(Store.open(mortal.create("silotune"))) as store:
        with pytest.raises(Unavailable), store.database.write() as connection:
            connection.execute(insert(schema.uploads).values(owner="a", digest="a" * 64, size=8))
            mortal.kill()
        mortal.start()
        assert store.uploads.known("a", ["a" * 64]) == set()


def test_a_replica_that_sleeps_in_a_write_holds_up_the_others_only_until_it_is_cut_off(server: Postgres) -> None:
    url = server.create("sleeper", template="migrated")
    script = f"""
import sys
from coordinator.storage import database, schema
from protos.errors import Unavailable
opened = database.Database.open({url!r})
try:
    with opened.write() as connection:
        connection.execute(schema.uploads.insert().values(owner="sleeper", digest="a", size=8))
        print("holds the lock", flush=True)
        sys.stdin.readline()
        connection.execute(schema.uploads.insert().values(owner="sleeper", digest="b", size=8))
except Unavailable:
    print("was cut off", flush=True)
"""
    sleeper = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert sleeper.stdout is not None
    assert sleeper.stdout.readline() == b"holds the lock\n"
    sleeper.send_signal(signal.SIGSTOP)
    try:
        with closing(Store.open(url)) as store:
            enroll(store, "a")
            assert store.uploads.known("sleeper", ["a"]) == set()
    finally:
        sleeper.send_signal(signal.SIGCONT)
    assert sleeper.communicate(b"go on\n")[0].endswith(b"was cut off\n")


def test_more_threads_than_connections_all_get_their_turn(store: Store) -> None:
    enroll(store, "a")
    store.jobs.create(recipe(), job_id="j", submit_token="t", now_unix_seconds=NOW)
    errors: list[Exception] = []
    gate = threading.Barrier(40)

    def use() -> None:
        gate.wait()
        try:
            for _ in range(3):
                store.sites.see("a", agent=None, now_unix_seconds=NOW)
                store.views.jobs()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=use) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_full_disk_is_told_and_the_store_goes_on_when_there_is_room(tmp_path: Path) -> None:
    with closing(Store.open(f"sqlite:///{tmp_path}/coordinator.db")) as store:
        enroll(store, "a")

        def room(pages: int) -> None:
            # Of the only connection, because there is only one thread.
            with store.database.read() as connection:
                used = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
                connection.exec_driver_sql(f"PRAGMA max_page_count = {used + pages}")

        room(0)
        for _ in range(2):
            with pytest.raises(OutOfSpace, match="disk of the coordinator's database is full"):
                store.sites.see("a", agent={"about": "x" * 50_000}, now_unix_seconds=NOW)
        room(100)
        store.sites.see("a", agent={"about": "x" * 50_000}, now_unix_seconds=NOW)
        assert (found := store.sites.get("a")) is not None and len(found.agent["about"]) == 50_000


# --- what is not a database at all


@pytest.mark.parametrize(
    ("url", "error", "sentence"),
    [
        ("nonsense", InvalidInput, "URL cannot be read"),
        ("postgresql://fl:s3cret@db:s3cret/x", InvalidInput, "URL cannot be read"),
        ("mysql://fl:s3cret@db/x", InvalidInput, "names mysql; rows are kept in sqlite or postgresql"),
        ("postgresql+asyncpg://fl:s3cret@db/x", InvalidInput, "names postgresql"),
        ("sqlite://", InvalidInput, "names no file"),
        ("sqlite:////nowhere/at/all.db", Unavailable, "sqlite:////nowhere/at/all.db cannot be used: unable to open"),
        (
            "postgresql://fl:s3cret@127.0.0.1:1/x",
            Unavailable,
            r"postgresql://fl:\*\*\*@127.0.0.1:1/x cannot be used: .*refused",
        ),
        ("postgres://fl@127.0.0.1:1/x?password=s3cret", Unavailable, "postgresql://fl@127.0.0.1:1/x cannot be used"),
        ("postgresql://fl:s3cret@127.0.0.1:1/x?colour=red", InvalidInput, 'invalid connection option "colour"'),
    ],
)
def test_a_wrong_url_is_told_in_a_sentence_without_its_password(
    url: str, error: type[SilotuneError], sentence: str
) -> None:
    with capture_logs() as logs, pytest.raises(error, match=sentence) as refused:
        Store.open(url)
    assert refused.value.hint
    assert "s3cret" not in f"{logs} {traceback.format_exception(refused.value)}"


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("Dear diary, " * 100)
    with pytest.raises(InvalidInput, match=r"notes.txt cannot be used: file is not a database"):
        Store.open(f"sqlite:///{tmp_path}/notes.txt")


def test_a_database_that_is_not_there_or_not_ours_or_not_utf8_is_told_apart(server: Postgres) -> None:
    with pytest.raises(Unavailable, match='database "no_such" does not exist'):
        Store.open(server.url("no_such"))
    latin = "CREATE DATABASE latin ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        connection.execute(latin)
        connection.execute("CREATE ROLE guest LOGIN")
    with pytest.raises(InvalidInput, match="has the encoding SQL_ASCII"):
        Store.open(server.url("latin"))
    empty = server.create("empty")
    with psycopg.connect(empty, autocommit=True) as connection:
        connection.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    with pytest.raises(InvalidInput, match="cannot be used: permission denied for schema public"):
        Store.open(empty.replace("silotune@", "guest@"))
