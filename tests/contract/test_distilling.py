"""What a store keeps and grants of a round that is distilled, on every engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.rounds import state as s
from coordinator.storage.garbage import all_named
from coordinator.storage.store import Store
from coordinator.storage.work import Result
from protos.errors import AlreadyExists
from protos.identity import Identity, Role
from tests.contract.conftest import NOW
from tests.contract.test_garbage import Federation
from tests.contract.test_store import drive, grant

HOUSE = Identity(Role.HOUSE, "hq")


@pytest.fixture
def federation(store: Store, tmp_path: Path) -> Iterator[Federation]:
    yield Federation(store, tmp_path)


def test_a_distilled_round_commits_what_the_house_agent_made_and_only_that_stays(federation: Federation) -> None:
    store = federation.store
    federation.begin(rounds=2, distillation={}, evaluation={"where": []})
    federation.round(1)
    assert store.views.rounds("j", last=1)[0].phase is s.Phase.DISTILLING

    task = grant(store, "hq")
    aggregate = federation.seal(b"version 1")
    assert (task.task.kind, task.model_digest, task.counted_round) == (s.TaskKind.DISTILL, aggregate, 0)
    assert task.members == (), "with labels it has no need of the updates"
    store.jobs.tick("j", elapsed_seconds=2)
    digest = federation.upload("hq", b"distilled 1")
    result = Result(digest=digest, size=11, examples=10, steps=1, metrics={"teacher_loss": 0.5})
    assert federation.finish(task.task, result) == (s.Fate.ACCEPTED, "")
    assert federation.finish(task.task, result) == (s.Fate.ACCEPTED, ""), "the answer may have been lost"
    with pytest.raises(AlreadyExists):
        federation.finish(task.task, Result(digest=aggregate, size=9))
    federation.collect()
    kept = {b"version 0", b"{}", b"a1", b"b1", b"version 1", b"state 1", b"distilled 1"}
    assert federation.contents() == kept, "until it is committed everything may still be needed"
    with store.database.read() as connection:
        assert all_named(connection) >= {federation.seal(content) for content in kept}

    drive(store)
    assert any("distilled by hq" in event.sentence for event in store.views.events("j", after_id=0))
    committed = store.views.model("j", version=1)
    assert committed.digest == digest and {part.site for part in committed.contributions} == {"a", "b"}
    (record,) = store.views.rounds("j", last=1, until=1)
    assert record.metrics == {"teacher_loss": 0.5} and record.undistilled == ""
    assert record.seconds["distilling"] == pytest.approx(2.0) and record.seconds["aggregating"] == pytest.approx(0.0)
    federation.collect()
    assert federation.contents() == {b"version 0", b"{}", b"state 1", b"distilled 1"}

    federation.round(2)
    assert grant(store, "hq").counted_round == 1, "the teacher goes on from the round that was committed"


def test_an_agent_that_comes_late_to_a_distillation_because_it_was_busy_has_not_stood_still(
    federation: Federation,
) -> None:
    store = federation.store
    federation.begin(
        rounds=1, distillation={}, evaluation={"where": []}, cohort={"quorum": 2, "stall_limit_seconds": 30}
    )
    federation.round(1)
    store.jobs.tick("j", elapsed_seconds=100)
    assert "hq has not taken the task yet" in drive(store)
    first = grant(store, "hq").task
    assert first.kind is s.TaskKind.DISTILL and first.last_progress_at == 100
    assert "in 30 s when nothing moves" in drive(store)
    # One that takes it anew has had it since.
    store.jobs.tick("j", elapsed_seconds=20)
    assert grant(store, "hq").task.last_progress_at == 100
    store.jobs.tick("j", elapsed_seconds=11)
    drive(store)
    assert store.views.rounds("j", last=1)[0].undistilled == "hq handed nothing in: nothing moved for 30 s"


def test_a_round_that_was_not_distilled_says_why_and_keeps_its_aggregate(federation: Federation) -> None:
    store = federation.store
    federation.begin(rounds=2, distillation={}, evaluation={"where": []})
    federation.round(1)
    task = grant(store, "hq").task
    store.work.fail(task.id, site="hq", generation=task.generation, state=s.TaskState.DECLINED, reason="no teacher")
    drive(store)
    assert store.views.rounds("j", last=1, until=1)[0].undistilled == "hq declined: no teacher"
    late = federation.upload("hq", b"too late")
    assert federation.finish(task, Result(digest=late, size=8))[0] is s.Fate.DISCARDED
    assert store.views.model("j", version=1).digest == federation.seal(b"version 1")
    federation.round(2)
    assert grant(store, "hq").counted_round == 0
    federation.age(hours=5)
    federation.collect()
    assert federation.contents() >= {b"version 0", b"{}", b"version 1", b"version 2", b"a2", b"b2"}


def test_the_house_agent_may_read_what_its_task_names_while_it_has_the_task(federation: Federation) -> None:
    store = federation.store
    federation.begin(rounds=1, distillation={"labels": False}, evaluation={"where": []})
    federation.round(1)
    contents = {name: federation.seal(name) for name in (b"version 0", b"a1", b"b1", b"version 1")}

    def readable() -> set[bytes]:
        return {name for name, digest in contents.items() if store.uploads.readable(HOUSE, digest)}

    assert readable() == set()
    task = grant(store, "hq")
    assert {(part.digest, part.size, part.weight) for part in task.members} == {
        (contents[b"a1"], 2, 0.5),
        (contents[b"b1"], 2, 0.5),
    }
    assert readable() == {b"a1", b"b1", b"version 1"}
    assert not store.uploads.readable(Identity(Role.SITE, "a"), contents[b"b1"]), "it is nobody else's business"
    store.jobs.control("j", action="cancel", now_unix_seconds=NOW)
    assert readable() == set()
    federation.collect()
    federation.age(hours=5)
    federation.collect()
    assert federation.contents() >= {b"version 0", b"{}"}
    assert not federation.contents() & {b"a1", b"b1", b"version 1"}, "what a cancelled job leaves is garbage"


def test_with_labels_the_house_agent_never_reads_an_update(federation: Federation) -> None:
    federation.begin(rounds=1, distillation={}, evaluation={"where": []})
    federation.round(1)
    grant(federation.store, "hq")
    assert federation.store.uploads.readable(HOUSE, federation.seal(b"version 1"))
    assert not federation.store.uploads.readable(HOUSE, federation.seal(b"a1"))
