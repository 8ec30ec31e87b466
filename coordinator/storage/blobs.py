"""Blobs: sealed, immutable runs of bytes named by their BLAKE3 digest, and the uploads that become them.

    uploads/<owner>/<digest>.part     grows by appending; its length is the committed offset
    uploads/<owner>/<digest>.sealed   the part became a blob, and its owner may not have heard of it yet
    blobs/<first two>/<digest>        sealed: hashed, synced, renamed, directory synced, and only then acknowledged

A part is known by owner and digest, so two sites that send the same bytes do not meet, and neither can learn what the
other has. `BlobStore` is what the rest of the coordinator sees. It speaks of a committed offset and not of files,
because an object store commits whole parts only: there an offset may lag behind what was appended, and a client that
asks where to go on simply sends a little again.

Everything here is synchronous; callers with an event loop use threads.
"""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Protocol

from protos.digests import check_digest, new_hasher
from protos.errors import Conflict, CorruptData, InvalidInput, NotFound, OutOfSpace, WrongOffset
from protos.identity import check_name

HASH_BLOCK_BYTES = 4 << 20
# Unfinished uploads of one owner, besides the one that it writes.
KEPT_PARTS = 2


class Upload(Protocol):
    """One writer of one blob. Not to be shared between threads without waiting for each call."""

    @property
    def offset(self) -> int:
        """The committed offset: where the next append goes."""

    def append(self, data: bytes | memoryview, *, offset: int) -> None:
        """Adds `data` at `offset`.

        WrongOffset: the upload does not end there. InvalidInput: more bytes than were announced. Conflict: another
        writer took over. OutOfSpace.
        """

    def seal(self) -> None:
        """Makes the blob readable for good; until `forget_upload` the owner's next writer finds it complete.

        CorruptData: the bytes are not those of the digest; the upload is gone.
        """

    def close(self) -> None:
        """Ends this writer; what is committed stays for the next."""


class BlobStore(Protocol):
    def size(self, digest: str) -> int | None:
        """Bytes of a sealed blob; None when there is none."""

    def committed_size(self, owner: str, digest: str) -> int:
        """How many bytes of an unfinished upload are kept."""

    def open_upload(self, owner: str, digest: str, *, size: int) -> Upload:
        """The only writer of this upload; one that was open before is closed. OutOfSpace."""

    def read(self, digest: str, *, offset: int, length: int) -> bytes:
        """At most `length` bytes of a sealed blob. NotFound."""

    def path(self, digest: str) -> Path:
        """A local file with a sealed blob's bytes, for aggregation. NotFound."""

    def adopt(self, path: Path) -> tuple[str, int]:
        """Seals a local file, which is moved away: (digest, size)."""

    def delete(self, digest: str) -> None:
        """Forgets a sealed blob; one that is not there is fine."""

    def forget_upload(self, owner: str, digest: str) -> None:
        """Drops what is kept of an upload, once its seal is on record or nobody wants it; a blob stays."""

    def spare_bytes(self) -> int:
        """Free space above the reserve; negative when the reserve is touched."""


class FileBlobStore:
    """BlobStore over a directory of one file system, for one process."""

    def __init__(self, directory: Path, *, reserve_bytes: int) -> None:
        self._blobs = directory / "blobs"
        self._uploads = directory / "uploads"
        self._reserve_bytes = reserve_bytes
        self._lock = threading.Lock()
        self._writers: dict[Path, FileUpload] = {}
        for path in (self._blobs, self._uploads):
            path.mkdir(parents=True, exist_ok=True)

    def size(self, digest: str) -> int | None:
        try:
            return self._sealed(digest).stat().st_size
        except FileNotFoundError:
            return None

    def committed_size(self, owner: str, digest: str) -> int:
        part = self._part(owner, digest)
        try:
            return part.stat().st_size
        except FileNotFoundError:
            return (self.size(digest) or 0) if _mark(part).exists() else 0

    def open_upload(self, owner: str, digest: str, *, size: int) -> FileUpload:
        part = self._part(owner, digest)
        with self._lock:
            writers = list(self._writers.values())
            before = self._writers.get(part)
        # An agent that lost its connection comes back before the old stream is known to be dead, so the newest writer
        # wins. Closing waits for an append in flight: there are never two writers.
        if before is not None:
            before.close()
        promised = sum(writer.missing_bytes for writer in writers if writer is not before)
        missing = size - self.committed_size(owner, digest)
        if missing > 0 and promised + missing > self.spare_bytes():
            raise OutOfSpace(
                f"The coordinator's disk has no room for {missing} bytes more.",
                hint="The upload goes on by itself when the operator has made room.",
            )
        part.parent.mkdir(parents=True, exist_ok=True)
        self._drop_old_parts(part)
        upload = FileUpload(self, part, digest=digest, size=size)
        with self._lock:
            if self._writers.get(part) not in (None, before):
                raise Conflict("Another connection continues this upload.")
            self._writers[part] = upload
        try:
            upload.start()
        except BaseException:
            upload.close()
            raise
        return upload

    def _drop_old_parts(self, wanted: Path) -> None:
        """Keeps the owner's newest parts: what it began and did not go on with is not what it is working on."""
        others = [path for path in wanted.parent.glob("*.part") if path != wanted]
        others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        with self._lock:
            written = set(self._writers)
        for path in others[KEPT_PARTS:]:
            if path not in written:
                path.unlink(missing_ok=True)

    def read(self, digest: str, *, offset: int, length: int) -> bytes:
        try:
            handle = os.open(self._sealed(digest), os.O_RDONLY)
        except FileNotFoundError:
            raise _not_found(digest) from None
        try:
            return os.pread(handle, length, offset)
        finally:
            os.close(handle)

    def path(self, digest: str) -> Path:
        path = self._sealed(digest)
        if not path.exists():
            raise _not_found(digest)
        return path

    def adopt(self, path: Path) -> tuple[str, int]:
        hasher = new_hasher()
        with path.open("rb") as file:
            while block := file.read(HASH_BLOCK_BYTES):
                hasher.update(block)
            os.fsync(file.fileno())
            size = file.tell()
        digest = hasher.hexdigest()
        self.keep(path, digest)
        return digest, size

    def delete(self, digest: str) -> None:
        self._sealed(digest).unlink(missing_ok=True)

    def forget_upload(self, owner: str, digest: str) -> None:
        part = self._part(owner, digest)
        with self._lock:
            writer = self._writers.get(part)
        if writer is not None:
            writer.close()
        part.unlink(missing_ok=True)
        _mark(part).unlink(missing_ok=True)

    def spare_bytes(self) -> int:
        return shutil.disk_usage(self._blobs).free - self._reserve_bytes

    def keep(self, path: Path, digest: str) -> None:
        """Moves a synced file to its name; from when this returns it survives a power cut."""
        target = self._sealed(digest)
        if not target.parent.is_dir():
            target.parent.mkdir(exist_ok=True)
            sync_directory(self._blobs)
        os.replace(path, target)
        sync_directory(target.parent)

    def forget_writer(self, part: Path, writer: FileUpload) -> None:
        with self._lock:
            if self._writers.get(part) is writer:
                del self._writers[part]

    def _sealed(self, digest: str) -> Path:
        return self._blobs / check_digest(digest)[:2] / digest

    def _part(self, owner: str, digest: str) -> Path:
        return self._uploads / check_name(owner) / f"{check_digest(digest)}.part"


