"""Connections and transactions, on SQLite or PostgreSQL, with the same promise on both.

One writer at a time: `write()` takes the database's write lock when it begins, in SQLite its own, in PostgreSQL an
advisory lock that all replicas share. So a writing transaction sees everything that was committed before it, nobody
else writes before it ends, and "look, then write" inside one of them is safe. Across two it never is.

A replica that is stopped or cut off must not keep the others waiting: PostgreSQL ends the transaction of a client that
stays silent for IDLE_SECONDS, so nothing slow may happen inside `write()`. A connection may be lost while COMMIT is on
its way; then nobody knows whether it was written, so every caller must be able to repeat what it wrote.

SQLite runs in WAL mode with `synchronous = FULL`: what was acknowledged survives a kill.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy
import structlog
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, event
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from coordinator.storage.schema import federation
from protos.errors import Conflict, InvalidInput, OutOfSpace, SilotuneError, Unavailable

MIGRATIONS = Path(__file__).parent / "migrations"

# After this long a write gives up waiting for the others'.
LOCK_SECONDS = 20
# So long may a client in a PostgreSQL transaction say nothing.
IDLE_SECONDS = 5
# One that copies all rows: nobody waits for it, and the other end's disk may be slow.
COPY_SECONDS = 600
STATEMENT_SECONDS = 60
# Writers of one process take turns before they take a connection, so all but one of these are readers'.
POOL_SIZE, POOL_OVERFLOW = 5, 10
# Any number will do, if all replicas have the same one. Advisory locks of other databases on the server are others.
WRITE_LOCK = 0x5110_70E5

_SETTINGS_HINT = "Look at `database` in section [storage] of coordinator.toml."
_DRIVERS = {"sqlite": "sqlite", "postgres": "postgresql+psycopg", "postgresql": "postgresql+psycopg"}
# A dead peer is noticed within half a minute, also while a statement waits for its answer.
_POSTGRESQL_ARGUMENTS = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
    "client_encoding": "utf8",
}
_FULL_DISK = "53100"
# A server that is only a standby now. It comes as another class of error than what else says "not now".
_READ_ONLY = "25006"

_log = structlog.get_logger("database")


class Database:
    """`read()` and `write()` give a connection inside one transaction; safe to use from any thread.

    Both raise Unavailable when the database cannot be reached or stays busy, OutOfSpace when its disk is full. Either
    passes by itself: the next call tries again, on a new connection where that is needed.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._is_sqlite = engine.dialect.name == "sqlite"
        # Waiting here is fair and quiet, the database's own waiting is neither and costs a connection each.
        self._turn = threading.Lock()
        # What cannot be done now, "read" or "write", and why.
        self._troubles: dict[str, str] = {}

    @staticmethod
    def open(url: str, *, migrate: bool = True) -> Database:
        """Opens `url` ("sqlite:////data/coordinator.db", "postgresql://user:password@host/name"), migrates its schema.

        Without `migrate`, for a look beside a coordinator that serves from it: Conflict when the schema is older.

        InvalidInput, Unavailable, OutOfSpace; Conflict when a newer silotune has migrated it. None names a password.
        """
        where = _parse(url)
        shown = where.set(drivername=where.get_backend_name(), query={}).render_as_string()
        database = Database(_engine(where))
        try:
            with database.write() as connection:
                database._migrate(connection, allowed=migrate)
        except SilotuneError as error:
            database.close()
            if isinstance(error.__cause__, DBAPIError):
                raise type(error)(
                    f"The database {shown} cannot be used: {_reason(error)}", hint=_SETTINGS_HINT
                ) from None
            raise
        except DBAPIError as error:
            database.close()
            raise InvalidInput(f"The database {shown} cannot be used: {_reason(error)}", hint=_SETTINGS_HINT) from None
        return database

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Several statements see one state of the database."""
        snapshot = {} if self._is_sqlite else {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        with self._in_our_words("read"), self._engine.connect() as connection:
            yield connection.execution_options(**snapshot)

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Written whole when the block ends, not at all when it raises. One at a time, over all replicas."""
        if not self._turn.acquire(timeout=LOCK_SECONDS):
            raise Unavailable("The coordinator's database is busy.", hint=_WAIT_HINT)
        try:
            with self._in_our_words("write"), self._engine.execution_options(writes=True).begin() as connection:
                if not self._is_sqlite:
                    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITE_LOCK})")
                yield connection
        finally:
            self._turn.release()

    def copying(self, connection: Connection) -> None:
        """Lets this transaction be silent for COPY_SECONDS, and its statements take as long as they do."""
        if not self._is_sqlite:
            connection.exec_driver_sql(
                f"SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = '{COPY_SECONDS}s'"
            )

    @property
    def trouble(self) -> str:
        """Why nothing can be written now, as far as the last attempt knows; empty when it can."""
        return self._troubles.get("write", "")

    def probe(self) -> None:
        """Whether it can be written: raises like `write`. Costs a real write only while there is trouble."""
        with self.write() as connection:
            if self.trouble:
                connection.execute(federation.delete().where(federation.c.name == "probe"))
                connection.execute(federation.insert().values(name="probe", value=""))

    @contextmanager
    def _in_our_words(self, what: str) -> Iterator[None]:
        try:
            yield
        except (DBAPIError, PoolTimeoutError) as error:
            ours = _as_ours(error)
            if ours is None:
                raise
            if what not in self._troubles:
                _log.warning(ours.message, what=what, reason=_reason(error))
            self._troubles[what] = ours.message
            raise ours from error
        if self._troubles.pop(what, None) is not None:
            _log.info("the database answers again", what=what)

    def _migrate(self, connection: Connection, *, allowed: bool) -> None:
        if not self._is_sqlite:
            encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
            if encoding != "UTF8":
                raise InvalidInput(
                    f"The coordinator's database has the encoding {encoding}; sentences and names need UTF8.",
                    hint="Make it with `CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0`.",
                )
            # A long history takes its time.
            connection.exec_driver_sql(
                "SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = '1min'"
            )
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.attributes["connection"] = connection
        found = MigrationContext.configure(connection).get_current_revision()
        known = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
        if found is not None and found not in known:
            raise Conflict(
                f"The coordinator's database has schema {found}, which this version of silotune does not know; "
                f"its own is {known[0]}.",
                hint="A newer silotune has migrated it: run that one, or restore the backup from before.",
            )
        if found != known[0]:
            if not allowed:
                raise Conflict(
                    f"The coordinator's database has schema {found}; this silotune's is {known[0]}.",
                    hint="Use the silotune that the coordinator runs with.",
                )
            command.upgrade(config, "head")


