"""Connections and transactions, on SQLite or PostgreSQL.

SQLite runs in WAL mode with `synchronous = FULL`, so what was acknowledged survives a kill, and every writing
transaction takes the write lock when it begins: a conditional update can then never fail half way for want of it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, event

MIGRATIONS = Path(__file__).parent / "migrations"


class Database:
    """`read()` and `write()` give a connection inside one transaction; safe to use from any thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # SQLite has one writer at a time; waiting here is fair and quiet, its own busy loop is neither.
        self._write_lock = threading.Lock() if engine.dialect.name == "sqlite" else None

    @staticmethod
    def open(url: str) -> Database:
        """Opens `url` ("sqlite:////data/coordinator.db", "postgresql+psycopg://...") and migrates its schema."""
        engine = sqlalchemy.create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
        if engine.dialect.name == "sqlite":
            event.listen(engine, "connect", _prepare_sqlite)
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
        return Database(engine)

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Several statements see one state of the database."""
        with self._engine.connect() as connection:
            if self._write_lock is None:
                connection.execution_options(isolation_level="REPEATABLE READ")
                yield connection
                return
            connection.exec_driver_sql("BEGIN")
            try:
                yield connection
            finally:
                connection.exec_driver_sql("COMMIT")

    @contextmanager
    def write(self) -> Iterator[Connection]:
        if self._write_lock is None:
            with self._engine.begin() as connection:
                yield connection
            return
        with self._write_lock, self._engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.exec_driver_sql("ROLLBACK")
                raise
            connection.exec_driver_sql("COMMIT")


def _prepare_sqlite(connection, _record) -> None:  # type: ignore[no-untyped-def]
    # The driver's own implicit BEGIN is switched off; transactions begin above.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")
