"""S3BlobStore: blobs as objects of a bucket, for any number of coordinators at a time.

    <prefix>/blobs/<first two>/<digest>   sealed
    <prefix>/uploads/<owner>/<digest>     the upload; first in parts, then an object until `forget_upload`

What is in the bucket is the truth. An upload commits whole parts of PART_BYTES there, and any replica goes on after the
last of them. It is sealed in two steps: the parts become an object of the owner's, which is shown to have the digest,
and only then the server copies that to the digest's own key.

On the coordinator's own disk lies only what can be lost: copies (copies.py), and the upload once more. So a reconnect
to the same coordinator goes on at the very byte, links that break before a part is full get on too, and the digest is
computed as the bytes arrive. When another replica has the beginning, the file here has a hole; then the object is read
back before it is sealed.

What the server hands out is compared with the digest when a copy is made, and models are served from copies: a site
waits for the whole copy before its first byte, but one wrong answer of the server never reaches it. Memory:
MOST_SENDING parts that are being sent, and one transfer of whole blobs (bucket.TRANSFER).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from coordinator.storage.blobs import StoredBlob, UnfinishedUpload
from coordinator.storage.bucket import Bucket, Multipart, Part, Stored
from coordinator.storage.copies import Copies
from coordinator.storage.file_blobs import FileUpload, digest_of_file
from protos.digests import DIGEST, check_digest
from protos.errors import CorruptData, InvalidInput, NotFound, Unavailable
from protos.identity import check_name

# S3 wants 5 MiB at least for all but the last part, and 10,000 parts at most.
PART_BYTES = 8 << 20
MAX_PARTS = 10_000
# Parts of all uploads on their way at a time; who has another one ready waits.
MOST_SENDING = 8
# Unfinished uploads of one owner, besides the one that it writes.
KEPT_UPLOADS = 2


class S3BlobStore:
    """BlobStore over a bucket; `directory` is this process's own."""

    def __init__(self, bucket: Bucket, *, directory: Path, reserve_bytes: int, cache_bytes: int) -> None:
        self._bucket = bucket
        self._copies = Copies(directory, reserve_bytes=reserve_bytes, budget_bytes=cache_bytes)
        # One download of a whole blob at a time; it is parallel by itself, and who waits may want the same.
        self._downloading = threading.Lock()
        self.senders = ThreadPoolExecutor(MOST_SENDING, thread_name_prefix="s3")

    def size(self, digest: str) -> int | None:
        return self._bucket.size(_sealed(digest))

    def committed_size(self, owner: str, digest: str) -> int:
        key = _upload(owner, digest)
        complete = self._bucket.size(key)
        if complete is not None:
            return complete
        _, parts = self._begun(key, self._bucket.multiparts(key))
        return max(sum(part.size for part in parts), self._copies.files.committed_size(owner, digest))

    def open_upload(self, owner: str, digest: str, *, size: int) -> S3Upload:
        if size > PART_BYTES * MAX_PARTS:
            raise InvalidInput(f"The blob has {size} bytes; S3 takes {PART_BYTES * MAX_PARTS} at most.")
        key = _upload(owner, digest)
        parts: list[Part] = []
        upload_id = ""
        complete = self._bucket.size(key)
        if complete is None:
            begun = self._bucket.multiparts(f"uploads/{owner}/")
            self._drop_old(key, begun)
            upload_id, parts = self._begun(key, begun, size=size)
        self._copies.make_room(size)
        committed = sum(part.size for part in parts) if complete is None else complete
        spool = self._copies.files.open_upload(owner, digest, size=size, at_least=committed)
        upload = S3Upload(self, self._bucket, self._copies, spool, owner=owner, digest=digest, size=size)
        upload.is_complete, upload.upload_id, upload.parts = complete is not None, upload_id, parts
        return upload

    def _begun(self, key: str, begun: list[Multipart], *, size: int | None = None) -> tuple[str, list[Part]]:
        """The upload in parts that everybody goes on with, and its parts up to the first that is missing or odd."""
        parts: list[Part] = []
        for multipart in begun:
            if multipart.key != key:
                continue
            try:
                found = self._bucket.parts(multipart)
            except NotFound:
                continue  # It ended since it was listed.
            for part in found:
                left = part.size if size is None else size - len(parts) * PART_BYTES
                if part.number != len(parts) + 1 or part.size != min(PART_BYTES, left):
                    break
                parts.append(part)
            return multipart.id, parts
        return "", parts

    def _drop_old(self, wanted: str, begun: list[Multipart]) -> None:
        """Keeps the owner's newest uploads: what it began and did not go on with is not what it is working on."""
        others = list(dict.fromkeys(multipart.key for multipart in reversed(begun) if multipart.key != wanted))
        for multipart in begun:
            if multipart.key in others[KEPT_UPLOADS:]:
                self._bucket.abort(multipart)

    def read(self, digest: str, *, offset: int, length: int) -> bytes:
        copied = self._copies.read(digest, offset=offset, length=length)
        return self._bucket.read(_sealed(digest), offset=offset, length=length) if copied is None else copied

    def path(self, digest: str) -> Path:
        found = self._copies.find(digest)
        if found is not None:
            return found
        with self._downloading:
            found = self._copies.find(digest)
            if found is not None:
                return found
            size = self.size(digest)
            if size is None:
                raise NotFound(f"There is no blob {digest[:16]}.")
            with self.download(_sealed(digest), size=size) as (copy, copied):
                if copied != digest:
                    raise CorruptData(f"The blob {digest[:16]} is damaged in {self.location}.")
                return self._copies.keep(copy, digest)

    def verify(self, digest: str) -> None:
        self._copies.verify(digest)
        self.path(digest)

    def in_use(self, digest: str) -> AbstractContextManager[None]:
        return self._copies.in_use(digest)

    @contextmanager
    def local(self, digest: str) -> Iterator[Path]:
        with self.in_use(digest):
            yield self.path(digest)

    @contextmanager
    def download(self, key: str, *, size: int) -> Iterator[tuple[Path, str]]:
        """A file that nobody else knows, and the digest of what is in it; gone at the end, unless it was kept."""
        path = self._copies.new_path(size)
        try:
            self._bucket.download(key, path)
            yield path, digest_of_file(path)[0]
        finally:
            path.unlink(missing_ok=True)

    def adopt(self, path: Path) -> tuple[str, int]:
        digest, size = digest_of_file(path)
        self._bucket.upload(path, _sealed(digest))
        self._copies.keep(path, digest)
        return digest, size

    def delete(self, digest: str) -> None:
        self._bucket.delete(_sealed(digest))
        self._copies.drop(digest)

    def forget_upload(self, owner: str, digest: str) -> None:
        key = _upload(owner, digest)
        self._copies.files.forget_upload(owner, digest)
        self._bucket.delete(key)
        self._abort(key)

    def spare_bytes(self) -> int:
        return self._copies.spare_bytes()

    def stored(self) -> Iterator[StoredBlob]:
        for found in self._bucket.objects("blobs/"):
            digest = found.key.rpartition("/")[2]
            if DIGEST.fullmatch(digest):
                yield StoredBlob(digest, found.size, found.age_seconds)

    def unfinished(self) -> Iterator[UnfinishedUpload]:
        """Here and in the bucket, with the age of what is youngest."""
        ages = {(part.owner, part.digest): part.age_seconds for part in self._copies.files.unfinished()}
        begun: list[Stored | Multipart] = [*self._bucket.objects("uploads/"), *self._bucket.multiparts("uploads/")]
        for each in begun:
            which = each.key.removeprefix("uploads/").partition("/")[::2]
            ages[which] = min(each.age_seconds, ages.get(which, each.age_seconds))
        for half in self._bucket.multiparts("blobs/"):
            ages["", half.key.rpartition("/")[2]] = half.age_seconds
        for (owner, digest), age_seconds in ages.items():
            yield UnfinishedUpload(owner, digest, age_seconds)

    def drop_unfinished(self, owner: str, digest: str) -> None:
        if owner:
            self.forget_upload(owner, digest)
        else:
            self._abort(_sealed(digest))

    def check(self) -> str:
        return self._bucket.check() or self._copies.files.check()

    @property
    def location(self) -> str:
        return self._bucket.location

    def _abort(self, key: str) -> None:
        for multipart in self._bucket.multiparts(key):
            self._bucket.abort(multipart)


