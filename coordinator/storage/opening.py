"""Opens the database and the blob store that the settings name, and sees to it that they belong together.

A row that names a blob is worth nothing without the blob, so a database remembers its blob store from the first start
on, and is not served with another: that would look as if every round had been lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from sqlalchemy import insert, select

from coordinator.lock import locked
from coordinator.settings import Settings, blob_directory, bucket_and_prefix, database_url
from coordinator.storage import schema
from coordinator.storage.blobs import BlobStore
from coordinator.storage.database import Database
from coordinator.storage.file_blobs import FileBlobStore
from coordinator.storage.store import Store
from protos.errors import Conflict


@contextmanager
def open_storage(settings: Settings, directory: Path) -> Iterator[tuple[Store, BlobStore]]:
    """Both, until the block ends. InvalidInput or Conflict when they cannot be used as the settings have it."""
    with closing(Store.open(database_url(settings, directory))) as store, open_blobs(settings, directory) as blobs:
        _check_pair(store.database, blobs.location)
        yield store, blobs


@contextmanager
def open_blobs(settings: Settings, directory: Path) -> Iterator[BlobStore]:
    local = blob_directory(settings, directory)
    in_s3 = bucket_and_prefix(settings)
    local.mkdir(parents=True, exist_ok=True)
    # Files are one process's. Two coordinators may name one directory outside their own.
    with locked(local):
        if in_s3 is None:
            yield FileBlobStore(local, reserve_bytes=settings.storage.reserve_bytes)
            return
        # Only here, because files do not need it and it takes its time and memory to load.
        from coordinator.storage.bucket import Bucket
        from coordinator.storage.s3 import S3BlobStore

        name, prefix = in_s3
        storage = settings.storage
        bucket = Bucket(name, prefix=prefix, endpoint_url=storage.s3_endpoint_url, region=storage.s3_region)
        bucket.first_look()
        yield S3BlobStore(bucket, directory=local, reserve_bytes=storage.reserve_bytes, cache_bytes=storage.cache_bytes)


def _check_pair(database: Database, location: str) -> None:
    table = schema.federation
    with database.write() as connection:
        known = connection.execute(select(table.c.value).where(table.c.name == "blobs")).scalar()
        if known is None:
            connection.execute(insert(table).values(name="blobs", value=location))
    if known not in (None, location):
        raise Conflict(
            f"The database belongs to the blob store {known}, and coordinator.toml names {location}.",
            hint="With another one every round would look lost: set `blobs` in section [storage] back. If all blobs "
            "were copied there on purpose, delete the row `blobs` of the database's table `federation`.",
        )
