"""What every store must do: count once, fence old leases, resume where it was, forget nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coordinator.rounds import state as s
from coordinator.rounds.machine import step
from coordinator.storage.grants import Grant
from coordinator.storage.store import Store
from coordinator.storage.work import Result
from protos import jobspec
from protos.errors import AlreadyExists, Conflict, LeaseFenced
from protos.identity import Identity, Role
from tests.contract.conftest import NOW, enroll, sealed


def recipe(**changes) -> jobspec.JobSpec:
    fields = {
        "name": "study",
        "task": {"type": "synthetic"},
        "local": {"steps": 1},
        "rounds": 2,
        "cohort": {"quorum": 2, "round_deadline_seconds": 100, "stall_limit_seconds": 30, "gather_seconds": 0},
        "evaluation": {"where": []},
    }
    return jobspec.parse({**fields, **changes})


def drive(store: Store, job_id: str = "j") -> str:
    """Steps until the job waits, as the controller does; the sentence that it waits with."""
    for _ in range(50):
        job, facts, revision = store.jobs.facts(job_id, now_unix_seconds=NOW)
        transition = step(job, facts, job.service_seconds)
        if not transition.effects:
            return transition.sentence
        assert store.jobs.apply(job, transition, revision=revision, now_unix_seconds=NOW)
    raise AssertionError("the job never waits")


def grant(store: Store, site: str) -> Grant:
    found = store.work.lease(site, lease_seconds=30)
    assert found is not None, f"no task for {site}"
    return found


def finish(
    store: Store, site: str, digest: str, examples: int = 10, generation: int | None = None
) -> tuple[s.Fate, str]:
    task = grant(store, site).task
    result = Result(digest=digest * 64, size=8, examples=examples, steps=1)
    return store.work.finish(
        task.id, site=site, generation=generation or task.generation, result=result, sealed_size=sealed
    )


def begun(store: Store, *sites: str, spec: jobspec.JobSpec | None = None) -> None:
    """A job whose round 1 collects: version 0 was made by the house agent."""
    for name in sites:
        enroll(store, name)
    enroll(store, "hq", Role.HOUSE)
    store.jobs.create(spec or recipe(), job_id="j", submit_token="t", now_unix_seconds=NOW)
    drive(store)
    task = grant(store, "hq").task
    assert task.kind is s.TaskKind.INIT
    result = Result(digest="0" * 64, size=8, files=(("config.json", "f" * 64, 2),), base_digest="b" * 64)
    store.work.finish(task.id, site="hq", generation=task.generation, result=result, sealed_size=sealed)
    drive(store)


def aggregated(store: Store, number: int, digest: str, **more: Any) -> bool:
    _, facts, _ = store.jobs.facts("j", now_unix_seconds=NOW)
    assert facts.command is not None
    return store.jobs.finish_command(
        "j",
        round_number=number,
        generation=facts.command.generation,
        digest=digest * 64,
        size=8,
        optimizer_digest="",
        seconds={"combine": 0.5},
        sealed_size=lambda _: 8,
        **more,
    )


# --- a whole job


def test_a_job_runs_from_submission_to_completion(store: Store) -> None:
    begun(store, "a", "b")
    for number, digest in ((1, "1"), (2, "2")):
        assert finish(store, "a", "a", 30) == (s.Fate.ACCEPTED, "")
        assert "waits for 1 of 2 updates" in drive(store)
        assert finish(store, "b", "c", 10) == (s.Fate.ACCEPTED, "")
        assert "aggregates 2 updates" in drive(store)
        assert aggregated(store, number, digest)
        drive(store)
    job = store.views.job("study")
    assert (job.state, job.head_version, job.base_digest) == (s.JobState.COMPLETED, 2, "b" * 64)
    model = store.views.model("j", version=None)
    assert (model.digest, model.files) == ("2" * 64, (("config.json", "f" * 64, 2),))
    assert [(part.site, part.weight) for part in model.contributions] == [("a", 0.75), ("b", 0.25)]
    rounds = store.views.rounds("j", last=10)
    assert [record.phase for record in rounds] == [s.Phase.COMMITTED] * 3
    assert rounds[1].seconds["aggregation_combine"] == 0.5
    assert [event.sentence for event in store.views.events("j", after_id=0)][-1].startswith("job study is complete")


def test_a_reopened_store_continues_the_same_round(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/coordinator.db"
    first = Store.open(url)
    begun(first, "a", "b")
    finish(first, "a", "a")
    first.close()
    second = Store.open(url)
    assert "waits for 1 of 2 updates" in drive(second)
    assert second.work.lease("a", lease_seconds=30) is None
    finish(second, "b", "c")
    assert "aggregates 2 updates" in drive(second)


def test_submitting_twice_with_one_token_is_submitting_once(store: Store) -> None:
    spec = recipe()
    assert store.jobs.create(spec, job_id="j1", submit_token="t", now_unix_seconds=NOW) == "j1"
    assert store.jobs.create(spec, job_id="j2", submit_token="t", now_unix_seconds=NOW) == "j1"
    with pytest.raises(Conflict):
        store.jobs.create(recipe(rounds=9), job_id="j3", submit_token="t", now_unix_seconds=NOW)


# --- leases and updates


def test_an_update_counts_once_however_often_it_is_handed_in(store: Store) -> None:
    begun(store, "a", "b")
    task = grant(store, "a").task
    result = Result(digest="a" * 64, size=8, examples=10)
    for _ in range(3):
        fate = store.work.finish(task.id, site="a", generation=task.generation, result=result, sealed_size=sealed)
        assert fate == (s.Fate.ACCEPTED, "")
    other = Result(digest="d" * 64, size=8, examples=10)
    with pytest.raises(AlreadyExists):
        store.work.finish(task.id, site="a", generation=task.generation, result=other, sealed_size=sealed)
    assert len(store.jobs.facts("j", now_unix_seconds=NOW)[1].updates) == 1


def test_an_old_lease_is_fenced_and_the_new_one_counts(store: Store) -> None:
    begun(store, "a", "b")
    old = grant(store, "a").task
    new = grant(store, "a").task
    assert new.id == old.id and new.generation == old.generation + 1
    result = Result(digest="a" * 64, size=8, examples=10)
    for call in (
        lambda: store.work.finish(old.id, site="a", generation=old.generation, result=result, sealed_size=sealed),
        lambda: store.work.heartbeat(old.id, site="a", generation=old.generation, progress={}, lease_seconds=9),
        lambda: store.work.live(old.id, site="a", generation=old.generation),
        lambda: store.work.fail(old.id, site="a", generation=old.generation, state=s.TaskState.FAILED, reason="x"),
    ):
        with pytest.raises(LeaseFenced):
            call()
    assert (
        store.work.finish(new.id, site="a", generation=new.generation, result=result, sealed_size=sealed)[0]
        is s.Fate.ACCEPTED
    )


def test_an_agent_that_holds_its_task_is_not_granted_it_again(store: Store) -> None:
    begun(store, "a", "b")
    task = grant(store, "a").task
    assert store.work.lease("a", lease_seconds=30, holding=[task.id]) is None


def test_a_late_update_is_discarded_not_rejected(store: Store) -> None:
    begun(store, "a", "b", "c")
    late = grant(store, "c").task
    finish(store, "a", "a")
    finish(store, "b", "c")
    store.jobs.tick("j", elapsed_seconds=101)
    assert "aggregates 2 updates" in drive(store)
    result = Result(digest="d" * 64, size=8, examples=10)
    fate, reason = store.work.finish(late.id, site="c", generation=late.generation, result=result, sealed_size=sealed)
    assert fate is s.Fate.DISCARDED and "closed without this update" in reason
    assert (
        store.work.finish(late.id, site="c", generation=late.generation, result=result, sealed_size=sealed)[0]
        is s.Fate.DISCARDED
    )


def test_an_update_that_comes_between_two_attempts_is_kept_at_the_site_and_counts_in_the_second(store: Store) -> None:
    begun(store, "a", "b")
    finish(store, "a", "a")
    late = grant(store, "b").task
    store.jobs.tick("j", elapsed_seconds=101)
    for _ in ("the lease ran out", "the attempt ends"):
        job, facts, revision = store.jobs.facts("j", now_unix_seconds=NOW)
        store.jobs.apply(job, step(job, facts, job.service_seconds), revision=revision, now_unix_seconds=NOW)
    result = Result(digest="c" * 64, size=8, examples=10, steps=1)
    with pytest.raises(LeaseFenced):
        store.work.finish(late.id, site="b", generation=late.generation, result=result, sealed_size=sealed)
    drive(store)
    again = grant(store, "b").task
    assert (
        store.work.finish(again.id, site="b", generation=again.generation, result=result, sealed_size=sealed)[0]
        is s.Fate.ACCEPTED
    )
    assert "aggregates 2 updates" in drive(store)


def test_a_damaged_update_is_asked_for_again_and_the_same_bytes_count(store: Store) -> None:
    begun(store, "a", "b")
    finish(store, "a", "a")
    finish(store, "b", "c")
    drive(store)
    store.jobs.fail_command("j", round_number=1, generation=1, error="damaged", corrupt_site="b")
    drive(store)
    assert finish(store, "b", "c") == (s.Fate.ACCEPTED, "")
    assert "aggregates 2 updates" in drive(store)


def test_a_failure_that_is_reported_twice_counts_once(store: Store) -> None:
    begun(store, "a", "b")
    task = grant(store, "a").task
    told = {"site": "a", "generation": task.generation, "state": s.TaskState.FAILED, "reason": "out of memory"}
    store.work.fail(task.id, **told)
    drive(store)
    with pytest.raises(LeaseFenced):
        store.work.fail(task.id, **told)
    assert grant(store, "a").task.failures == 1


def test_a_rejected_update_does_not_count_and_is_not_asked_for_again(store: Store) -> None:
    begun(store, "a", "b", "c")
    task = grant(store, "a").task
    bad = Result(digest="a" * 64, size=8, examples=10)
    store.work.reject(task.id, site="a", generation=task.generation, result=bad, reason="NaN in x")
    drive(store)
    assert store.work.lease("a", lease_seconds=30) is None
    (update,) = store.views.rounds("j", last=1)[0].updates
    assert (update.fate, update.reason) == (s.Fate.REJECTED, "NaN in x")


def test_a_transition_from_facts_that_are_no_longer_true_changes_nothing(store: Store) -> None:
    begun(store, "a", "b")
    finish(store, "a", "a")
    store.jobs.tick("j", elapsed_seconds=101)
    job, facts, revision = store.jobs.facts("j", now_unix_seconds=NOW)
    stale = step(job, facts, job.service_seconds)
    assert any(isinstance(effect, s.OpenRound) for effect in stale.effects)
    finish(store, "b", "c")
    assert not store.jobs.apply(job, stale, revision=revision, now_unix_seconds=NOW)
    assert "aggregates 2 updates" in drive(store)


def test_a_site_that_fails_three_times_in_a_row_is_set_aside_until_readmitted(store: Store) -> None:
    begun(store, "a", "b", "c", spec=recipe(rounds=5))
    for number in (1, 2):
        for _ in range(2):
            found = store.work.lease("c", lease_seconds=30)
            if found:
                store.work.fail(
                    found.task.id, site="c", generation=found.task.generation, state=s.TaskState.FAILED, reason="OOM"
                )
            drive(store)
        finish(store, "a", "a")
        finish(store, "b", "c")
        drive(store)
        aggregated(store, number, str(number))
        drive(store)
    assert store.views.rounds("j", last=1)[0].cohort == ("a", "b")
    _, facts, _ = store.jobs.facts("j", now_unix_seconds=NOW)
    assert facts.set_aside == {"c": "OOM"}
    store.jobs.control("j", action="readmit", now_unix_seconds=NOW)
    assert store.jobs.facts("j", now_unix_seconds=NOW)[1].set_aside == {}


def test_a_result_of_an_old_command_is_refused(store: Store) -> None:
    begun(store, "a", "b")
    finish(store, "a", "a")
    finish(store, "b", "c")
    drive(store)
    done = {"digest": "1" * 64, "size": 8, "optimizer_digest": "", "seconds": {}, "sealed_size": lambda _: 8}
    assert not store.jobs.finish_command("j", round_number=1, generation=7, **done)
    assert store.jobs.finish_command("j", round_number=1, generation=1, **done)
    assert not store.jobs.finish_command("j", round_number=1, generation=1, **done)


# --- service time


def test_a_heartbeat_renews_the_lease_and_only_movement_counts_as_progress(store: Store) -> None:
    begun(store, "a", "b")
    task = grant(store, "a").task
    beat = {"stage": "TRAINING", "done": 1, "total": 9}

    def heartbeat() -> s.Task:
        store.work.heartbeat(task.id, site="a", generation=task.generation, progress=beat, lease_seconds=30)
        return store.work.live(task.id, site="a", generation=task.generation)

    store.jobs.tick("j", elapsed_seconds=10)
    first = heartbeat()
    store.jobs.tick("j", elapsed_seconds=10)
    second = heartbeat()
    assert second.lease_until == first.lease_until + 10
    assert second.last_progress_at == first.last_progress_at == 10


def test_a_paused_job_uses_up_no_time_and_gives_no_work(store: Store) -> None:
    begun(store, "a", "b")
    store.jobs.control("j", action="pause", now_unix_seconds=NOW)
    store.jobs.tick("j", elapsed_seconds=500)
    assert store.work.lease("a", lease_seconds=30) is None
    store.jobs.control("j", action="resume", now_unix_seconds=NOW)
    assert store.views.job("j").service_seconds == 0.0
    assert grant(store, "a").task.round == 1


def test_an_order_whose_answer_was_lost_may_be_given_again_and_changes_nothing_more(store: Store) -> None:
    begun(store, "a", "b")
    for action in ("pause", "resume", "cancel"):
        store.jobs.control("j", action=action, now_unix_seconds=NOW)
        before = store.jobs.facts("j", now_unix_seconds=NOW), store.views.events("j", after_id=0)
        store.jobs.control("j", action=action, now_unix_seconds=NOW + 1)
        assert (store.jobs.facts("j", now_unix_seconds=NOW), store.views.events("j", after_id=0)) == before
    with pytest.raises(Conflict, match="is cancelled: it cannot be told to resume"):
        store.jobs.control("j", action="resume", now_unix_seconds=NOW)


def test_after_a_restart_every_live_lease_has_a_grace(store: Store) -> None:
    begun(store, "a", "b")
    task = grant(store, "a").task
    store.jobs.tick("j", elapsed_seconds=29)
    store.jobs.take(store.jobs.active()[0], driver="again", grace_seconds=30)
    assert store.work.live(task.id, site="a", generation=task.generation).lease_until == 59


def test_cancelling_ends_every_task(store: Store) -> None:
    begun(store, "a", "b")
    task = grant(store, "a").task
    store.jobs.control("j", action="cancel", now_unix_seconds=NOW)
    beat = store.work.heartbeat(task.id, site="a", generation=task.generation, progress={}, lease_seconds=9)
    assert beat == (False, "cancelled by the operator")
    assert store.jobs.active() == []


# --- who may see what


def test_a_site_reads_the_model_of_its_live_task_and_nothing_else(store: Store) -> None:
    begun(store, "a", "b")
    site = Identity(Role.SITE, "a")
    assert store.uploads.readable(site, "0" * 64) is None
    task = grant(store, "a").task
    found = store.uploads.readable(site, "0" * 64)
    assert found is not None and (found.size, found.task_id) == (8, task.id)
    assert store.uploads.readable(Identity(Role.SITE, "b"), "0" * 64) is None
    store.work.finish(task.id, site="a", generation=task.generation, result=Result("a" * 64, 8, 1), sealed_size=sealed)
    assert store.uploads.readable(site, "0" * 64) is None
    assert store.uploads.readable(Identity(Role.OPERATOR, "op"), "f" * 64) is not None


def test_what_another_site_uploaded_is_missing(store: Store) -> None:
    enroll(store, "a")
    for _ in range(2):
        store.uploads.add("a", digest="a" * 64, size=8, sealed_size=lambda _: 8)
    assert store.uploads.known("a", ["a" * 64, "c" * 64]) == {"a" * 64}
    assert store.uploads.known("b", ["a" * 64]) == set()


def test_a_lease_that_ran_out_still_counts_while_nobody_else_has_the_task(store: Store) -> None:
    begun(store, "a", "b")
    task = grant(store, "a").task
    store.jobs.tick("j", elapsed_seconds=31)
    drive(store)
    beat = store.work.heartbeat(task.id, site="a", generation=task.generation, progress={}, lease_seconds=30)
    assert beat == (True, "")
    store.jobs.tick("j", elapsed_seconds=31)
    drive(store)
    result = Result(digest="a" * 64, size=8, examples=10)
    assert (
        store.work.finish(task.id, site="a", generation=task.generation, result=result, sealed_size=sealed)[0]
        is s.Fate.ACCEPTED
    )
