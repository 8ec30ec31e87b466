"""What blobs in S3 promise beyond what every blob store does: replicas, a server that goes away, damage, copies."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.settings import Public, Settings, Storage
from coordinator.storage.blobs import UnfinishedUpload
from coordinator.storage.bucket import Bucket
from coordinator.storage.opening import open_storage
from coordinator.storage.s3 import PART_BYTES, S3BlobStore
from protos.digests import digest_of
from protos.errors import Conflict, CorruptData, InvalidInput, NotFound, OutOfSpace, Unavailable
from tests.servers.s3 import S3Server, s3

NAME = "silotune-s3"
CONTENT = os.urandom(2 * PART_BYTES + 300_000)
DIGEST = digest_of(CONTENT)
OWNER = "st-olav"
SEALED, UPLOAD = f"blobs/{DIGEST[:2]}/{DIGEST}", f"uploads/{OWNER}/{DIGEST}"
# Ends inside the second part.
CUT = PART_BYTES + 1_000_000

Replica = Callable[..., S3BlobStore]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3(tmp_path_factory.mktemp("s3")) as started, pytest.MonkeyPatch.context() as patch:
        for name, value in started.environment.items():
            patch.setenv(name, value)
        started.bucket(NAME)
        yield started


@pytest.fixture
def bucket(server: S3Server) -> Bucket:
    return Bucket(NAME, prefix=str(uuid.uuid4()), endpoint_url=server.url)


@pytest.fixture
def replica(bucket: Bucket, tmp_path: Path) -> Replica:
    """A coordinator's store on the shared bucket; the same name is the same disk, after a restart."""

    def opened(name: str = "first", *, cache_bytes: int = 1 << 30, reserve_bytes: int = 0) -> S3BlobStore:
        return S3BlobStore(bucket, directory=tmp_path / name, reserve_bytes=reserve_bytes, cache_bytes=cache_bytes)

    return opened


def put(store: S3BlobStore, content: bytes, *, owner: str = OWNER) -> str:
    digest = digest_of(content)
    upload = store.open_upload(owner, digest, size=len(content))
    upload.append(content[upload.offset :], offset=upload.offset)
    upload.seal()
    upload.close()
    store.forget_upload(owner, digest)
    return digest


def wait_for_a_part(bucket: Bucket) -> None:
    """Parts are sent while the next bytes are appended."""
    while not any(bucket.parts(begun) for begun in bucket.multiparts("uploads/")):
        time.sleep(0.01)


KILLED_WRITER = """
import sys, time
from pathlib import Path
from coordinator.storage.bucket import Bucket
from coordinator.storage.opening import open_storage
from coordinator.storage.s3 import S3BlobStore

bucket, prefix, url, directory, file, cut, owner, digest = sys.argv[1:]
store = S3BlobStore(Bucket(bucket, prefix=prefix, endpoint_url=url), directory=Path(directory), reserve_bytes=0,
                    cache_bytes=1 << 30)
content = Path(file).read_bytes()
store.open_upload(owner, digest, size=len(content)).append(content[: int(cut)], offset=0)
print("written", flush=True)
time.sleep(600)
"""


def test_another_replica_goes_on_after_the_last_whole_part_of_a_killed_one(
    server: S3Server, bucket: Bucket, replica: Replica, tmp_path: Path
):
    (tmp_path / "content").write_bytes(CONTENT)
    prefix = bucket.location.rpartition("/")[2]
    arguments = [NAME, prefix, server.url, str(tmp_path / "killed"), str(tmp_path / "content"), str(CUT), OWNER, DIGEST]
    with subprocess.Popen([sys.executable, "-c", KILLED_WRITER, *arguments], stdout=subprocess.PIPE) as writer:
        assert writer.stdout and writer.stdout.readline() == b"written\n"
        wait_for_a_part(bucket)
        writer.kill()
    other = replica("other")
    assert other.committed_size(OWNER, DIGEST) == PART_BYTES
    assert other.committed_size("elsewhere", DIGEST) == 0
    upload = other.open_upload(OWNER, DIGEST, size=len(CONTENT))
    assert upload.offset == PART_BYTES
    # The killed one, started again, knows more than the bucket.
    assert replica("killed").committed_size(OWNER, DIGEST) == CUT
    upload.append(CONTENT[PART_BYTES:], offset=PART_BYTES)
    upload.seal()
    assert replica("third").path(DIGEST).read_bytes() == CONTENT


