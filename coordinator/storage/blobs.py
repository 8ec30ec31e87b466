"""Blobs: sealed, immutable runs of bytes named by their BLAKE3 digest, and the uploads that become them.

`BlobStore` is what the rest of the coordinator sees: files in a directory (file_blobs.py) or objects in a bucket
(s3.py). An upload is known by owner and digest, so two sites that send the same bytes do not meet, and neither can
learn what the other has. What the protocol speaks of is a committed offset and not files, because an object store
commits whole parts only: there an offset may lag behind what was appended when another process goes on with an upload,
and a client that asks where to go on simply sends a little again.

Everything here is synchronous; callers with an event loop use threads. A store that is away raises Unavailable, a full
one OutOfSpace, whatever is asked of it: both pass, and the same call made again goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class StoredBlob:
    """A sealed blob in a listing. Its age is a hint and no more: it is by the clock of whoever keeps it."""

    digest: str
    size: int
    age_seconds: float


@dataclass(frozen=True)
class UnfinishedUpload:
    """What is kept of an upload. Without an owner it is what a killed coordinator had begun to seal."""

    owner: str
    digest: str
    age_seconds: float


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
        """At most `length` bytes of a sealed blob, from its local file where there is one. NotFound.

        Where there is none, nobody has compared them with the digest.
        """

    def path(self, digest: str) -> Path:
        """A local file with a sealed blob's bytes, to be read at once. NotFound; CorruptData: the blob is damaged."""

    def verify(self, digest: str) -> None:
        """Looks at the bytes themselves, whatever was seen before; a wrong copy of a blob that is right is replaced.

        NotFound; CorruptData: the blob is damaged.
        """

    def in_use(self, digest: str) -> AbstractContextManager[None]:
        """Until the block ends the local file stays, once there is one. Waits for nothing."""

    def local(self, digest: str) -> AbstractContextManager[Path]:
        """The same for longer: the file stays until the block ends."""

    def adopt(self, path: Path) -> tuple[str, int]:
        """Seals a local file, which is moved away: (digest, size)."""

    def delete(self, digest: str) -> None:
        """Forgets a sealed blob; one that is not there is fine."""

    def forget_upload(self, owner: str, digest: str) -> None:
        """Drops what is kept of an upload, once its seal is on record or nobody wants it; a blob stays."""

    def spare_bytes(self) -> int:
        """Free space above the reserve; negative when the reserve is touched."""

    def stored(self) -> Iterator[StoredBlob]:
        """Every sealed blob."""

    def unfinished(self) -> Iterator[UnfinishedUpload]:
        """Every upload of which something is kept."""

    def drop_unfinished(self, owner: str, digest: str) -> None:
        """Drops what `unfinished` told of."""

    def check(self) -> str:
        """Why the store cannot be used now; empty when it can."""

    @property
    def location(self) -> str:
        """Which store this is, for good: a database remembers the one that its rows speak of."""
