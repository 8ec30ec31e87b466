"""What a coordinator does each second, and what it is asked, costs the same after ten times as many rounds.

The clock would say so on a quiet machine only, so SQLite's own steps are counted. `silotune bench history` has the
seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from sqlalchemy import event

from coordinator import observe
from coordinator.services.operator import OperatorService
from coordinator.storage.file_blobs import FileBlobStore
from coordinator.storage.garbage import GarbageCollector
from coordinator.storage.store import Store
from deploy.bench import history
from protos.identity import Identity, Role
from protos.v1 import operator_pb2 as pb

SHORT, LONG = 30, 300
STEPS_AT_ONCE = 20
NOW = 1_000_000.0


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Store]]:
    """Two federations of five sites, one with ten times as many rounds."""
    with ExitStack() as stack:
        opened = {}
        for rounds in (SHORT, LONG):
            directory = tmp_path_factory.mktemp("history")
            opened[rounds] = stack.enter_context(closing(Store.open(f"sqlite:///{directory}/c.db")))
            history._write(opened[rounds].database, directory / "blobs", rounds=rounds, sites=5)
        yield opened


def steps(store: Store, act: Callable[[], object]) -> int:
    """How many steps of SQLite's virtual machine it takes."""
    engine, count = store.database._engine, 0

    def one_more() -> None:
        nonlocal count
        count += STEPS_AT_ONCE

    def watch(connection, *_) -> None:  # type: ignore[no-untyped-def]
        connection.set_progress_handler(one_more, STEPS_AT_ONCE)

    event.listen(engine, "checkout", watch)
    try:
        act()
    finally:
        event.remove(engine, "checkout", watch)
    return count


def scrape(store: Store) -> str:
    metrics = observe.Metrics(version="1")
    metrics.registry.register(observe.StoreCollector(store, spare_bytes=lambda: 0, certificates={}))
    return generate_latest(metrics.registry).decode()


def operator(store: Store) -> OperatorService:
    return OperatorService(
        store, blobs=None, authority=None, enrollment_address="", wake_controller=lambda: None  # type: ignore
    )  # fmt: skip


# What is asked of a store whose last committed round is `last`.
QUESTIONS: dict[str, Callable[[Store, int], object]] = {
    "which jobs go on": lambda store, last: store.jobs.active(),
    "take a job": lambda store, last: store.jobs.take(store.jobs.active()[0], driver="me", grace_seconds=30),
    "tick": lambda store, last: store.jobs.tick(history.JOB, elapsed_seconds=1, driver_generation=1),
    "facts": lambda store, last: store.jobs.facts(history.JOB, now_unix_seconds=NOW),
    "the version before": lambda store, last: store.jobs.previous(history.JOB, version=last),
    "a lease": lambda store, last: store.work.lease("site-001", lease_seconds=30),
    "a site reads": lambda store, last: store.uploads.readable(
        Identity(Role.SITE, "site-005"), history._digest("version", last)
    ),
    "the operator reads": lambda store, last: store.uploads.readable(
        Identity(Role.OPERATOR, "op"), history._digest("version", last - 5)
    ),
    "job list": lambda store, last: store.views.jobs(),
    "job events": lambda store, last: store.views.events(history.JOB, after_id=0, limit=10),
    "job show": lambda store, last: operator(store)._get_job(pb.GetJobRequest(job=history.JOB, last_rounds=10)),
    "job show by name": lambda store, last: operator(store)._get_job(pb.GetJobRequest(job="history", last_rounds=10)),
    "the best model": lambda store, last: operator(store)._get_model(history.JOB, None),
    "an early model": lambda store, last: operator(store)._get_model(history.JOB, 1),
    "/metrics": lambda store, last: scrape(store),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_costs_the_same_after_ten_times_as_many_rounds(stores: dict[int, Store], question: str) -> None:
    ask = QUESTIONS[question]
    short, long = (steps(store, lambda store=store, last=last: ask(store, last)) for last, store in stores.items())
    assert long <= 1.5 * short + 500, f"{short} steps after {SHORT} rounds, {long} after {LONG}"


def test_a_collection_of_garbage_costs_the_same(stores: dict[int, Store], tmp_path: Path) -> None:
    def collect(store: Store) -> int:
        collector = GarbageCollector(store.database, FileBlobStore(tmp_path, reserve_bytes=0), keep_versions=20)
        collector.collect()  # what was left of the past
        return steps(store, collector.collect)

    short, long = (collect(store) for store in stores.values())
    assert long <= 1.5 * short + 500, f"{short} steps after {SHORT} rounds, {long} after {LONG}"