class S3Upload:
    """The one writer of an upload at this coordinator.

    Another replica's writer of the same upload does no harm: the digest says which bytes are at each offset, so it
    sends the same parts. Where a site lies about them, that is noticed when the upload is sealed or a copy is made.
    """

    def __init__(
        self,
        store: S3BlobStore,
        bucket: Bucket,
        copies: Copies,
        spool: FileUpload,
        *,
        owner: str,
        digest: str,
        size: int,
    ) -> None:
        self._store = store
        self._bucket = bucket
        self._copies = copies
        self._spool = spool
        self._owner = owner
        self._digest = digest
        self._size = size
        self._key = _upload(owner, digest)
        self._is_sealed = False
        # What the bucket has: the object, or parts of it.
        self.is_complete = False
        self.upload_id = ""
        self.parts: list[Part] = []
        self._sending: Future[Part] | None = None

    @property
    def offset(self) -> int:
        return self._spool.offset

    def append(self, data: bytes | memoryview, *, offset: int) -> None:
        self._spool.append(data, offset=offset)
        while self._unsent_bytes >= PART_BYTES:
            self._send_next()

    def seal(self) -> None:
        if self._is_sealed:
            return
        is_right = self._spool.is_right()
        if self._spool.offset != self._size:
            raise self._corrupt()
        if not self.is_complete:
            self._complete()
        if is_right:
            self._publish(self._spool.path)
        else:
            # Another replica saw the beginning, or the file here is damaged, or the bytes are wrong.
            with self._store.download(self._key, size=self._size) as (copy, found):
                if found != self._digest:
                    raise self._corrupt()
                self._publish(copy)
        self._is_sealed = True

    def _publish(self, copy: Path) -> None:
        """`copy` was seen to be right."""
        with suppress(FileNotFoundError):  # Another writer of the same upload has taken it there.
            if self._store.size(self._digest) != self._size:
                self._bucket.copy(self._key, _sealed(self._digest))
            else:
                # It may be damaged, which is why a site was asked again. What is someone's blob already is replaced by
                # what is here only: the owner's object may have changed since it was looked at.
                self._bucket.upload(copy, _sealed(self._digest))
            self._copies.keep(copy, self._digest)

    def close(self) -> None:
        if self._sending is not None:
            # Whether it arrives or not: who goes on must not have to guess.
            wait([self._sending])
        self._spool.close()

    @property
    def _unsent_bytes(self) -> int:
        if self.is_complete:
            return 0
        sent_bytes = sum(part.size for part in self.parts) + (PART_BYTES if self._sending else 0)
        return self._spool.offset - sent_bytes

    def _send_next(self) -> None:
        """Begins to send the next part, so that the one after it is received meanwhile."""
        self._wait_for_part()
        self._sending = self._store.senders.submit(self._send, len(self.parts))

    def _wait_for_part(self) -> None:
        sending, self._sending = self._sending, None
        if sending is not None:
            self.parts.append(sending.result())

    def _send(self, index: int) -> Part:
        data = self._spool.kept(index * PART_BYTES, length=PART_BYTES)
        if not self.upload_id:
            self.upload_id = self._bucket.begin(self._key)
        try:
            return self._bucket.send(self._key, self.upload_id, number=index + 1, data=data)
        except NotFound as error:
            raise _ended_elsewhere() from error

    def _complete(self) -> None:
        if not self.upload_id and self._size < PART_BYTES:
            self._bucket.put(self._key, self._spool.kept(0, length=PART_BYTES))
        else:
            while self._unsent_bytes > 0:
                self._send_next()
            self._wait_for_part()
            if not self._bucket.complete(self._key, self.upload_id, self.parts) and not self._bucket.size(self._key):
                # With parts that the server will not put together it begins anew, from the file here if that is whole.
                self._bucket.abort(Multipart(self._key, self.upload_id, 0))
                raise _ended_elsewhere()
        self.is_complete = True

    def _corrupt(self) -> CorruptData:
        self._store.forget_upload(self._owner, self._digest)
        return CorruptData(
            f"The {self._spool.offset} uploaded bytes are not the announced {self._size} with digest {self._digest}.",
            hint="The upload was discarded and begins anew.",
        )


def _ended_elsewhere() -> Unavailable:
    return Unavailable("The upload ended at the blob store while it was written.", hint="It goes on by itself.")


def _sealed(digest: str) -> str:
    return f"blobs/{check_digest(digest)[:2]}/{digest}"


def _upload(owner: str, digest: str) -> str:
    return f"uploads/{check_name(owner)}/{check_digest(digest)}"
