"""A store on each engine that is supported, and sites in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.storage.store import Store
from protos.identity import Role

NOW = 1_000_000.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(f"sqlite:///{tmp_path}/coordinator.db")
    yield opened
    opened.close()


def enroll(store: Store, name: str, role: Role = Role.SITE) -> None:
    secret = f"secret of {name}"
    store.sites.invite(name, role=role, secret_hash=secret, expires_unix_seconds=NOW + 60, now_unix_seconds=NOW)
    store.sites.redeem(secret, key_hash="key", serial="1", expires_unix_seconds=NOW + 9e6, now_unix_seconds=NOW)
    store.sites.see(name, agent={"version": "1"}, now_unix_seconds=NOW)
