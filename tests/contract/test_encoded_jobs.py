"""What a store keeps of jobs whose tensors travel encoded, and for how long."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import update

from coordinator.rounds import state as s
from coordinator.storage import schema
from coordinator.storage.garbage import all_named
from coordinator.storage.store import Store
from coordinator.storage.work import Result
from tests.contract.conftest import NOW, sealed
from tests.contract.test_garbage import Federation
from tests.contract.test_store import aggregated, begun, drive, grant, recipe


@pytest.fixture
def federation(store: Store, tmp_path: Path) -> Iterator[Federation]:
    yield Federation(store, tmp_path)


def test_of_an_encoded_job_version_0_the_differences_that_are_kept_and_the_last_residual_stay(
    federation: Federation,
) -> None:
    federation.begin(rounds=4, encoding={"down": "int8"})
    for number in (1, 2, 3):
        federation.round(number, encoded=True)
        federation.collect(keep_versions=1)
    kept = {b"version 0", b"{}", b"version 3", b"encoded 3", b"residual 3", b"state 3"}
    assert federation.contents() == kept
    federation.hand_in("a", b"a4")
    federation.hand_in("b", b"b4")
    drive(federation.store)
    federation.aggregate(b"version 4", encoded=b"encoded 4", residual=b"residual 4")
    federation.collect(keep_versions=1)
    assert federation.contents() >= {*kept, b"encoded 4", b"residual 4"}, "the round is not over yet"
    with federation.store.database.read() as connection:
        assert all_named(connection) >= {federation.seal(content) for content in (*kept, b"encoded 4", b"residual 4")}
    drive(federation.store)
    assert federation.store.views.job("j").state is s.JobState.COMPLETED
    federation.collect(keep_versions=1)
    federation.age(hours=5)
    federation.collect(keep_versions=1)
    assert federation.contents() == {b"version 0", b"{}", b"version 4", b"encoded 4"}


def test_a_site_is_told_the_last_round_in_which_its_update_counted(store: Store) -> None:
    cohort = {"quorum": 1, "round_deadline_seconds": 100, "gather_seconds": 0}
    spec = recipe(rounds=4, cohort=cohort, encoding={"up": "int4", "down": "int8"})
    begun(store, "a", "b", spec=spec)
    for number, digest in ((1, "1"), (2, "2"), (3, "3")):
        for site in ("a", "b"):
            found = grant(store, site)
            # b is late in round 2: what it had sent before is what counted last.
            assert found.counted_round == (number - 1 if site == "a" or number < 3 else 1)
            assert found.initial_digest == "0" * 64
            assert found.encoded_digest == ("" if number == 1 else str(number - 1) * 64)
            if (site, number) != ("b", 2):
                result = Result(digest=site * 64, size=8, examples=10, steps=1)
                store.work.finish(
                    found.task.id, site=site, generation=found.task.generation, result=result, sealed_size=sealed
                )
        store.jobs.tick("j", elapsed_seconds=101)
        drive(store)
        assert aggregated(store, number, digest, encoded_digest=digest * 64, encoded_size=4, metrics={"error": 0.5})
        drive(store)
    assert store.views.rounds("j", last=1, until=3)[0].metrics == {"error": 0.5}
    store.jobs.control("j", action="cancel", now_unix_seconds=NOW)
    assert store.work.live_jobs() == frozenset()


def test_a_job_that_failed_may_be_resumed_so_its_sites_keep_what_they_have(store: Store) -> None:
    for name, state in (("f", "FAILED"), ("p", "PAUSED"), ("c", "CANCELLED"), ("e", "COMPLETED"), ("r", "RUNNING")):
        store.jobs.create(recipe(name=name), job_id=name, submit_token=name, now_unix_seconds=NOW)
        with store.database.write() as connection:
            connection.execute(update(schema.jobs).where(schema.jobs.c.id == name).values(state=state))
    assert store.work.live_jobs() == {"f", "p", "r"}
