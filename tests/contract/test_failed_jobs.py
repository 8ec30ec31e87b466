"""A job that failed is not lost: it is resumed, its sites are readmitted, and nothing that was accepted is repeated."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.rounds import state as s
from coordinator.storage.store import Store
from coordinator.storage.work import Result
from protos.errors import Conflict, LeaseFenced, NotFound
from protos.identity import Role
from tests.contract.conftest import NOW, enroll, sealed
from tests.contract.test_garbage import Federation
from tests.contract.test_store import aggregated, begun, drive, finish, grant, recipe

ONCE = {"quorum": 2, "round_deadline_seconds": 100, "stall_limit_seconds": 30, "gather_seconds": 0, "retries": 0}


def state(store: Store) -> s.JobState:
    return store.views.job("j").state


def facts(store: Store) -> s.Facts:
    return store.jobs.facts("j", now_unix_seconds=NOW)[1]


def fail(store: Store, site: str, reason: str = "OOM") -> None:
    task = grant(store, site).task
    store.work.fail(task.id, site=site, generation=task.generation, state=s.TaskState.FAILED, reason=reason)


def control(store: Store, action: str, site: str = "") -> None:
    store.jobs.control("j", action=action, site=site, now_unix_seconds=NOW)


def test_a_failed_job_is_resumed_where_it_failed_and_keeps_what_was_accepted(store: Store) -> None:
    begun(store, "a", "b", spec=recipe(cohort=ONCE))
    finish(store, "a", "a")
    store.jobs.tick("j", elapsed_seconds=101)
    drive(store)
    assert state(store) is s.JobState.FAILED
    assert "`silotune job resume j` tries round 1 again and keeps the update" in store.views.job("j").sentence
    control(store, "resume")
    assert "waits for 1 of 2 updates: b" in drive(store)
    record = store.views.rounds("j", last=1)[0]
    assert (record.number, record.attempt, "total" in record.seconds) == (1, 1, False)
    assert store.work.lease("a", lease_seconds=30) is None, "its update is there already"
    finish(store, "b", "c")
    drive(store)
    aggregated(store, 1, "1")
    drive(store)
    assert store.views.job("j").head_version == 1


def test_a_result_that_is_ready_when_its_job_has_failed_stays_at_the_site_until_the_job_is_resumed(
    store: Store,
) -> None:
    begun(store, "a", "b", spec=recipe(cohort=ONCE))
    task = grant(store, "b").task
    store.jobs.tick("j", elapsed_seconds=101)
    drive(store)
    assert state(store) is s.JobState.FAILED
    late = Result(digest="c" * 64, size=8, examples=10, steps=1)
    with pytest.raises(LeaseFenced):
        store.work.finish(task.id, site="b", generation=task.generation, result=late, sealed_size=sealed)
    control(store, "resume")
    drive(store)
    assert finish(store, "b", "c")[0] is s.Fate.ACCEPTED


def test_the_updates_of_a_failed_job_are_no_garbage_until_it_is_cancelled(store: Store, tmp_path: Path) -> None:
    federation = Federation(store, tmp_path)
    federation.begin(cohort=ONCE)
    federation.hand_in("a", b"a1")
    store.jobs.tick("j", elapsed_seconds=101)
    drive(store)
    federation.collect()
    assert b"a1" in federation.contents()
    control(store, "cancel")
    federation.collect()
    assert b"a1" not in federation.contents()


def test_version_0_is_tried_again_when_a_job_that_failed_without_it_is_resumed(store: Store) -> None:
    enroll(store, "hq", Role.HOUSE)
    store.jobs.create(recipe(), job_id="j", submit_token="", now_unix_seconds=NOW)
    drive(store)
    fail(store, "hq", "no such base model")
    drive(store)
    assert state(store) is s.JobState.FAILED
    assert "version 0 could not be made: hq failed: no such base model" in store.views.job("j").sentence
    control(store, "resume")
    assert "version 0 is being made: hq" in drive(store)
    task = grant(store, "hq").task
    store.work.finish(
        task.id, site="hq", generation=task.generation, result=Result(digest="0" * 64, size=8), sealed_size=sealed
    )
    drive(store)
    assert store.views.job("j").head_version == 0


def test_an_aggregation_that_was_given_up_is_tried_again_from_the_same_updates(store: Store) -> None:
    begun(store, "a", "b", spec=recipe(cohort=ONCE))
    finish(store, "a", "a")
    finish(store, "b", "c")
    drive(store)
    store.jobs.fail_command("j", round_number=1, generation=1, error="No space left on device")
    store.jobs.tick("j", elapsed_seconds=201)
    assert drive(store) and state(store) is s.JobState.FAILED
    assert "No space left on device" in store.views.job("j").sentence
    control(store, "resume")
    assert "aggregates 2 updates" in drive(store)
    command = facts(store).command
    assert command is not None and command.generation == 2


def test_one_site_or_all_are_readmitted_also_when_the_job_has_failed(store: Store) -> None:
    begun(store, "a", "b", "c", spec=recipe(cohort=ONCE))
    for name in ("b", "c"):
        task = grant(store, name).task
        told = {"state": s.TaskState.DECLINED, "reason": "not at night"}
        store.work.fail(task.id, site=name, generation=task.generation, **told)
    finish(store, "a", "a")
    drive(store)
    assert state(store) is s.JobState.FAILED
    control(store, "resume")
    drive(store)
    assert state(store) is s.JobState.FAILED, "nobody was readmitted"
    assert "set aside: b (not at night); c (not at night)" in store.views.job("j").sentence
    with pytest.raises(NotFound, match="a is not set aside"):
        control(store, "readmit", "a")
    control(store, "readmit", "c")
    assert facts(store).set_aside == {"b": "not at night"}
    assert "set aside: b" in store.views.job("j").sentence, "it still says why it failed"
    control(store, "resume")
    assert "waits for 1 of 2 updates: c" in drive(store)
    control(store, "readmit")
    assert facts(store).set_aside == {}
    assert [event.sentence for event in store.views.events("j", after_id=0)][-1] == "b may take part again"


def test_what_a_failed_job_was_measuring_is_measured_when_it_goes_on(store: Store) -> None:
    begun(store, "a", "b", spec=recipe(cohort=ONCE, evaluation={"where": ["house"]}))
    store.jobs.tick("j", elapsed_seconds=101)
    drive(store)
    assert state(store) is s.JobState.FAILED and store.work.lease("hq", lease_seconds=30) is None
    control(store, "resume")
    drive(store)
    task = grant(store, "hq").task
    assert (task.kind, task.version, task.split) == (s.TaskKind.EVALUATE, 0, "validation")


def test_what_is_over_for_good_is_neither_resumed_nor_readmitted(store: Store) -> None:
    begun(store, "a", "b")
    control(store, "cancel")
    for action in ("resume", "readmit", "pause"):
        with pytest.raises(Conflict, match="is cancelled"):
            control(store, action)


def test_a_silent_site_is_said_with_what_it_was_doing(store: Store) -> None:
    begun(store, "a", "b")
    task = grant(store, "a").task
    progress = {"stage": "UPLOADING", "done": 1_000_000, "total": 3_000_000, "unit": "bytes"}
    store.work.heartbeat(task.id, site="a", generation=task.generation, progress=progress, lease_seconds=30)
    store.jobs.tick("j", elapsed_seconds=40)
    sentence = drive(store)
    assert "silent about its task: its lease ran out 10 s ago, was uploading 33 % (2.0 MB left)" in sentence


def test_the_facts_of_a_long_job_are_as_few_as_those_of_a_short_one(store: Store) -> None:
    rounds = 12
    begun(store, "a", "b", spec=recipe(rounds=rounds, evaluation={"where": ["house"]}))
    for number in range(rounds):
        accuracy = 0.9 if number == 3 else 0.1
        task = grant(store, "hq").task
        result = Result(examples=5, metrics={"accuracy": accuracy})
        store.work.finish(task.id, site="hq", generation=task.generation, result=result, sealed_size=sealed)
        drive(store)
        if number == rounds - 1:
            break
        finish(store, "a", "a")
        finish(store, "b", "c")
        drive(store)
        aggregated(store, number + 1, f"{number:x}")
        drive(store)
    assert store.views.job("j").best_version == 3
    found = facts(store)
    assert {evaluation.version for evaluation in found.evaluations} == {3}
    assert found.unjudged == frozenset()
    assert {task.round for task in found.tasks} == {rounds}
    assert (found.last_cohort, found.last_counted) == (("a", "b"), frozenset("ab"))


def test_early_stopping_sees_what_came_after_the_best_version(store: Store) -> None:
    begun(store, "a", "b", spec=recipe(rounds=12, evaluation={"where": ["house"], "early_stop": 2}))
    for number, accuracy in enumerate([0.1, 0.9, 0.2, 0.3]):
        task = grant(store, "hq").task
        result = Result(examples=5, metrics={"accuracy": accuracy})
        store.work.finish(task.id, site="hq", generation=task.generation, result=result, sealed_size=sealed)
        drive(store)
        finish(store, "a", "a")
        finish(store, "b", "c")
        drive(store)
        aggregated(store, number + 1, f"{number:x}")
        drive(store)
    # Round 4 was under way when the evaluation of version 3 came.
    task = grant(store, "hq").task
    store.work.finish(
        task.id,
        site="hq",
        generation=task.generation,
        result=Result(examples=5, metrics={"accuracy": 0.1}),
        sealed_size=sealed,
    )
    drive(store)
    job = store.views.job("j")
    assert (job.state, job.best_version) == (s.JobState.COMPLETED, 1)
    assert "accuracy no longer improved; best is version 1" in job.sentence
