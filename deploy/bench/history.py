"""A coordinator with a long history: how soon it is ready after a start, and what it costs to ask it something.

The rows of a job of many rounds and sites are written straight into a fresh database, as a coordinator would have left
them in the middle of the next round. Then the real coordinator starts on them.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy import insert, select, update

from coordinator import settings
from coordinator.rounds.machine import step
from coordinator.settings import blob_directory, database_url
from coordinator.storage import schema
from coordinator.storage.database import Database
from coordinator.storage.file_blobs import FileBlobStore
from coordinator.storage.garbage import GarbageCollector
from coordinator.storage.store import Store
from deploy.local import LocalFederation
from protos import jobspec
from protos.digests import digest_of

JOB = "history-000000"
ROUND_SECONDS = 60.0
ROUNDS_AT_ONCE = 20
REPEATS = 5
Row = dict[str, Any]


def measure(*, rounds: int, sites: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The figures of `silotune bench history`: seconds, and bytes in bytes."""
    directory = Path(tempfile.mkdtemp(prefix="silotune-bench-"))
    try:
        with LocalFederation(directory) as federation:
            return _measure(federation, rounds=rounds, sites=sites, say=say)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _measure(federation: LocalFederation, *, rounds: int, sites: int, say: Callable[[str], None]) -> dict[str, Any]:
    federation.init()
    say("a start without a history")
    empty = _seconds_to_ready(federation)
    federation.stop()
    say(f"writing {rounds} rounds of {sites} sites")
    found = settings.load(federation.data)
    url = database_url(found, federation.data)
    with closing(Database.open(url)) as database:
        _write(database, blob_directory(found, federation.data), rounds=rounds, sites=sites)
    size = sum(path.stat().st_size for path in federation.data.glob("coordinator.db*"))
    say(f"the database has {size / 1e9:.1f} GB; starting on it")
    ready = _seconds_to_ready(federation)
    say("asking it")
    asked = {
        "job show": lambda: federation.silotune("job", "show", JOB),
        "job why": lambda: federation.silotune("job", "why", JOB),
        "site list": lambda: federation.silotune("site", "list"),
        "/metrics": lambda: federation.nodes["coordinator"].get("/metrics"),
    }
    answers = {name: _median_seconds(ask) for name, ask in asked.items()}
    assert federation.silotune("job", "show", JOB)["job"]["round"] == rounds + 1
    peak = federation.nodes["coordinator"].peak_rss_bytes()
    federation.stop()
    say("one step of the running job, one look for work, one collection of garbage")
    with closing(Store.open(url)) as store:
        blobs = FileBlobStore(blob_directory(found, federation.data), reserve_bytes=0)
        inside = {
            "step": _median_seconds(lambda: _step(store)),
            "lease": _median_seconds(lambda: store.work.lease(_name(sites), lease_seconds=30, holding=())),
            "garbage": _median_seconds(GarbageCollector(store.database, blobs).collect),
        }
    return {
        "what": {"rounds": rounds, "sites": sites, "database_bytes": size},
        "seconds_to_ready": {"empty": empty, "with_history": ready},
        "seconds_of_commands": answers,
        "seconds_inside": inside,
        "coordinator_peak_rss_bytes": peak,
    }


def _seconds_to_ready(federation: LocalFederation) -> float:
    began = time.monotonic()
    node = federation.start_coordinator(wait=False)

    def ready() -> bool:
        try:
            return node.get("/readyz")[0] == 200
        except OSError:
            return False

    federation.wait_for(ready, seconds=600, saying="the coordinator being ready", poll_seconds=0.02)
    return time.monotonic() - began


