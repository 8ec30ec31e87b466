"""FileBlobStore: blobs as files of one directory, for one process.

uploads/<owner>/<digest>.part     grows by appending; its length is the committed offset
uploads/<owner>/<digest>.sealed   the part became a blob, and its owner may not have heard of it yet
blobs/<first two>/<digest>        sealed: hashed, synced, renamed, directory synced, and only then acknowledged
store-id                          which store this is; it moves with the directory
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from coordinator.storage.blobs import StoredBlob, UnfinishedUpload
from protos.digests import DIGEST, check_digest, new_hasher
from protos.errors import Conflict, CorruptData, InvalidInput, NotFound, OutOfSpace, WrongOffset
from protos.identity import check_name

HASH_BLOCK_BYTES = 4 << 20
# Unfinished uploads of one owner, besides the one that it writes.
KEPT_PARTS = 2


class FileBlobStore:
    """BlobStore over a directory of one file system, for one process."""

    def __init__(self, directory: Path, *, reserve_bytes: int) -> None:
        self._id = directory / "store-id"
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
        part = self.part(owner, digest)
        try:
            return part.stat().st_size
        except FileNotFoundError:
            return (self.size(digest) or 0) if _mark(part).exists() else 0

    def open_upload(self, owner: str, digest: str, *, size: int, at_least: int = 0) -> FileUpload:
        """`at_least`: so many first bytes are kept elsewhere; where the part lacks them, it has a hole."""
        part = self.part(owner, digest)
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
            upload.start(at_least=at_least)
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

    def verify(self, digest: str) -> None:
        try:
            found = digest_of_file(self._sealed(digest))[0]
        except FileNotFoundError:
            raise _not_found(digest) from None
        if found != digest:
            raise CorruptData(f"The blob {digest[:16]} is damaged on the coordinator's disk.")

    def in_use(self, digest: str) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def local(self, digest: str) -> Iterator[Path]:
        yield self.path(digest)

    def adopt(self, path: Path) -> tuple[str, int]:
        digest, size = digest_of_file(path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        self.keep(path, digest)
        return digest, size

    def delete(self, digest: str) -> None:
        self._sealed(digest).unlink(missing_ok=True)

    def forget_upload(self, owner: str, digest: str) -> None:
        part = self.part(owner, digest)
        with self._lock:
            writer = self._writers.get(part)
        if writer is not None:
            writer.close()
        part.unlink(missing_ok=True)
        _mark(part).unlink(missing_ok=True)

    def spare_bytes(self) -> int:
        return shutil.disk_usage(self._blobs).free - self._reserve_bytes

    def stored(self) -> Iterator[StoredBlob]:
        for path in self._blobs.glob("*/*"):
            if not DIGEST.fullmatch(path.name):
                continue  # Of the file system's own, such as NFS makes.
            with suppress(FileNotFoundError):
                status = path.stat()
                yield StoredBlob(path.name, status.st_size, time.time() - status.st_mtime)

    def unfinished(self) -> Iterator[UnfinishedUpload]:
        for path in self._uploads.glob("*/*"):
            if not DIGEST.fullmatch(path.stem):
                continue
            with suppress(FileNotFoundError):
                yield UnfinishedUpload(path.parent.name, path.stem, time.time() - path.stat().st_mtime)

    def drop_unfinished(self, owner: str, digest: str) -> None:
        self.forget_upload(owner, digest)

    def check(self) -> str:
        try:
            with tempfile.TemporaryFile(dir=self._uploads):
                return ""
        except OSError as error:
            return f"the blob directory cannot be written: {error.strerror}"

    @property
    def location(self) -> str:
        if not self._id.exists():
            fresh = self._id.with_suffix(".new")
            with fresh.open("w") as file:
                file.write(str(uuid.uuid4()))
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, self._id)
            sync_directory(self._id.parent)
        return f"files:{self._id.read_text()}"

    def keep(self, path: Path, digest: str) -> None:
        """Moves a synced file to its name; from when this returns it survives a power cut."""
        target = self._sealed(digest)
        if not target.parent.is_dir():
            target.parent.mkdir(exist_ok=True)
            sync_directory(self._blobs)
        # A part that waited for days is a young blob: it is old when nothing has named it for long.
        os.utime(path)
        os.replace(path, target)
        sync_directory(target.parent)

    def forget_writer(self, part: Path, writer: FileUpload) -> None:
        with self._lock:
            if self._writers.get(part) is writer:
                del self._writers[part]

    def _sealed(self, digest: str) -> Path:
        return self._blobs / check_digest(digest)[:2] / digest

    def part(self, owner: str, digest: str) -> Path:
        return self._uploads / check_name(owner) / f"{check_digest(digest)}.part"


class FileUpload:
    """The one writer of a part file. A write that fails half-way leaves a shorter prefix, which is a valid part."""

    def __init__(self, store: FileBlobStore, part: Path, *, digest: str, size: int) -> None:
        self._store = store
        self.path = part
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

    def start(self, *, at_least: int = 0) -> None:
        """Opens the part and hashes what it already has."""
        with self._lock:
            self._check_open()
            if not self.path.exists() and _mark(self.path).exists():
                if self._store.size(self._digest) == self._size:
                    self._sealed = True
                    self.offset = self._size
                    return
                # The blob was deleted since, because nothing named it.
                _mark(self.path).unlink(missing_ok=True)
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            if os.fstat(self._handle).st_size < at_least:
                os.ftruncate(self._handle, at_least)
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

    def kept(self, offset: int, *, length: int) -> bytes:
        """Some of the bytes that arrived."""
        with self._lock:
            self._check_open()
            return os.pread(self._handle, length, offset)

    def is_right(self) -> bool:
        """Whether the part is the blob. Conflict when another writer took over."""
        with self._lock:
            self._check_open()
            return self._is_right()

    def _is_right(self) -> bool:
        return self.offset == self._size and self._hasher.hexdigest() == self._digest

    def seal(self) -> None:
        with self._lock:
            self._check_open()
            if self._sealed:
                return
            if not self._is_right():
                self.path.unlink(missing_ok=True)
                self._end()
                raise CorruptData(
                    f"The {self.offset} uploaded bytes are not the announced {self._size} with digest {self._digest}.",
                    hint="The upload was discarded and begins anew.",
                )
            os.fsync(self._handle)
            # A crash between the rename and the record of it must not cost the owner the upload.
            _mark(self.path).touch()
            sync_directory(self.path.parent)
            self._store.keep(self.path, self._digest)
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
            self._store.forget_writer(self.path, self)


def digest_of_file(path: Path) -> tuple[str, int]:
    hasher = new_hasher()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            hasher.update(block)
        return hasher.hexdigest(), file.tell()


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
