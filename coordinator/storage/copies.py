"""Copies: whole blobs of S3 on this coordinator's disk, for aggregation, which is given paths, and for the sites.

They can be lost at any time, so nothing is synced for their sake: a copy that an earlier process left is hashed before
it is trusted. Beyond the budget, or when the disk needs the room, those go first that were not used for longest; never
one in use.
"""

from __future__ import annotations

import os
import shutil
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from coordinator.storage.blobs import StoredBlob
from coordinator.storage.file_blobs import FileBlobStore, digest_of_file
from protos.errors import CorruptData, NotFound, OutOfSpace

# A part of an upload on this disk that has not grown for so long: its site goes on at another replica, or not at all.
STALE_SECONDS = 86_400


class Copies:
    """Safe to use from any thread. `files` also keeps the parts of uploads."""

    def __init__(self, directory: Path, *, reserve_bytes: int, budget_bytes: int) -> None:
        self.files = FileBlobStore(directory, reserve_bytes=reserve_bytes)
        self._budget_bytes = budget_bytes
        self._coming = directory / "downloads"
        self._lock = threading.Lock()
        self._pins: Counter[str] = Counter()
        # What this process has seen to be right.
        self._trusted: set[str] = set()
        shutil.rmtree(self._coming, ignore_errors=True)
        self._coming.mkdir()

    def find(self, digest: str) -> Path | None:
        """A copy that is right, if there is one."""
        try:
            path = self.files.path(digest)
            if digest not in self._trusted and digest_of_file(path)[0] != digest:
                self.files.delete(digest)
                return None
            # The time of the last use.
            os.utime(path)
        except (NotFound, FileNotFoundError):
            return None
        with self._lock:
            self._trusted.add(digest)
        return path

    def verify(self, digest: str) -> None:
        """Drops a copy that is no longer what this process has seen of it."""
        with suppress(NotFound):
            try:
                self.files.verify(digest)
            except CorruptData:
                self.drop(digest)

    def read(self, digest: str, *, offset: int, length: int) -> bytes | None:
        """None when there is no copy that is known to be right."""
        if digest not in self._trusted:
            return None
        try:
            return self.files.read(digest, offset=offset, length=length)
        except NotFound:
            return None

    def new_path(self, size: int) -> Path:
        """Where a file of this size may be made, to be kept or deleted. OutOfSpace."""
        self.make_room(size)
        if size > self.files.spare_bytes():
            raise OutOfSpace(
                f"The coordinator's disk has no room for a copy of {size} bytes.",
                hint="It goes on by itself when the operator has made room.",
            )
        return self._coming / str(uuid.uuid4())

    def keep(self, path: Path, digest: str) -> Path:
        """Takes a file that was seen to have this digest."""
        self.files.keep(path, digest)
        with self._lock:
            self._trusted.add(digest)
        self.make_room(0, but=digest)
        return self.files.path(digest)

    @contextmanager
    def in_use(self, digest: str) -> Iterator[None]:
        """Until the block ends a copy of this blob is not evicted."""
        with self._lock:
            self._pins[digest] += 1
        try:
            yield
        finally:
            with self._lock:
                self._pins[digest] -= 1

    def drop(self, digest: str) -> None:
        with self._lock:
            self._drop(digest)

    def spare_bytes(self) -> int:
        """What could be had without touching the reserve."""
        with self._lock:
            return self.files.spare_bytes() + sum(blob.size for blob in self._evictable())

    def make_room(self, wanted_bytes: int, *, but: str = "") -> None:
        """Evicts until the budget holds and the disk has room, or nothing is left to evict."""
        for part in self.files.unfinished():
            if part.age_seconds > STALE_SECONDS:
                self.files.forget_upload(part.owner, part.digest)
        with self._lock:
            held_bytes = sum(blob.size for blob in self.files.stored())
            for blob in self._evictable():
                if held_bytes + wanted_bytes <= self._budget_bytes and self.files.spare_bytes() >= wanted_bytes:
                    return
                if blob.digest != but:
                    self._drop(blob.digest)
                    held_bytes -= blob.size

    def _evictable(self) -> list[StoredBlob]:
        """With the lock held: what nobody uses, the least recently used first."""
        self._pins += Counter()  # drops the zeros
        free = [blob for blob in self.files.stored() if blob.digest not in self._pins]
        return sorted(free, key=lambda blob: blob.age_seconds, reverse=True)

    def _drop(self, digest: str) -> None:
        self._trusted.discard(digest)
        self.files.delete(digest)