def _median_seconds(act: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.monotonic()
        act()
        times.append(time.monotonic() - began)
    return statistics.median(times)


def _step(store: Store) -> None:
    job, facts, _ = store.jobs.facts(JOB, now_unix_seconds=time.time())
    sites = tuple(replace(site, connected=True) for site in facts.sites)
    assert step(job, replace(facts, sites=sites), job.service_seconds).effects == ()


def _write(database: Database, blobs: Path, *, rounds: int, sites: int) -> None:
    names = [_name(number) for number in range(1, sites + 1)]
    spec = jobspec.parse(
        {
            "name": "history", "task": {"type": "synthetic"}, "rounds": rounds + 1, "local": {"steps": 1},
            "cohort": {"quorum": sites, "round_deadline_seconds": 1e9, "stall_limit_seconds": 1e9},
            "evaluation": {"metric": "loss", "deadline_seconds": 1e9},
        }
    )  # fmt: skip
    now = time.time()
    with database.write() as connection:
        connection.execute(
            insert(schema.jobs).values(
                id=JOB, spec=spec.canonical_json, state="RUNNING", head_version=rounds, best_version=rounds,
                created_unix_seconds=now, service_seconds=rounds * ROUND_SECONDS,
            )
        )  # fmt: skip
        connection.execute(
            insert(schema.sites),
            [
                {"name": name, "role": "site", "state": "ENROLLED", "last_seen_unix_seconds": now, "agent": {}}
                for name in names
            ],
        )
    for first in range(0, rounds + 1, ROUNDS_AT_ONCE):
        numbers = range(first, min(first + ROUNDS_AT_ONCE, rounds + 1))
        with database.write() as connection:
            for table, rows in _rows(numbers, names):
                connection.execute(insert(table), rows)
        for number in numbers:
            path = blobs / "blobs" / (digest := _digest("version", number))[:2] / digest
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
    _write_round_in_progress(database, names, number=rounds + 1)


def _rows(numbers: range, names: list[str]) -> Iterator[tuple[Any, list[Row]]]:
    """What committed rounds leave: each site trained and measured, each update counted."""
    trained = [(number, name) for number in numbers if number for name in names]
    yield schema.rounds, [_round(number, "COMMITTED", names) for number in numbers]
    yield schema.tasks, [_task(number, "TRAIN", name, version=number - 1) for number, name in trained]
    yield schema.tasks, [_task(number, "EVALUATE", name, version=number) for number in numbers for name in names]
    yield schema.updates, [_update(number, name) for number, name in trained]
    yield schema.versions, [_version(number, names) for number in numbers]
    yield schema.commands, [_command(number, names) for number in numbers if number]
    yield schema.evaluations, [
        {
            "job_id": JOB, "version": number, "site": name, "split": "validation", "examples": 500,
            "metrics": {"loss": 1 / (1 + number), "accuracy": 0.7}, "seconds": {"run": 3.25},
        }
        for number in numbers for name in names
    ]  # fmt: skip
    yield schema.events, [
        {
            "unix_seconds": number * ROUND_SECONDS, "job_id": JOB, "round": number,
            "sentence": f"round {number} {what}",
        }
        for number in numbers for what in ("opens", "begins with " + ", ".join(names), "aggregates", "is committed")
    ]  # fmt: skip


def _write_round_in_progress(database: Database, names: list[str], *, number: int) -> None:
    """All sites but the last have handed in; the last one trains."""
    with database.write() as connection:
        connection.execute(insert(schema.rounds), [_round(number, "COLLECTING", names)])
        connection.execute(insert(schema.tasks), [_task(number, "TRAIN", name, version=number - 1) for name in names])
        connection.execute(insert(schema.updates), [_update(number, name) for name in names[:-1]])
        connection.execute(
            insert(schema.uploads),
            [{"owner": name, "digest": _digest(name, number), "size": 1} for name in names[:-1]],
        )
        tasks = schema.tasks
        mine = select(tasks.c.id).where(tasks.c.job_id == JOB, tasks.c.round == number, tasks.c.site == names[-1])
        connection.execute(
            update(tasks).where(tasks.c.id.in_(mine), tasks.c.kind == "TRAIN").values(state="RUNNING", lease_until=1e9)
        )


def _name(number: int) -> str:
    return f"site-{number:03}"


def _digest(of: str, number: int) -> str:
    return digest_of(f"{of} {number}".encode())


def _round(number: int, phase: str, names: list[str]) -> Row:
    opened = (number - 1) * ROUND_SECONDS
    over = phase == "COMMITTED"
    return {
        "job_id": JOB, "number": number, "attempt": 1, "phase": phase, "cohort": names, "opened_at": opened,
        "deadline_at": opened + 1e9, "collecting_at": opened + 1, "aggregating_at": opened + 50 if over else None,
        "ended_at": opened + ROUND_SECONDS if over else None, "sentence": f"round {number} is {phase.lower()}",
    }  # fmt: skip


def _task(number: int, kind: str, site: str, *, version: int) -> Row:
    began = (number - 1) * ROUND_SECONDS
    return {
        "id": f"{JOB}.{number}.{kind.lower()}.{site}", "job_id": JOB, "round": number, "kind": kind, "site": site,
        "version": version, "split": "validation" if kind == "EVALUATE" else "", "state": "SUCCEEDED", "generation": 1,
        "queued_at": began, "lease_until": began + 30, "last_progress_at": began + 20,
        "progress": {"stage": "UPLOADING", "done": 1000, "total": 1000, "unit": "bytes", "metrics": {"loss": 0.5}},
        "bytes_up": 1000, "bytes_down": 1000,
    }  # fmt: skip


def _update(number: int, site: str) -> Row:
    return {
        "job_id": JOB, "round": number, "site": site, "fate": "ACCEPTED", "digest": _digest(site, number),
        "size": 1, "examples": 500, "steps": 10, "metrics": {"train_loss": 0.5},
        "seconds": {"fetch": 1.5, "run": 40.25, "upload": 2.5},
    }  # fmt: skip


def _parts(number: int, names: list[str]) -> list[Row]:
    return [{"site": n, "digest": _digest(n, number), "size": 1, "weight": 1 / len(names)} for n in names]


def _version(number: int, names: list[str]) -> Row:
    return {
        "job_id": JOB, "version": number, "digest": _digest("version", number), "size": 1,
        "contributions": _parts(number, names), "committed_unix_seconds": number * ROUND_SECONDS,
    }  # fmt: skip


def _command(number: int, names: list[str]) -> Row:
    return {
        "job_id": JOB, "round": number, "generation": 1, "state": "DONE", "queued_at": number * ROUND_SECONDS,
        "contributions": _parts(number, names), "digest": _digest("version", number), "size": 1,
        "seconds": {"read": 1.5, "combine": 2.5, "write": 0.5},
    }  # fmt: skip