class FileUpload:
    """The one writer of a part file. A write that fails half-way leaves a shorter prefix, which is a valid part."""

    def __init__(self, store: FileBlobStore, part: Path, *, digest: str, size: int) -> None:
        self._store = store
        self._part = part
        self._digest = digest
        self._size = size
        self._lock = threading.Lock()
        self._hasher = new_hasher()
        self._handle = -1
        self._closed = False
        self._sealed = False
        self.offset = 0

    @property
    def missing_bytes(self) -> int:
        return max(0, self._size - self.offset)

    def start(self) -> None:
        """Opens the part and hashes what it already has."""
        with self._lock:
            self._check_open()
            if not self._part.exists() and _mark(self._part).exists():
                self._sealed = True
                self.offset = self._store.size(self._digest) or 0
                return
            self._handle = os.open(self._part, os.O_RDWR | os.O_CREAT, 0o600)
            while block := os.pread(self._handle, HASH_BLOCK_BYTES, self.offset):
                self._hasher.update(block)
                self.offset += len(block)

    def append(self, data: bytes | memoryview, *, offset: int) -> None:
        with self._lock:
            self._check_open()
            if offset != self.offset:
                raise WrongOffset(
                    f"The upload continues at byte {self.offset}, not at {offset}.", committed_size=self.offset
                )
            if offset + len(data) > self._size or self._sealed:
                raise InvalidInput(f"The upload has more than the {self._size} bytes that it announced.")
            if self._store.spare_bytes() < 0:
                raise OutOfSpace("The coordinator's disk is full.", hint="The upload goes on when there is room again.")
            self._write(memoryview(data))

    def seal(self) -> None:
        with self._lock:
            self._check_open()
            if self._sealed:
                return
            if self.offset != self._size or self._hasher.hexdigest() != self._digest:
                self._part.unlink(missing_ok=True)
                self._end()
                raise CorruptData(
                    f"The {self.offset} uploaded bytes are not the announced {self._size} with digest {self._digest}.",
                    hint="The upload was discarded and begins anew.",
                )
            os.fsync(self._handle)
            # A crash between the rename and the record of it must not cost the owner the upload.
            _mark(self._part).touch()
            sync_directory(self._part.parent)
            self._store.keep(self._part, self._digest)
            self._sealed = True

    def close(self) -> None:
        with self._lock:
            self._end()

    def _write(self, data: memoryview) -> None:
        written = 0
        while written < len(data):
            try:
                written += os.pwrite(self._handle, data[written:], self.offset + written)
            except OSError as error:
                # The hasher no longer knows what the file holds; the next writer reads it again.
                self._end()
                raise OutOfSpace(f"The coordinator cannot write to its disk: {error.strerror}.") from error
        self._hasher.update(data)
        self.offset += len(data)

    def _check_open(self) -> None:
        if self._closed:
            raise Conflict("Another connection continues this upload.")

    def _end(self) -> None:
        if not self._closed:
            self._closed = True
            if self._handle >= 0:
                os.close(self._handle)
            self._store.forget_writer(self._part, self)


def sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _mark(part: Path) -> Path:
    return part.with_suffix(".sealed")


def _not_found(digest: str) -> NotFound:
    return NotFound(f"There is no blob {digest[:16]}.")
