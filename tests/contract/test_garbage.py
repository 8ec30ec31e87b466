"""Garbage goes, on every engine, and never a blob that an upload, an open task, a round or a command needs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from coordinator.rounds import state as s
from coordinator.storage import schema
from coordinator.storage.file_blobs import FileBlobStore
from coordinator.storage.garbage import GarbageCollector, all_named
from coordinator.storage.store import Store
from coordinator.storage.work import Result
from protos.digests import digest_of
from protos.errors import Conflict, NotFound, Unavailable
from protos.identity import Identity, Role
from tests.contract.conftest import NOW, enroll
from tests.contract.test_store import drive, grant, recipe


class Federation:
    """A store and blobs with a job that sites `a` and `b` train; everything that is handed in has real bytes."""

    def __init__(self, store: Store, directory: Path) -> None:
        self.store = store
        self.directory = directory
        self.blobs = FileBlobStore(directory / "blobs", reserve_bytes=0)

    def begin(self, **changes) -> None:
        for name, role in (("a", Role.SITE), ("b", Role.SITE), ("hq", Role.HOUSE)):
            enroll(self.store, name, role)
        self.store.jobs.create(recipe(**changes), job_id="j", submit_token="t", now_unix_seconds=NOW)
        drive(self.store)
        self.hand_in("hq", b"version 0", file=b"{}")
        drive(self.store)

    def seal(self, content: bytes) -> str:
        path = self.directory / "new"
        path.write_bytes(content)
        return self.blobs.adopt(path)[0]

    def upload(self, owner: str, content: bytes) -> str:
        digest = self.seal(content)
        self.store.uploads.add(owner, digest=digest, size=len(content), sealed_size=self.blobs.size)
        return digest

    def hand_in(self, site: str, content: bytes, *, file: bytes = b"") -> str:
        task = grant(self.store, site).task
        digest = self.upload(site, content)
        files = (("config.json", self.upload(site, file), len(file)),) if file else ()
        result = Result(digest=digest, size=len(content), examples=10, steps=1, files=files, base_digest="b" * 64)
        self.finish(task, result)
        return digest

    def finish(self, task: s.Task, result: Result) -> tuple[s.Fate, str]:
        which: dict[str, Any] = {"site": task.site, "generation": task.generation}
        return self.store.work.finish(task.id, result=result, sealed_size=self.blobs.size, **which)

    def aggregate(
        self, content: bytes, *, state: bytes = b"", encoded: bytes = b"", residual: bytes = b"", sealed: bool = True
    ) -> bool:
        _, facts, _ = self.store.jobs.facts("j", now_unix_seconds=NOW)
        assert facts.command is not None and facts.round is not None
        digest, optimizer = self.seal(content), self.seal(state) if state else ""
        more: dict[str, Any] = {"residual_digest": self.seal(residual)} if residual else {}
        if encoded:
            more |= {"encoded_digest": self.seal(encoded), "encoded_size": len(encoded)}
        if not sealed:
            self.blobs.delete(digest)
        return self.store.jobs.finish_command(
            "j", round_number=facts.round.number, generation=facts.command.generation, digest=digest,
            size=len(content), optimizer_digest=optimizer, seconds={}, sealed_size=self.blobs.size, **more,
        )  # fmt: skip

    def round(self, number: int, *, encoded: bool = False) -> None:
        self.hand_in("a", b"a%d" % number)
        self.hand_in("b", b"b%d" % number)
        drive(self.store)
        more = {"encoded": b"encoded %d" % number, "residual": b"residual %d" % number} if encoded else {}
        assert self.aggregate(b"version %d" % number, state=b"state %d" % number, **more)
        drive(self.store)

    def evaluate(self, loss: float) -> None:
        task = grant(self.store, "hq").task
        assert task.kind is s.TaskKind.EVALUATE
        self.finish(task, Result(examples=5, metrics={"loss": loss}))

    def collect(self, *, keep_versions: int = 0) -> int:
        return GarbageCollector(self.store.database, self.blobs, keep_versions=keep_versions).collect()

    def contents(self) -> set[bytes]:
        return {self.blobs.path(blob.digest).read_bytes() for blob in self.blobs.stored()}

    def age(self, *, hours: float) -> None:
        for path in (self.directory / "blobs").rglob("*"):
            if path.is_file():
                os.utime(path, (path.stat().st_mtime - hours * 3600,) * 2)


@pytest.fixture
def federation(store: Store, tmp_path: Path) -> Iterator[Federation]:
    yield Federation(store, tmp_path)


def test_updates_and_states_of_rounds_that_are_over_go_and_versions_stay(federation: Federation) -> None:
    federation.begin()
    federation.round(1)
    federation.hand_in("a", b"a2")
    federation.collect()
    assert federation.contents() == {b"version 0", b"{}", b"version 1", b"state 1", b"a2"}
    federation.hand_in("b", b"b2")
    drive(federation.store)
    federation.aggregate(b"version 2", state=b"state 2")
    federation.collect()
    assert federation.contents() >= {b"a2", b"b2", b"state 1", b"version 2", b"state 2"}, "the round is not over yet"
    drive(federation.store)
    assert federation.store.views.job("j").state is s.JobState.COMPLETED
    federation.collect()
    assert federation.contents() == {b"version 0", b"{}", b"version 1", b"version 2"}


def test_an_upload_stays_while_its_task_is_open_paused_or_about_to_be_queued_again(federation: Federation) -> None:
    federation.begin()
    grant(federation.store, "a")
    federation.upload("a", b"not reported yet")
    federation.age(hours=5)
    federation.collect()
    federation.store.jobs.control("j", action="pause", now_unix_seconds=NOW)
    federation.collect()
    federation.store.jobs.control("j", action="resume", now_unix_seconds=NOW)
    # The attempt ended below its quorum: the task is over, and the next attempt queues it again.
    with federation.store.database.write() as connection:
        connection.execute(update(schema.tasks).where(schema.tasks.c.round == 1).values(state="EXPIRED"))
        connection.execute(update(schema.rounds).where(schema.rounds.c.number == 1).values(phase="SELECTING"))
    federation.collect()
    assert b"not reported yet" in federation.contents()
    federation.store.jobs.control("j", action="cancel", now_unix_seconds=NOW)
    federation.collect()
    assert federation.contents() == {b"version 0", b"{}"}


def test_a_blob_without_a_row_goes_when_it_is_old_and_parts_when_their_site_rests(federation: Federation) -> None:
    federation.begin()
    for owner in ("a", "nobody"):
        upload = federation.blobs.open_upload(owner, "c" * 64, size=100)
        upload.append(b"begun", offset=0)
        upload.close()
    federation.seal(b"old")
    federation.age(hours=50)
    federation.seal(b"new")
    federation.collect()
    assert federation.contents() == {b"version 0", b"{}", b"new"}
    assert federation.blobs.committed_size("a", "c" * 64) == 5
    assert federation.blobs.committed_size("nobody", "c" * 64) == 0


def test_only_the_newest_versions_the_best_and_those_in_use_are_kept(federation: Federation) -> None:
    federation.begin(rounds=6, evaluation={"where": ["house"], "metric": "loss"})
    federation.evaluate(5.0)
    for number, loss in ((1, 1.0), (2, 3.0), (3, 4.0)):
        federation.round(number)
        federation.evaluate(loss)
        drive(federation.store)
    federation.round(4)  # its evaluation is open
    federation.round(5)
    federation.collect(keep_versions=1)
    kept = {content for content in federation.contents() if content.startswith(b"version")}
    assert kept == {b"version 1", b"version 4", b"version 5"}
    with pytest.raises(NotFound, match="Version 2 of job j was deleted"):
        federation.store.views.model("j", version=2)
    assert federation.store.views.model("j", version=None).version == 1
    operator = Identity(Role.OPERATOR, "op")
    assert federation.store.uploads.readable(operator, federation.seal(b"version 1")) is not None
    assert federation.store.uploads.readable(operator, federation.seal(b"version 2")) is None
    # Measured as the best a moment ago; the step that says so has not been taken.
    federation.evaluate(0.5)
    federation.collect(keep_versions=1)
    assert b"version 4" in federation.contents()
    drive(federation.store)
    assert federation.store.views.job("j").best_version == 4
    federation.collect(keep_versions=1)
    assert b"version 1" not in federation.contents()


def test_what_is_named_by_two_rows_stays_until_both_are_gone(federation: Federation) -> None:
    federation.begin()
    federation.hand_in("a", b"same")
    federation.hand_in("b", b"same")
    drive(federation.store)
    federation.aggregate(b"same")
    drive(federation.store)
    federation.collect()
    assert b"same" in federation.contents()


def test_an_aggregate_that_was_deleted_before_it_was_named_is_made_again(federation: Federation) -> None:
    federation.begin()
    for site in ("a", "b"):
        federation.hand_in(site, site.encode())
    drive(federation.store)
    assert not federation.aggregate(b"version 1", sealed=False)
    assert "aggregates 2 updates" in drive(federation.store)
    assert federation.aggregate(b"version 1")


def test_every_blob_that_a_row_names_is_there_after_each_step_of_a_job(federation: Federation) -> None:
    def check() -> None:
        federation.age(hours=50)
        federation.collect(keep_versions=1)
        with federation.store.database.read() as connection:
            wanted = all_named(connection)
        assert wanted <= {blob.digest for blob in federation.blobs.stored()}

    federation.begin(rounds=3)
    check()
    for number in (1, 2, 3):
        for site in ("a", "b"):
            federation.hand_in(site, b"%s%d" % (site.encode(), number))
            check()
        drive(federation.store)
        check()
        federation.aggregate(b"version %d" % number, state=b"state %d" % number)
        check()
        drive(federation.store)
        check()
    assert {content for content in federation.contents() if content.startswith(b"v")} == {b"version 3"}


def test_what_is_left_of_finished_uploads_goes_though_their_site_is_busy(federation: Federation) -> None:
    federation.begin()
    federation.hand_in("a", b"in version 1")
    contents = {"recorded": b"in version 1", "sealed": b"version 0", "begun": b"not all of it"}
    for content in contents.values():
        upload = federation.blobs.open_upload("b", digest_of(content), size=len(content))
        upload.append(content[:4], offset=0)
        upload.close()
    federation.hand_in("b", contents["recorded"])
    drive(federation.store)
    assert federation.aggregate(b"version 1")
    drive(federation.store)
    grant(federation.store, "b")
    federation.collect()
    assert federation.blobs.size(digest_of(contents["recorded"])) is None, "its round is over"
    federation.age(hours=50)
    federation.collect()
    left = {name: federation.blobs.committed_size("b", digest_of(content)) for name, content in contents.items()}
    assert left == {"recorded": 0, "sealed": 0, "begun": 4}


# --- an upload that meets the collector


def test_a_result_with_bytes_that_were_collected_is_asked_for_again_and_then_counts(federation: Federation) -> None:
    federation.begin()
    federation.round(1)
    federation.store.jobs.control("j", action="cancel", now_unix_seconds=NOW)
    federation.collect()
    # The same recipe once more, and training that is the same to the bit.
    federation.store.jobs.create(recipe(), job_id="k", submit_token="u", now_unix_seconds=NOW)
    drive(federation.store, "k")
    federation.hand_in("hq", b"version 0", file=b"{}")
    drive(federation.store, "k")
    task = grant(federation.store, "a").task
    digest = federation.upload("a", b"a1")
    federation.collect()
    assert federation.store.uploads.known("a", [digest]) == {digest}, "not of the earlier job's update"
    federation.blobs.delete(digest)
    result = Result(digest=digest, size=2, examples=10, steps=1)
    with pytest.raises(Conflict, match="Upload it again"):
        federation.finish(task, result)
    assert federation.store.jobs.facts("k", now_unix_seconds=NOW)[1].updates == ()
    federation.upload("a", b"a1")
    assert federation.finish(task, result)[0] is s.Fate.ACCEPTED
    federation.collect()
    assert federation.blobs.size(digest) == 2


def test_an_upload_of_an_open_task_is_asked_for_though_the_same_bytes_were_an_update_before(
    federation: Federation,
) -> None:
    federation.begin()
    federation.round(1)
    grant(federation.store, "a")
    digest = digest_of(b"a1")
    assert federation.store.uploads.known("a", [digest]) == set()
    federation.upload("a", b"a1")
    federation.collect()
    assert federation.store.uploads.known("a", [digest]) == {digest} and federation.blobs.size(digest) == 2


def test_a_result_that_is_being_recorded_keeps_its_blob(federation: Federation) -> None:
    federation.begin()
    task = grant(federation.store, "a").task
    digest = federation.seal(b"a1")
    in_write, asked = threading.Event(), threading.Event()
    collector = GarbageCollector(federation.store.database, federation.blobs)

    def sealed_size(wanted: str) -> int | None:
        size = federation.blobs.size(wanted)
        in_write.set()
        assert asked.wait(20)
        return size

    def finish() -> s.Fate:
        result = Result(digest=digest, size=2, examples=10, steps=1)
        which: dict[str, Any] = {"site": "a", "generation": task.generation}
        return federation.store.work.finish(task.id, result=result, sealed_size=sealed_size, **which)[0]

    def collect() -> int:
        assert in_write.wait(20)
        asked.set()
        return collector._delete([digest])

    assert in_threads(finish, collect) == [s.Fate.ACCEPTED, 0]
    assert federation.blobs.size(digest) == 2


def in_threads(*functions: Callable[[], object]) -> list[object]:
    with ThreadPoolExecutor(len(functions)) as pool:
        return [each.exception() or each.result() for each in [pool.submit(function) for function in functions]]


def test_a_row_that_is_being_written_keeps_its_blob(federation: Federation) -> None:
    digest = federation.seal(b"bytes")
    federation.age(hours=50)
    in_write, asked = threading.Event(), threading.Event()
    collector = GarbageCollector(federation.store.database, federation.blobs)

    def sealed_size(wanted: str) -> int | None:
        size = federation.blobs.size(wanted)
        in_write.set()
        assert asked.wait(20)
        return size

    def add() -> None:
        federation.store.uploads.add("a", digest=digest, size=5, sealed_size=sealed_size)

    def collect() -> int:
        assert in_write.wait(20)
        asked.set()
        return collector._delete([digest])

    assert in_threads(add, collect) == [None, 0]
    assert federation.blobs.size(digest) == 5


def test_a_blob_that_is_being_deleted_is_not_named(federation: Federation) -> None:
    in_write, asked = threading.Event(), threading.Event()

    class Slow(FileBlobStore):
        def delete(self, digest: str) -> None:
            in_write.set()
            assert asked.wait(20)
            super().delete(digest)

    digest = federation.seal(b"bytes")
    federation.age(hours=50)
    federation.blobs = Slow(federation.directory / "blobs", reserve_bytes=0)

    def add() -> None:
        assert in_write.wait(20)
        asked.set()
        federation.store.uploads.add("a", digest=digest, size=5, sealed_size=federation.blobs.size)

    added, deleted = in_threads(add, federation.collect)
    assert isinstance(added, Unavailable) and deleted == 1
    assert federation.store.uploads.known("a", [digest]) == set()


def test_uploads_and_collections_in_any_order_leave_no_row_without_its_blob(federation: Federation) -> None:
    for turn in range(40):
        digest = federation.seal(b"%d" % turn)
        federation.age(hours=50)
        size = len(str(turn))
        add = lambda digest=digest, size=size: federation.store.uploads.add(  # noqa: E731
            "a", digest=digest, size=size, sealed_size=federation.blobs.size
        )
        added, deleted = in_threads(*((add, federation.collect) if turn % 2 else (federation.collect, add)))[
            :: 1 if turn % 2 else -1
        ]
        named = federation.store.uploads.known("a", [digest])
        assert isinstance(deleted, int) and (added is None or isinstance(added, Unavailable))
        assert not named or federation.blobs.size(digest) is not None
