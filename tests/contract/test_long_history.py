"""What a coordinator does each second, and what it is asked, does not go through all rows of a table that grows.

A question that does is quick in every test and slow after ten thousand rounds: so the plans are looked at, and not the
clock. `silotune bench history` has the seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from sqlalchemy import event

from coordinator import observe
from coordinator.storage.file_blobs import FileBlobStore
from coordinator.storage.garbage import GarbageCollector
from coordinator.storage.store import Store
from deploy.bench import history
from protos.identity import Identity, Role

GROWS = ("updates", "tasks", "versions", "evaluations", "commands", "events", "rounds")
NOW = 1_000_000.0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    directory = tmp_path_factory.mktemp("history")
    with closing(Store.open(f"sqlite:///{directory}/c.db")) as opened:
        history._write(opened.database, directory / "blobs", rounds=60, sites=5)
        yield opened


def whole_tables_read(store: Store, act: Callable[[], object]) -> list[tuple[str, str]]:
    """The steps of SQLite's plans that go through all rows of a table that grows, and their statements."""
    engine = store.database._engine
    seen: list[tuple[str, object]] = []

    def note(_connection, _cursor, text, values, _context, _many) -> None:  # type: ignore[no-untyped-def]
        if text.startswith(("SELECT", "UPDATE", "DELETE")):
            seen.append((text, values))

    event.listen(engine, "before_cursor_execute", note)
    try:
        act()
    finally:
        event.remove(engine, "before_cursor_execute", note)
    assert seen
    found = []
    with engine.connect() as connection:
        for text, values in seen:
            for *_, plan in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", values):
                # Partial indexes hold only the few rows that are not over.
                few = any(index in plan for index in ("ix_tasks_open", "ix_versions_unjudged"))
                if plan.startswith("SCAN") and plan.split()[1] in GROWS and not few:
                    found.append((plan, text))
    return found


def scrape(store: Store) -> str:
    metrics = observe.Metrics(version="1")
    metrics.registry.register(observe.StoreCollector(store, spare_bytes=lambda: 0, certificates={}))
    return generate_latest(metrics.registry).decode()


@pytest.mark.parametrize(
    "act",
    [
        lambda store: store.jobs.active(),
        lambda store: store.jobs.take(store.jobs.active()[0], driver="me", grace_seconds=30),
        lambda store: store.jobs.tick(history.JOB, elapsed_seconds=1, driver_generation=1),
        lambda store: store.jobs.facts(history.JOB, now_unix_seconds=NOW),
        lambda store: store.jobs.previous(history.JOB, version=3),
        lambda store: store.work.lease("site-001", lease_seconds=30),
        lambda store: store.uploads.readable(Identity(Role.SITE, "site-005"), history._digest("version", 60)),
        lambda store: store.uploads.readable(Identity(Role.OPERATOR, "op"), history._digest("version", 6)),
        lambda store: store.views.jobs(),
        lambda store: store.views.rounds(history.JOB, last=10),
        lambda store: store.views.tasks(history.JOB, round_number=61),
        lambda store: store.views.evaluations(history.JOB, since_version=55),
        lambda store: store.views.events(history.JOB, after_id=0),
        lambda store: store.views.model(history.JOB, version=None),
        scrape,
    ],
)
def test_a_question_reads_what_it_is_about(store: Store, act: Callable[[Store], object]) -> None:
    assert whole_tables_read(store, lambda: act(store)) == []


def test_a_collection_of_garbage_does_not_read_the_history(store: Store, tmp_path: Path) -> None:
    collector = GarbageCollector(store.database, FileBlobStore(tmp_path, reserve_bytes=0), keep_versions=50)
    assert whole_tables_read(store, collector.collect) == []
