"""What two coordinators on one database may do to each other: nothing that one alone could not have done.

Real threads, two stores, one database. A race that is lost is lost whole: it changes nothing, and its caller is told.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import select

from coordinator.rounds import state as s
from coordinator.rounds.machine import step
from coordinator.storage import schema
from coordinator.storage.store import Store
from coordinator.storage.work import Result
from protos.errors import AlreadyExists, LeaseFenced, SilotuneError
from protos.identity import Role
from tests.contract.conftest import NOW, enroll, sealed
from tests.contract.test_store import begun, drive, grant, recipe

SITES = ("a", "b", "c", "d", "e", "f")
WATCHED = (schema.jobs, schema.rounds, schema.tasks, schema.updates, schema.versions, schema.commands)


@pytest.fixture
def replicas(url: str) -> Iterator[tuple[Store, Store]]:
    with closing(Store.open(url)) as one, closing(Store.open(url)) as other:
        yield one, other


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What each call answered, or the error of ours that it raised; any other error fails the test."""
    outcomes: list[Any] = [None] * len(calls)
    gate = threading.Barrier(len(calls))

    def run(place: int) -> None:
        gate.wait()
        try:
            outcomes[place] = calls[place]()
        except Exception as error:
            outcomes[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [error for error in outcomes if isinstance(error, Exception) and not isinstance(error, SilotuneError)] == []
    return outcomes


def rows_of(store: Store, job_id: str) -> dict[str, list[dict[str, Any]]]:
    """All that the store knows of a job."""
    found = {}
    with store.database.read() as connection:
        for table in WATCHED:
            mine = table.c["id" if table is schema.jobs else "job_id"] == job_id
            rows = connection.execute(select(table).where(mine)).mappings()
            found[table.name] = sorted((dict(row) for row in rows), key=repr)
    return found


def test_two_replicas_that_are_handed_one_result_count_it_once(replicas: tuple[Store, Store]) -> None:
    begun(replicas[0], *SITES)
    for site in SITES:
        task = grant(replicas[0], site).task
        result = Result(digest="a" * 64, size=8, examples=1)
        told: dict[str, Any] = {"site": site, "generation": task.generation, "result": result, "sealed_size": sealed}
        calls = [partial(store.work.finish, task.id, **told) for store in replicas * 2]
        assert at_once(*calls) == [(s.Fate.ACCEPTED, "")] * 4
    updates = replicas[1].jobs.facts("j", now_unix_seconds=NOW)[1].updates
    assert sorted(update.site for update in updates) == list(SITES)


def test_of_two_different_results_for_one_task_exactly_one_counts(replicas: tuple[Store, Store]) -> None:
    begun(replicas[0], *SITES)
    for site in SITES:
        task = grant(replicas[0], site).task
        results = [Result(digest=digest * 64, size=8, examples=1) for digest in "cd"]
        told: dict[str, Any] = {"generation": task.generation, "sealed_size": sealed}
        finish = [partial(store.work.finish, task.id, site=site, **told) for store in replicas]
        outcomes = at_once(*(partial(call, result=result) for call, result in zip(finish, results, strict=True)))
        won = outcomes.index((s.Fate.ACCEPTED, ""))
        assert isinstance(outcomes[1 - won], AlreadyExists)
        counted = {u.site: u.digest for u in replicas[0].jobs.facts("j", now_unix_seconds=NOW)[1].updates}
        assert counted[site] == results[won].digest


def test_of_two_grants_of_one_task_only_the_later_one_lives(replicas: tuple[Store, Store]) -> None:
    begun(replicas[0], *SITES)
    for site in SITES:
        grants = [found.task for found in at_once(*(partial(grant, store, site) for store in replicas))]
        first, last = sorted(grants, key=lambda task: task.generation)
        assert (first.id, first.generation) == (last.id, last.generation - 1)
        with pytest.raises(LeaseFenced):
            replicas[1].work.live(first.id, site=site, generation=first.generation)
        assert replicas[0].work.live(last.id, site=site, generation=last.generation).id == last.id


def test_of_two_transitions_from_the_same_facts_one_is_written(replicas: tuple[Store, Store]) -> None:
    for site in SITES:
        enroll(replicas[0], site)
    replicas[0].jobs.create(recipe(), job_id="j", submit_token="t", now_unix_seconds=NOW)
    for written_events in (2, 3):
        job, facts, revision = replicas[0].jobs.facts("j", now_unix_seconds=NOW)
        transition = step(job, facts, job.service_seconds)
        assert transition.effects
        told: dict[str, Any] = {"revision": revision, "now_unix_seconds": NOW}
        written = at_once(*(partial(store.jobs.apply, job, transition, **told) for store in replicas))
        assert sorted(written) == [False, True]
        assert len(replicas[0].views.events("j", after_id=0)) == written_events


def test_a_blob_that_two_replicas_note_at_once_is_noted_once(replicas: tuple[Store, Store]) -> None:
    for digest in SITES:
        told: dict[str, Any] = {"digest": digest * 64, "size": 8, "sealed_size": lambda _: 8}
        assert at_once(*(partial(store.uploads.add, "a", **told) for store in replicas * 2)) == [None] * 4
        assert replicas[1].uploads.known("a", [digest * 64]) == {digest * 64}


# --- whatever is repeated, reordered, lost or late (R3, R4)


class Replicas(RuleBasedStateMachine):
    """Agents that lose answers, repeat, and come back with old leases, and two coordinators that see it all in turn."""

    def __init__(self, stores: tuple[Store, Store], job_id: str) -> None:
        super().__init__()
        self.stores = stores
        self.job_id = job_id
        self.grants: list[s.Task] = []
        self.decisions: list[tuple[s.Job, s.Transition, int]] = []
        self.accepted: dict[tuple[int, str], str] = {}
        self.head = 0

    @initialize()
    def begin(self) -> None:
        cohort = {"quorum": 1, "round_deadline_seconds": 100, "stall_limit_seconds": 30, "gather_seconds": 0}
        spec = recipe(name=self.job_id, rounds=3, cohort=cohort)
        self.stores[0].jobs.create(spec, job_id=self.job_id, submit_token="", now_unix_seconds=NOW)
        drive(self.stores[0], self.job_id)
        task = grant(self.stores[1], "hq").task
        result = Result(digest="0" * 64, size=8, base_digest="b" * 64)
        self.stores[0].work.finish(task.id, site="hq", generation=task.generation, result=result, sealed_size=sealed)
        self.go_on(1)

    def teardown(self) -> None:
        if self.stores[0].views.job(self.job_id).state is s.JobState.RUNNING:
            self.stores[0].jobs.control(self.job_id, action="cancel", now_unix_seconds=NOW)

    @rule(store=st.integers(0, 1), site=st.sampled_from("ab"))
    def lease(self, store: int, site: str) -> None:
        found = self.stores[store].work.lease(site, lease_seconds=30)
        if found is not None:
            assert all(found.task.generation > old.generation for old in self.grants if old.id == found.task.id)
            self.grants.append(found.task)

    @precondition(lambda self: self.grants)
    @rule(store=st.integers(0, 1), which=st.integers(0, 9), digest=st.sampled_from("12"), lost=st.booleans())
    def finish(self, store: int, which: int, digest: str, lost: bool) -> None:
        task = self.grants[-1 - which % len(self.grants)]
        result = Result(digest=digest * 64, size=8, examples=10)
        told: dict[str, Any] = {
            "site": task.site,
            "generation": task.generation,
            "result": result,
            "sealed_size": sealed,
        }
        key, before = (task.round, task.site), rows_of(self.stores[0], self.job_id)
        try:
            answer = self.stores[store].work.finish(task.id, **told)
        except AlreadyExists:
            assert self.accepted.get(key, result.digest) != result.digest
            assert rows_of(self.stores[0], self.job_id) == before
        except LeaseFenced:
            assert key not in self.accepted
            assert rows_of(self.stores[0], self.job_id) == before
        else:
            if answer[0] is s.Fate.ACCEPTED:
                newest = max(old.generation for old in self.grants if old.id == task.id)
                assert key in self.accepted or task.generation == newest
                assert self.accepted.setdefault(key, result.digest) == result.digest
            else:
                assert key not in self.accepted
            if lost:
                after = rows_of(self.stores[0], self.job_id)
                assert self.stores[1 - store].work.finish(task.id, **told) == answer
                assert rows_of(self.stores[0], self.job_id) == after

    @precondition(lambda self: self.grants)
    @rule(store=st.integers(0, 1), which=st.integers(0, 9), fails=st.booleans())
    def report(self, store: int, which: int, fails: bool) -> None:
        task = self.grants[-1 - which % len(self.grants)]
        mine: dict[str, Any] = {"site": task.site, "generation": task.generation}
        newest = max(old.generation for old in self.grants if old.id == task.id)
        before = rows_of(self.stores[0], self.job_id)
        work = self.stores[store].work
        try:
            if fails:
                work.fail(task.id, state=s.TaskState.FAILED, reason="out of memory", **mine)
            else:
                work.heartbeat(task.id, progress={"stage": "TRAINING", "done": which}, lease_seconds=30, **mine)
            # A repeat of a failure that is recorded is answered as the first was, whatever its generation.
            assert task.generation == newest or rows_of(self.stores[0], self.job_id) == before
        except LeaseFenced:
            assert rows_of(self.stores[0], self.job_id) == before

    @rule(store=st.integers(0, 1), seconds=st.sampled_from((5, 31, 101)))
    def time_passes(self, store: int, seconds: int) -> None:
        self.stores[store].jobs.tick(self.job_id, elapsed_seconds=seconds)

    @rule(store=st.integers(0, 1))
    def decide(self, store: int) -> None:
        job, facts, revision = self.stores[store].jobs.facts(self.job_id, now_unix_seconds=NOW)
        self.decisions.append((job, step(job, facts, job.service_seconds), revision))

    @precondition(lambda self: self.decisions)
    @rule(store=st.integers(0, 1), which=st.integers(0, 2))
    def write(self, store: int, which: int) -> None:
        job, transition, revision = self.decisions[-1 - which % len(self.decisions)]
        before = rows_of(self.stores[0], self.job_id)
        told: dict[str, Any] = {"revision": revision, "now_unix_seconds": NOW}
        if not self.stores[store].jobs.apply(job, transition, **told):
            assert rows_of(self.stores[0], self.job_id) == before

    @rule(store=st.integers(0, 1))
    def go_on(self, store: int) -> None:
        drive(self.stores[store], self.job_id)
        _, facts, _ = self.stores[store].jobs.facts(self.job_id, now_unix_seconds=NOW)
        if facts.command is not None and facts.command.state is s.CommandState.QUEUED:
            told: dict[str, Any] = {"round_number": facts.command.round, "generation": facts.command.generation}
            told |= {"digest": "e" * 64, "size": 8, "optimizer_digest": "", "seconds": {}, "sealed_size": lambda _: 8}
            assert self.stores[store].jobs.finish_command(self.job_id, **told)
            assert not self.stores[1 - store].jobs.finish_command(self.job_id, **told)
            drive(self.stores[1 - store], self.job_id)
        for site in "ab":
            self.lease(store, site)

    @invariant()
    def what_was_acknowledged_stays(self) -> None:
        rows = rows_of(self.stores[1], self.job_id)
        accepted = [row for row in rows["updates"] if row["fate"] == "ACCEPTED"]
        assert {(row["round"], row["site"]): row["digest"] for row in accepted} == self.accepted
        head = rows["jobs"][0]["head_version"] or 0
        assert head in (self.head, self.head + 1)
        if head > self.head:
            parts = self.stores[1].views.model(self.job_id, version=head).contributions
            assert parts and all(self.accepted[head, part.site] == part.digest for part in parts)
        self.head = head


def test_no_order_of_calls_counts_an_update_twice_or_loses_one(replicas: tuple[Store, Store]) -> None:
    for site in "ab":
        enroll(replicas[0], site)
    enroll(replicas[0], "hq", Role.HOUSE)
    numbers = itertools.count()
    run_state_machine_as_test(
        lambda: Replicas(replicas, f"j{next(numbers)}"),
        settings=settings(max_examples=20, stateful_step_count=25, suppress_health_check=list(HealthCheck)),
    )
