"""A bucket of an S3 server: the few calls that blobs need, and their failures in our words.

Servers that speak S3 differ in what they check: some take wrong checksums, some know no conditional PUT. So nothing
here relies on a checksum of the server, botocore is told not to send the newer ones, and whoever reads bytes compares
them with a digest of ours.

What goes wrong at a running coordinator is Unavailable, or OutOfSpace: also a bucket that is gone or a key that has
expired, because the operator can mend either while everybody waits. Only `first_look`, at the start, calls them wrong
settings. No message has more of the server's answer in it than its code, so that none can hold a secret.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3.session
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from protos.errors import InvalidInput, NotFound, OutOfSpace, SilotuneError, Unavailable

# Whole blobs go in and out in pieces of this size, so many at a time; that bounds the memory.
TRANSFER = TransferConfig(
    multipart_threshold=16 << 20, multipart_chunksize=16 << 20, max_concurrency=4, io_chunksize=1 << 20, max_io_queue=16
)
# The server copies by itself; in pieces, so that no answer takes long.
COPY = TransferConfig(multipart_threshold=128 << 20, multipart_chunksize=128 << 20, max_concurrency=8)

_GONE = {"404", "NoSuchKey", "NotFound"}
_FULL = {"507", "QuotaExceeded", "XMinioStorageFull"}
# What `first_look` may hear: the HTTP status, since the answer to HEAD has no other words.
_REFUSED = {
    "301": "it is in another region",
    "400": "the server refuses the request: the region or the credentials are wrong",
    "401": "the credentials are wrong",
    "403": "access is denied",
    "404": "there is no such bucket",
}
_PERMISSIONS = (
    "GetObject, PutObject, DeleteObject, ListBucket, ListBucketMultipartUploads, ListMultipartUploadParts and "
    "AbortMultipartUpload"
)


@dataclass(frozen=True)
class Stored:
    key: str
    size: int
    age_seconds: float


@dataclass(frozen=True)
class Multipart:
    """An upload in parts that has begun and is not complete."""

    key: str
    id: str
    age_seconds: float


@dataclass(frozen=True)
class Part:
    number: int
    size: int
    etag: str


class Bucket:
    """One bucket below a prefix. Safe to use from any thread. Keys here are without the prefix."""

    def __init__(self, name: str, *, prefix: str = "", endpoint_url: str = "", region: str = "") -> None:
        self.location = f"s3://{name}/{prefix}".rstrip("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._in = {"Bucket": name}

        def client(*, connect_seconds: float, read_seconds: float, attempts: int) -> Any:
            config = Config(
                connect_timeout=connect_seconds,
                read_timeout=read_seconds,
                retries={"mode": "standard", "total_max_attempts": attempts},
                max_pool_connections=32,
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                s3={"addressing_style": "path"} if endpoint_url else {},
            )
            return session.client("s3", endpoint_url=endpoint_url or None, region_name=region or None, config=config)

        try:
            session = boto3.session.Session()
            self._client = client(connect_seconds=5, read_seconds=30, attempts=3)
            # For questions that others wait for: readiness, and what is asked while the database's write lock is held.
            self._quick = client(connect_seconds=2, read_seconds=2, attempts=1)
        except (BotoCoreError, ValueError) as error:
            raise InvalidInput(f"The settings for {self.location} cannot be used: {error}.") from None

    # --- the bucket

    def first_look(self) -> None:
        """InvalidInput when waiting will not help. A server that is away says nothing about the settings."""
        try:
            self._client.head_bucket(**self._in)
        except (BotoCoreError, ClientError) as error:
            code = _code(error)
            if code == "NoCredentialsError":
                reason = "there are no credentials"
            elif code in _REFUSED:
                reason = _REFUSED[code]
            else:
                return
            raise InvalidInput(
                f"The blob store {self.location} cannot be used: {reason}.",
                hint="Look at section [storage] of coordinator.toml, and at the credentials: those of the "
                f"environment, in ~/.aws, or of the machine's role. They must permit {_PERMISSIONS}.",
            ) from None

    def check(self) -> str:
        try:
            self._quick.head_bucket(**self._in)
        except (BotoCoreError, ClientError) as error:
            return f"the blob store {self.location} cannot be reached ({_code(error)})"
        return ""

    def objects(self, prefix: str) -> Iterator[Stored]:
        with self._in_our_words():
            for page in self._pages("list_objects_v2", prefix):
                for found in page.get("Contents", ()):
                    key = found["Key"].removeprefix(self._prefix)
                    yield Stored(key, found["Size"], _age_seconds(found["LastModified"]))

    def multiparts(self, prefix: str) -> list[Multipart]:
        """The earliest first, the same order for everybody who asks."""
        with self._in_our_words():
            found = [each for page in self._pages("list_multipart_uploads", prefix) for each in page.get("Uploads", ())]
        return [
            Multipart(each["Key"].removeprefix(self._prefix), each["UploadId"], _age_seconds(each["Initiated"]))
            for each in sorted(found, key=lambda each: (each["Initiated"], each["UploadId"]))
        ]

    # --- objects

    def size(self, key: str) -> int | None:
        """Bytes of an object; None when there is none."""
        with self._in_our_words():
            try:
                return self._quick.head_object(**self._at(key))["ContentLength"]
            except ClientError as error:
                if _code(error) not in _GONE:
                    raise
        # The answer is the same when the whole bucket is gone, and then nobody knows.
        if reason := self.check():
            raise Unavailable(f"Nothing can be looked up: {reason}.", hint="It goes on by itself.")
        return None

    def read(self, key: str, *, offset: int, length: int) -> bytes:
        """NotFound. Nothing beyond the end."""
        with self._in_our_words():
            try:
                found = self._client.get_object(**self._at(key), Range=f"bytes={offset}-{offset + length - 1}")
                return found["Body"].read()
            except ClientError as error:
                if _code(error) in ("416", "InvalidRange"):
                    return b""
                raise

    def download(self, key: str, path: Path) -> None:
        """NotFound; OutOfSpace here too when this disk is full."""
        with self._in_our_words():
            try:
                self._client.download_file(**self._at(key), Filename=str(path), Config=TRANSFER)
            except OSError as error:
                path.unlink(missing_ok=True)
                raise OutOfSpace(f"The coordinator cannot write to its disk: {error.strerror}.") from error

    def upload(self, path: Path, key: str) -> None:
        with self._in_our_words():
            self._client.upload_file(Filename=str(path), **self._at(key), Config=TRANSFER)

    def put(self, key: str, data: bytes) -> None:
        with self._in_our_words():
            self._client.put_object(**self._at(key), Body=data)

    def copy(self, source: str, key: str) -> None:
        with self._in_our_words():
            self._client.copy(CopySource=self._at(source), **self._at(key), Config=COPY)

    def delete(self, key: str) -> None:
        """One that is not there is fine."""
        with self._in_our_words():
            self._quick.delete_object(**self._at(key))

    # --- uploads in parts

    def begin(self, key: str) -> str:
        with self._in_our_words():
            return self._client.create_multipart_upload(**self._at(key))["UploadId"]

    def parts(self, multipart: Multipart) -> list[Part]:
        """In order. NotFound when the upload has ended."""
        with self._in_our_words():
            pages = self._client.get_paginator("list_parts").paginate(**self._at(multipart.key), UploadId=multipart.id)
            return [
                Part(each["PartNumber"], each["Size"], each["ETag"]) for page in pages for each in page.get("Parts", ())
            ]

    def send(self, key: str, upload_id: str, *, number: int, data: bytes) -> Part:
        """NotFound when the upload has ended."""
        with self._in_our_words():
            sent = self._client.upload_part(**self._at(key), UploadId=upload_id, PartNumber=number, Body=data)
        return Part(number, len(data), sent["ETag"])

    def complete(self, key: str, upload_id: str, parts: Sequence[Part]) -> bool:
        """Whether the parts became the object; no when the upload has ended, or its parts are not these."""
        listed = [{"PartNumber": part.number, "ETag": part.etag} for part in parts]
        with self._in_our_words():
            try:
                self._client.complete_multipart_upload(
                    **self._at(key), UploadId=upload_id, MultipartUpload={"Parts": listed}
                )
            except ClientError as error:
                if _code(error) in ("NoSuchUpload", "InvalidPart", "InvalidPartOrder", "EntityTooSmall"):
                    return False
                raise
        return True

    def abort(self, multipart: Multipart) -> None:
        """One that has ended is fine."""
        with self._in_our_words():
            try:
                self._client.abort_multipart_upload(**self._at(multipart.key), UploadId=multipart.id)
            except ClientError as error:
                if _code(error) != "NoSuchUpload" and _code(error) not in _GONE:
                    raise

    def _at(self, key: str) -> dict[str, str]:
        return {**self._in, "Key": self._prefix + key}

    def _pages(self, call: str, prefix: str) -> Iterator[dict[str, Any]]:
        return iter(self._client.get_paginator(call).paginate(**self._in, Prefix=self._prefix + prefix))

    @contextmanager
    def _in_our_words(self) -> Iterator[None]:
        try:
            yield
        except (BotoCoreError, ClientError, Boto3Error) as error:
            # boto3 hides what happened to a managed upload behind an error of its own.
            cause = error.__context__ if isinstance(error, Boto3Error) else error
            raise self._as_ours(_code(cause)) from error

    def _as_ours(self, code: str) -> SilotuneError:
        if code in _GONE or code == "NoSuchUpload":
            return NotFound(f"The blob store {self.location} does not have it.")
        if code in _FULL:
            return OutOfSpace(
                f"The blob store {self.location} is full ({code}).", hint="It goes on by itself when there is room."
            )
        return Unavailable(
            f"The blob store {self.location} cannot be used now ({code}).",
            hint="Nothing is lost, and it goes on by itself; if it does not, its operator must look at it.",
        )


def _code(error: BaseException | None) -> str:
    """What the server calls it, or the class of what kept us from the server."""
    if isinstance(error, ClientError):
        return str(error.response.get("Error", {}).get("Code", "unknown"))
    return type(error).__name__


def _age_seconds(when: Any) -> float:
    return time.time() - when.timestamp()