def test_replicas_that_write_the_same_upload_at_the_same_time_do_no_harm(replica: Replica):
    stores = [replica(name) for name in ("first", "second")]
    for take, other in ((0, 1), (1, 0)):
        upload = stores[take].open_upload(OWNER, DIGEST, size=len(CONTENT))
        upload.append(CONTENT[upload.offset : upload.offset + CUT // 2], offset=upload.offset)
        late = stores[other].open_upload(OWNER, DIGEST, size=len(CONTENT))
        late.append(CONTENT[late.offset : late.offset + CUT], offset=late.offset)
    ends: list[object] = []

    def finish(store: S3BlobStore) -> None:
        while True:
            try:
                upload = store.open_upload(OWNER, DIGEST, size=len(CONTENT))
                upload.append(CONTENT[upload.offset :], offset=upload.offset)
                upload.seal()
                return ends.append("sealed")
            except (Unavailable, CorruptData):
                # The other one was first, or moto, whose parts are not safe from each other, mixed the two: the digest
                # says so, and an agent comes again.
                continue
            except BaseException as error:
                return ends.append(error)

    threads = [threading.Thread(target=finish, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert ends == ["sealed", "sealed"]
    assert replica("third").path(DIGEST).read_bytes() == CONTENT


def test_an_upload_whose_completion_was_answered_to_nobody_is_sealed(replica: Replica, monkeypatch: pytest.MonkeyPatch):
    complete = Bucket.complete

    def answered_when_repeated(*arguments: Any) -> bool:
        """As Amazon's does; moto says yes once more."""
        assert complete(*arguments)
        return False

    monkeypatch.setattr(Bucket, "complete", answered_when_repeated)
    put(replica(), CONTENT)
    assert replica("other").path(DIGEST).read_bytes() == CONTENT


def test_a_part_that_does_not_follow_the_others_is_not_counted(bucket: Bucket, replica: Replica):
    begun = bucket.begin(UPLOAD)
    bucket.send(UPLOAD, begun, number=2, data=CONTENT[PART_BYTES : 2 * PART_BYTES])
    store = replica()
    assert store.committed_size(OWNER, DIGEST) == 0
    put(store, CONTENT)
    assert replica("other").path(DIGEST).read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["first", "other"])
def test_a_kill_between_the_object_and_its_own_name_costs_no_byte(
    replica: Replica, monkeypatch: pytest.MonkeyPatch, name: str
):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    upload = replica().open_upload(OWNER, DIGEST, size=len(CONTENT))
    upload.append(CONTENT, offset=0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Bucket, "copy", killed)
        upload.seal()
    store = replica(name)
    assert store.size(DIGEST) is None
    assert store.committed_size(OWNER, DIGEST) == len(CONTENT)
    again = store.open_upload(OWNER, DIGEST, size=len(CONTENT))
    assert again.offset == len(CONTENT)
    again.seal()
    assert replica("third").path(DIGEST).read_bytes() == CONTENT


def test_wrong_bytes_that_another_replica_took_are_never_sealed(bucket: Bucket, replica: Replica):
    wrong = b"wrong" + CONTENT[5:]
    replica().open_upload(OWNER, DIGEST, size=len(CONTENT)).append(wrong[:CUT], offset=0)
    wait_for_a_part(bucket)
    upload = replica("other").open_upload(OWNER, DIGEST, size=len(CONTENT))
    upload.append(CONTENT[PART_BYTES:], offset=PART_BYTES)
    with pytest.raises(CorruptData):
        upload.seal()
    bucket.put(UPLOAD, wrong)
    complete = replica("third").open_upload(OWNER, DIGEST, size=len(CONTENT))
    assert complete.offset == len(CONTENT)
    with pytest.raises(CorruptData):
        complete.seal()
    store = replica("fourth")
    assert (store.size(DIGEST), store.committed_size(OWNER, DIGEST)) == (None, 0)
    put(store, CONTENT)


def test_an_upload_goes_on_at_its_byte_when_the_server_was_away(server: S3Server, replica: Replica):
    if not server.can_stop:
        pytest.skip("this S3 server cannot be stopped")
    store = replica()
    upload = store.open_upload(OWNER, DIGEST, size=len(CONTENT))
    upload.append(CONTENT[:CUT], offset=0)
    server.stop()
    try:
        with pytest.raises(Unavailable, match="s3://") as caught:
            upload.append(CONTENT[CUT:], offset=CUT)
            upload.seal()
        assert "testing-secret" not in str(caught.value)
        upload.close()
        for access in (
            lambda: store.open_upload(OWNER, DIGEST, size=len(CONTENT)),
            lambda: store.size(DIGEST),
            lambda: store.path(DIGEST),
            lambda: store.read(DIGEST, offset=0, length=1),
            lambda: list(store.stored()),
        ):
            with pytest.raises(Unavailable):
                access()
        assert "cannot be reached" in store.check()
    finally:
        server.start()
    assert store.check() == ""
    again = store.open_upload(OWNER, DIGEST, size=len(CONTENT))
    assert again.offset == len(CONTENT)
    again.seal()
    assert replica("other").path(DIGEST).read_bytes() == CONTENT


def test_an_upload_that_the_server_dropped_is_sent_to_it_again_and_not_asked_of_the_site(
    bucket: Bucket, replica: Replica
):
    store = replica()
    upload = store.open_upload(OWNER, DIGEST, size=len(CONTENT))
    upload.append(CONTENT[:CUT], offset=0)
    wait_for_a_part(bucket)
    for begun in bucket.multiparts("uploads/"):
        bucket.abort(begun)
    with pytest.raises(Unavailable):
        upload.append(CONTENT[CUT:], offset=CUT)
        upload.seal()
    again = store.open_upload(OWNER, DIGEST, size=len(CONTENT))
    assert again.offset == len(CONTENT)
    again.seal()
    assert replica("other").path(DIGEST).read_bytes() == CONTENT


def test_an_owner_keeps_its_newest_unfinished_uploads_only(bucket: Bucket, replica: Replica):
    begun = [bytes([number]) + CONTENT[:PART_BYTES] for number in range(5)]
    for content in begun:
        upload = replica().open_upload(OWNER, digest_of(content), size=len(content))
        upload.append(content[:PART_BYTES], offset=0)
        upload.close()
    kept = {multipart.key.rpartition("/")[2] for multipart in bucket.multiparts("uploads/")}
    assert len(kept) == 3 and digest_of(begun[-1]) in kept


def test_what_a_killed_coordinator_left_half_sealed_is_listed_and_dropped(bucket: Bucket, replica: Replica):
    bucket.begin(SEALED)
    store = replica()
    (half,) = store.unfinished()
    assert half == UnfinishedUpload("", DIGEST, half.age_seconds)
    store.drop_unfinished(half.owner, half.digest)
    assert list(store.unfinished()) == []


def test_a_damaged_copy_is_replaced_and_a_damaged_object_is_said_to_be(bucket: Bucket, replica: Replica):
    put(replica(), CONTENT)
    copy = replica().path(DIGEST)
    copy.write_bytes(b"damage" + CONTENT[6:])
    assert replica().path(DIGEST).read_bytes() == CONTENT
    bucket.put(SEALED, b"damage" + CONTENT[6:])
    assert replica().path(DIGEST).read_bytes() == CONTENT
    other = replica("other")
    for _ in range(2):
        with pytest.raises(CorruptData, match="damaged"):
            other.path(DIGEST)
    # An upload of the same bytes mends it, as if it had not been there.
    put(other, CONTENT)
    assert replica("third").path(DIGEST).read_bytes() == CONTENT


def test_a_copy_that_went_bad_after_it_was_seen_to_be_right_is_made_again(bucket: Bucket, replica: Replica):
    store = replica()
    put(store, CONTENT)
    store.path(DIGEST).write_bytes(b"damage" + CONTENT[6:])
    store.verify(DIGEST)
    assert store.path(DIGEST).read_bytes() == CONTENT
    bucket.put(SEALED, b"damage" + CONTENT[6:])
    other = replica("other")
    for _ in range(2):
        with pytest.raises(CorruptData, match="damaged"):
            other.verify(DIGEST)
    bucket.delete(SEALED)
    with pytest.raises(NotFound):
        other.verify(DIGEST)


def test_a_seal_that_fails_leaves_no_download_behind(replica: Replica, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    opened = replica().open_upload(OWNER, DIGEST, size=len(CONTENT))
    opened.append(CONTENT, offset=0)

    def away(*_: object) -> None:
        raise Unavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "copy", away)
        patch.setattr(Bucket, "upload", away)
        for name in ("first", "other", "other"):
            upload = replica(name).open_upload(OWNER, DIGEST, size=len(CONTENT))
            with pytest.raises(Unavailable, match="away"):
                upload.seal()
            upload.close()
    assert list((tmp_path / "other" / "downloads").iterdir()) == []
    put(replica("other"), CONTENT)


def test_copies_beyond_the_budget_go_the_least_recently_used_first_and_never_one_in_use(replica: Replica):
    contents = [os.urandom(100_000) for _ in range(4)]
    digests = [put(replica("writer"), content) for content in contents]
    store = replica(cache_bytes=250_000)
    with store.local(digests[0]) as used:
        paths = [store.path(digest) for digest in digests[1:3]]
        assert not paths[0].exists()
        assert [path.read_bytes() for path in (used, paths[1])] == [contents[0], contents[2]]
        last = store.path(digests[3])
        assert used.exists() and last.exists() and not paths[1].exists()
    assert store.path(digests[1]).read_bytes() == contents[1]
    assert last.exists() and not used.exists()
    assert store.read(digests[0], offset=99_999, length=10) == contents[0][99_999:]


def test_a_copy_needs_room_on_the_disk(replica: Replica):
    put(replica("writer"), CONTENT)
    with pytest.raises(OutOfSpace, match="no room for a copy"):
        replica(reserve_bytes=1 << 62).path(DIGEST)


def test_settings_that_cannot_work_are_told_from_a_server_that_is_away(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    absent = Bucket("silotune-no-such-bucket", endpoint_url=server.url)
    with pytest.raises(InvalidInput, match="s3://silotune-no-such-bucket cannot be used: there is no such bucket"):
        absent.first_look()
    # Later it is waited for, and nobody takes a bucket that is gone for one without the blob.
    with pytest.raises(Unavailable):
        absent.size(SEALED)
    away = Bucket(NAME, endpoint_url="http://127.0.0.1:1")
    away.first_look()
    assert "cannot be reached" in away.check()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(InvalidInput, match="there are no credentials"):
        Bucket(NAME, endpoint_url=server.url).first_look()


def test_a_coordinator_opens_the_bucket_that_its_settings_name(server: S3Server, tmp_path: Path):
    def named(bucket: str) -> Settings:
        storage = Storage(blobs=f"s3://{bucket}/opened", s3_endpoint_url=server.url, reserve_bytes=0)
        return Settings(public=Public(enrollment_address="host:9444"), storage=storage)

    for _ in range(2):
        with open_storage(named(NAME), tmp_path) as (_, blobs):
            assert blobs.location == f"s3://{NAME}/opened"
            assert blobs.check() == ""
    server.bucket(f"{NAME}-2")
    with (
        pytest.raises(Conflict, match=f"belongs to the blob store s3://{NAME}/opened"),
        open_storage(named(f"{NAME}-2"), tmp_path),
    ):
        pass
    with pytest.raises(InvalidInput, match="there is no such bucket"), open_storage(named("silotune-none"), tmp_path):
        pass
