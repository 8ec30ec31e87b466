"""Where the federation under test keeps rows and blobs: how the suite sets it up, looks in, and does harm there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from coordinator.settings import Storage
from protos.digests import digest_of
from tests.chaos.scenario import COORDINATOR, REPLICAS
from tests.servers.postgres import Postgres, postgres
from tests.servers.s3 import S3Server, s3

PREFIX = "federation"


class Engine(Protocol):
    """`settings` of each coordinator's [storage], `environment` of its process, the URL by which the suite looks in."""

    settings: dict[str, Any]
    environment: dict[str, str]
    replicas: tuple[str, ...]

    @property
    def database_url(self) -> str: ...

    def read(self, digest: str) -> bytes | None:
        """The stored bytes of a blob; None when there is none."""

    def write(self, digest: str, data: bytes) -> None:
        """Puts other bytes in the place of a blob's, as a disk may that lies."""


def stored_digest(engine: Engine, digest: str) -> str:
    """What the bytes that are stored under a digest really have; empty when there are none."""
    data = engine.read(digest)
    return "" if data is None else digest_of(data)


def damage(engine: Engine, digest: str) -> bool:
    """Flips a bit in the middle of a stored blob; whether there was one."""
    data = engine.read(digest)
    if data is None:
        return False
    middle = len(data) // 2
    engine.write(digest, data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    return True


@dataclass
class Files:
    """SQLite and files in the coordinator's own directory."""

    data: Path
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    replicas: tuple[str, ...] = (COORDINATOR,)

    @property
    def database_url(self) -> str:
        return f"sqlite:///{self.data / 'coordinator.db'}"

    def read(self, digest: str) -> bytes | None:
        found = self._find(digest)
        with contextlib.suppress(FileNotFoundError):
            return found.read_bytes() if found else None
        return None

    def write(self, digest: str, data: bytes) -> None:
        found = self._find(digest)
        if found:
            # In place, as a disk does it; the file must not be made anew if it has just been collected.
            with contextlib.suppress(FileNotFoundError), found.open("r+b") as file:
                file.write(data)

    def _find(self, digest: str) -> Path | None:
        return next((self.data / Storage().blobs).rglob(digest), None)


@dataclass
class Servers:
    """PostgreSQL and S3, shared by three coordinators."""

    postgres: Postgres
    s3: S3Server
    bucket: str
    url: str
    replicas: tuple[str, ...] = REPLICAS

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "database": self.url,
            "blobs": f"s3://{self.bucket}/{PREFIX}",
            "s3_endpoint_url": self.s3.url,
        }

    @property
    def environment(self) -> dict[str, str]:
        return self.s3.environment

    @property
    def database_url(self) -> str:
        # SQLAlchemy's name for the driver, which the coordinator finds by itself.
        return self.url.replace("postgresql:", "postgresql+psycopg:")

    def read(self, digest: str) -> bytes | None:
        client = self.s3.client()
        with contextlib.suppress(client.exceptions.NoSuchKey):
            return client.get_object(Bucket=self.bucket, Key=self._key(digest))["Body"].read()
        return None

    def write(self, digest: str, data: bytes) -> None:
        self.s3.client().put_object(Bucket=self.bucket, Key=self._key(digest), Body=data)

    def _key(self, digest: str) -> str:
        return f"{PREFIX}/blobs/{digest[:2]}/{digest}"


@contextlib.contextmanager
def open_engine(name: str, directory: Path) -> Iterator[Engine]:
    """The engine of this name ("sqlite", "postgres"), its servers running, for a federation in `directory`."""
    if name == "sqlite":
        yield Files(directory / COORDINATOR)
        return
    with postgres(directory) as database, s3(directory) as store:
        yield Servers(database, store, store.bucket("silotune"), database.create("silotune"))
