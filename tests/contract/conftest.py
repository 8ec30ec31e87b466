"""A store on each engine that is supported, and sites in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from coordinator.storage import database
from coordinator.storage.store import Store
from protos.identity import Role
from tests.servers.postgres import Postgres, postgres

NOW = 1_000_000.0


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """One PostgreSQL for all tests that do not kill it; its database `migrated` is what others are copied from."""
    with (
        postgres(tmp_path_factory.mktemp("postgres"), durable=False) as started,
        pytest.MonkeyPatch.context() as patch,
    ):
        # A transaction that is cut off is tried again by those who serve; a test that a busy machine holds up is not.
        patch.setattr(database, "IDLE_SECONDS", 300)
        Store.open(started.create("migrated")).close()
        yield started


@pytest.fixture(params=["sqlite", "postgresql"])
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Makes an empty database and says where it is."""
    if request.param == "sqlite":
        return lambda: f"sqlite:///{tmp_path}/empty.db"
    started = request.getfixturevalue("server")
    return lambda: started.create("empty")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database for this test alone."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/coordinator.db"
    started = request.getfixturevalue("server")
    return started.create("test", template="migrated")


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with closing(Store.open(url)) as opened:
        yield opened


def sealed(_: str) -> int:
    """The size of every blob, for results whose blobs are invented."""
    return 8


def enroll(store: Store, name: str, role: Role = Role.SITE) -> None:
    secret = f"secret of {name}"
    store.sites.invite(name, role=role, secret_hash=secret, expires_unix_seconds=NOW + 60, now_unix_seconds=NOW)
    store.sites.redeem(secret, key_hash="key", serial="1", expires_unix_seconds=NOW + 9e6, now_unix_seconds=NOW)
    store.sites.see(name, agent={"version": "1"}, now_unix_seconds=NOW)
