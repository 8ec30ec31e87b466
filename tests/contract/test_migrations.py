"""Every schema that was ever released becomes today's with all its rows, whoever migrates it and however many at once.

`schemas/` holds what each released version wrote, as SQL, beyond the version before. Such a file is never changed; a
release adds one.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine

from coordinator.rounds import state as s
from coordinator.storage.schema import metadata
from coordinator.storage.store import Store
from coordinator.storage.work import Result
from protos.errors import Conflict
from tests.contract.conftest import sealed
from tests.contract.test_store import drive

SCHEMAS = sorted(Path(__file__).with_name("schemas").glob("*.sql"))


def engine_of(url: str) -> Engine:
    """Past our own Database, which would migrate."""
    return sqlalchemy.create_engine(url.replace("postgresql:", "postgresql+psycopg:"), poolclass=sqlalchemy.NullPool)


def load(url: str, script: Path) -> None:
    sql = "".join(path.read_text() for path in SCHEMAS[: SCHEMAS.index(script) + 1])
    if url.startswith("sqlite"):
        with closing(engine_of(url).raw_connection()) as connection:
            connection.driver_connection.executescript(sql)  # type: ignore[union-attr]
        return
    with psycopg.connect(url) as connection:
        # Where SQLite counts by itself, PostgreSQL wants a sequence.
        connection.execute(sql.replace("id INTEGER NOT NULL", "id BIGSERIAL NOT NULL").encode())


def rows_of(engine: Engine, *, columns: dict[str, list[str]] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Every row of every table, or of these columns of these tables, in one order."""
    found = sqlalchemy.MetaData()
    found.reflect(engine)
    rows = {}
    with engine.connect() as connection:
        for name in columns or found.tables:
            table = found.tables[name]
            wanted = [table.c[column] for column in columns[name]] if columns else table.c
            read = connection.execute(sqlalchemy.select(*wanted)).mappings()
            rows[name] = sorted((dict(row) for row in read), key=repr)
    return {name: rows[name] for name in rows if name != "alembic_version"}


@pytest.mark.parametrize("script", SCHEMAS, ids=[path.stem for path in SCHEMAS])
def test_a_released_schema_is_migrated_with_all_its_rows_and_its_round_goes_on(
    new_url: Callable[[], str], script: Path
) -> None:
    url = new_url()
    load(url, script)
    before = rows_of(engine_of(url))
    with closing(Store.open(url)) as store:
        columns = {name: list(rows[0]) for name, rows in before.items()}
        assert rows_of(engine_of(url), columns=columns) == before

        assert [job.state for job in store.views.jobs()] == [s.JobState.RUNNING, s.JobState.COMPLETED]
        assert [part.weight for part in store.views.model("done-1", version=2).contributions] == [0.75, 0.25]
        assert [event.id for event in store.views.events("open-1", after_id=0)][-1] == 19
        assert store.sites.get("voss").state == "REVOKED"  # type: ignore[union-attr]

        assert "bergen uploading 50 %" in drive(store, "open-1")
        result = Result(digest="b" * 64, size=80, examples=30, steps=9)
        fate = store.work.finish(
            "open-1.1.train.bergen", site="bergen", generation=1, result=result, sealed_size=sealed
        )
        assert fate == (s.Fate.ACCEPTED, "")
        store.jobs.tick("open-1", elapsed_seconds=101)
        assert "aggregates 2 updates" in drive(store, "open-1")
        assert store.views.events("open-1", after_id=19), "new decisions go on with the count"


@pytest.mark.parametrize("script", [*SCHEMAS, None], ids=[*(path.stem for path in SCHEMAS), "empty"])
def test_a_migrated_database_has_the_tables_of_the_code(new_url: Callable[[], str], script: Path | None) -> None:
    url = new_url()
    if script is not None:
        load(url, script)
    Store.open(url).close()
    with engine_of(url).connect() as connection:
        # Alembic takes SQLite's default '' for another one.
        options = {"compare_type": True, "compare_server_default": not url.startswith("sqlite")}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, metadata) == []


def test_replicas_that_migrate_at_the_same_time_all_succeed(new_url: Callable[[], str]) -> None:
    url = new_url()
    load(url, SCHEMAS[0])
    script = (
        "import sys; from coordinator.storage.store import Store\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        f"store = Store.open({url!r}); print(len(store.views.jobs()))"
    )
    replicas = [
        subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for replica in replicas:
        assert replica.stdout is not None and replica.stdout.readline() == "ready\n"
    for replica in replicas:
        assert replica.stdin is not None
        replica.stdin.write("go\n")
        replica.stdin.flush()
    assert [replica.communicate()[0] for replica in replicas] == ["2\n"] * 3


def test_a_database_that_a_newer_version_has_migrated_is_refused(new_url: Callable[[], str]) -> None:
    url = new_url()
    Store.open(url).close()
    with engine_of(url).begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    before = rows_of(engine_of(url))
    with pytest.raises(Conflict, match="schema 9999, which this version of silotune does not know") as refused:
        Store.open(url)
    assert "newer silotune" in refused.value.hint
    assert rows_of(engine_of(url)) == before
