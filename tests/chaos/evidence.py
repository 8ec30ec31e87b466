"""What a run left behind, as plain values: rows of the database, digests of stored blobs, every actor's facts.

Facts are read first and rows after them: what an actor was told before is in the store by then, or it is lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Engine, select

from coordinator.storage import schema
from tests.chaos.history import Fact
from tests.chaos.scenario import HOUSE, Fault, Scenario


@dataclass(frozen=True)
class Part:
    """A site's part in a version."""

    site: str
    digest: str
    weight: float


@dataclass(frozen=True)
class Version:
    number: int
    digest: str
    parts: tuple[Part, ...]
    optimizer_digest: str = ""
    # Of the bytes that are stored under this digest; empty when there are none.
    stored_digest: str = ""
    deleted: bool = False


@dataclass(frozen=True)
class Update:
    round: int
    site: str
    fate: str
    digest: str
    examples: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Round:
    number: int
    attempt: int
    phase: str
    cohort: tuple[str, ...] = ()
    # Why it was committed without its distillation.
    undistilled: str = ""


@dataclass(frozen=True)
class Task:
    round: int
    kind: str
    site: str
    state: str
    generation: int
    failures: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Injected:
    """A fault that was done, and when by the runner's clock: the agents' own may be wrong."""

    fault: Fault
    unix_seconds: float
    # What it ended is back, or it was undone; a fault that stays, such as a wrong clock, ends never.
    ended_unix_seconds: float = math.inf
    # The round in progress when it began.
    round: int = 0


@dataclass(frozen=True)
class Evidence:
    """Of one job."""

    scenario: Scenario
    job: str
    state: str = ""
    sentence: str = ""
    head: int | None = None
    rounds: tuple[Round, ...] = ()
    tasks: tuple[Task, ...] = ()
    updates: tuple[Update, ...] = ()
    versions: tuple[Version, ...] = ()
    facts: tuple[Fact, ...] = ()
    # When each round was first seen in the store, by the runner's clock.
    round_begins: Mapping[int, float] = field(default_factory=dict)
    injected: tuple[Injected, ...] = ()
    # What went wrong with the run itself: a process that ended by itself, no end in time.
    troubles: tuple[str, ...] = ()
    events: tuple[str, ...] = field(default=())

    @property
    def undistilled(self) -> dict[int, str]:
        """The rounds that were committed without their distillation, and why."""
        return {round_.number: round_.undistilled for round_ in self.rounds if round_.undistilled}

    def of_agents(self, *kinds: str, task: str = "train") -> list[Fact]:
        return [
            fact
            for fact in self.facts
            if fact.actor in (*self.scenario.sites, HOUSE)
            and fact.kind in kinds
            and fact["job"] == self.job
            and fact["task"] == task
        ]


def read_store(engine: Engine, job: str, *, stored_digest: Callable[[str], str]) -> dict[str, Any]:
    """The fields of Evidence that the store holds."""

    def rows(table: Any) -> Sequence[Any]:
        key = table.c.id if table is schema.jobs else table.c.job_id
        return connection.execute(select(table).where(key == job)).all()

    with engine.connect() as connection:
        found = {table: rows(table) for table in (
            schema.jobs, schema.rounds, schema.tasks, schema.updates, schema.versions, schema.events
        )}  # fmt: skip
    if not found[schema.jobs]:
        return {}
    row = found[schema.jobs][0]
    versions = sorted(found[schema.versions], key=lambda row: row.version)
    return {
        "state": row.state,
        "sentence": row.sentence,
        "head": row.head_version,
        "rounds": tuple(
            Round(r.number, r.attempt, r.phase, tuple(r.cohort), r.undistilled) for r in found[schema.rounds]
        ),
        "tasks": tuple(
            Task(r.round, r.kind, r.site, r.state, r.generation, r.failures, r.reason) for r in found[schema.tasks]
        ),
        "updates": tuple(
            Update(r.round, r.site, r.fate, r.digest, r.examples, r.reason) for r in found[schema.updates]
        ),
        "versions": tuple(
            Version(
                r.version,
                r.digest,
                tuple(Part(part["site"], part["digest"], part["weight"]) for part in r.contributions),
                r.optimizer_digest,
                stored_digest(r.digest),
                r.deleted,
            )
            for r in versions
        ),
        "events": tuple(r.sentence for r in sorted(found[schema.events], key=lambda row: row.id)),
    }