def _parse(url: str) -> URL:
    try:
        where = sqlalchemy.make_url(url)
    except (ArgumentError, ValueError):
        # Their texts may hold parts of a password that was not quoted.
        raise InvalidInput(
            "The database's URL cannot be read.",
            hint="It looks like postgresql://user:password@host:5432/name or sqlite:///coordinator.db; "
            "special characters in a password are written as %40 and the like.",
        ) from None
    engine, _, driver = where.drivername.partition("+")
    if engine not in _DRIVERS or driver not in ("", "psycopg", "pysqlite"):
        raise InvalidInput(
            f"The database's URL names {where.drivername}; rows are kept in sqlite or postgresql.", hint=_SETTINGS_HINT
        )
    if engine == "sqlite" and where.database in (None, "", ":memory:"):
        raise InvalidInput("The database's URL names no file, and rows must survive.", hint=_SETTINGS_HINT)
    return where.set(drivername=_DRIVERS[engine])


def _engine(where: URL) -> Engine:
    # Neither logs nor messages show the values of statements.
    shared: dict[str, Any] = {"hide_parameters": True, "pool_size": POOL_SIZE, "max_overflow": POOL_OVERFLOW}
    if where.drivername == "sqlite":
        engine = sqlalchemy.create_engine(where, **shared)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    arguments = {name: value for name, value in _POSTGRESQL_ARGUMENTS.items() if name not in where.query}
    engine = sqlalchemy.create_engine(
        where, isolation_level="READ COMMITTED", pool_pre_ping=True, connect_args=arguments, **shared
    )
    event.listen(engine, "connect", _prepare_postgresql)
    return engine


def _prepare_sqlite(connection, _record) -> None:  # type: ignore[no-untyped-def]
    # The driver's own implicit BEGIN is switched off; transactions begin below.
    connection.isolation_level = None
    for pragma in ("busy_timeout=10000", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    # A conditional update can then never fail half way for want of the lock.
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _prepare_postgresql(connection, _record) -> None:  # type: ignore[no-untyped-def]
    connection.execute(
        f"SET lock_timeout = '{LOCK_SECONDS}s'; "
        f"SET idle_in_transaction_session_timeout = '{IDLE_SECONDS}s'; "
        f"SET statement_timeout = '{STATEMENT_SECONDS}s'; "
        "SET synchronous_commit = on"
    )
    connection.commit()


_WAIT_HINT = "Nothing is lost, and it goes on by itself; the coordinator's log says why."


def _as_ours(error: DBAPIError | PoolTimeoutError) -> SilotuneError | None:
    """What passes by itself; None for a defect."""
    cause = error.orig if isinstance(error, DBAPIError) else None
    if isinstance(cause, sqlite3.Error):
        name = getattr(cause, "sqlite_errorname", "")
        if name.startswith(("SQLITE_FULL", "SQLITE_IOERR")):
            return _no_room()
        passing = name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_CANTOPEN", "SQLITE_READONLY"))
    else:
        state = getattr(cause, "sqlstate", None)
        if state == _FULL_DISK:
            return _no_room()
        passing = (
            isinstance(error, OperationalError | InterfaceError | PoolTimeoutError)
            or error.connection_invalidated
            or state == _READ_ONLY
        )
    return Unavailable("The coordinator's database cannot be reached now.", hint=_WAIT_HINT) if passing else None


def _no_room() -> OutOfSpace:
    return OutOfSpace(
        "The disk of the coordinator's database is full, or failing.",
        hint="It goes on by itself when there is room again.",
    )


def _reason(error: BaseException) -> str:
    """The database's own words, as one line."""
    cause = error.__cause__ if isinstance(error, SilotuneError) else error
    cause = getattr(cause, "orig", None) or cause
    words = " ".join(str(cause).split())
    return words if words.endswith((".", "?")) else f"{words}."
