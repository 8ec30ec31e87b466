"""Runs a scenario: submits its job, does each fault at its moment and undoes it, waits for the end, asks the judge.

One loop in the main thread looks at the store a few times a second and does everything in turn, so that a fault begins
at a state of the run that was seen. At the end all is healed, and the job must end by itself: one that makes no step
for HANG_SECONDS hangs.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import psutil
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from client_agent.taskdir import RESULT, SPEC
from coordinator.storage import schema
from protos import jobspec
from tests.chaos import faults
from tests.chaos.arena import Arena
from tests.chaos.checker import ENDED, Violation, check
from tests.chaos.evidence import Evidence, Injected, read_store
from tests.chaos.history import AgentLog, History
from tests.chaos.operating import Operator
from tests.chaos.recompute import recompute
from tests.chaos.scenario import HOUSE, Fault, Scenario
from tests.chaos.storing import damage, stored_digest

LOOK_SECONDS = 0.02
HANG_SECONDS = 90.0
# For each round of a seed, whatever goes on meanwhile: a process that dies at each start is something that happens, for
# ever.
ROUND_SECONDS = 100.0


@dataclass(frozen=True)
class View:
    """The job as the store has it now."""

    state: str = ""
    round: int = 0
    phase: str = ""
    attempt: int = 0
    head: int = -1
    accepted: frozenset[str] = frozenset()
    digests: dict[str, str] = field(default_factory=dict, compare=False)


@dataclass
class Outcome:
    scenario: Scenario
    violations: list[Violation]
    evidence: Evidence
    seconds: float
    injected: Counter[str]
    skipped: Counter[str]
    missed: Counter[str]
    # Ends of processes on a full disk.
    excused: Counter[str]
    recovery_seconds: float = 0.0
    logs: str = ""


@dataclass
class Runner:
    arena: Arena
    operator: Operator

    def __post_init__(self) -> None:
        self._engine = self.arena.rows
        self._logs = [AgentLog(site, self.arena.node(site).log) for site in self.arena.agents]

    def run(self, scenario: Scenario, *, token: str) -> Outcome:
        directory = self.arena.directory / "histories"
        directory.mkdir(exist_ok=True)
        run = _Run(self, scenario, History(directory / f"{token}.jsonl"))
        began = time.monotonic()
        run.prepare()
        self.operator.begin(
            run.history, spec_json=jobspec.parse(scenario.recipe).canonical_json, token=f"{token}-{scenario.seed}"
        )
        run.until_the_end()
        run.heal()
        for log in self._logs:
            run.history.extend(log.read())
        evidence = Evidence(
            scenario=scenario,
            job=self.operator.job,
            facts=tuple(run.history.facts),
            round_begins=run.round_begins,
            injected=(*run.injected, *self.arena.crashed),
            troubles=(*run.troubles, *self.arena.unexplained),
            **read_store(self._engine, self.operator.job, stored_digest=partial(stored_digest, self.arena.storage)),
        )
        excused = self.arena.excused_ends.copy()
        # What ends between two seeds is held against the next one.
        self.arena.unexplained.clear()
        self.arena.excused_ends.clear()
        with tempfile.TemporaryDirectory() as scratch:
            made = recompute(
                scenario.recipe, evidence.versions, scratch=Path(scratch), undistilled=evidence.undistilled
            )
            violations = check(evidence, made)
        return Outcome(
            scenario=scenario,
            violations=violations,
            evidence=evidence,
            seconds=time.monotonic() - began,
            injected=Counter(done.fault.kind for done in evidence.injected),
            skipped=run.skipped,
            missed=Counter(fault.kind for fault in run.waiting),
            excused=excused,
            recovery_seconds=run.recovery_seconds,
            logs=self.arena.tails(80) if violations else "",
        )

    def view(self, job: str) -> View | None:
        """None while the store cannot be read."""
        if "postgres" in self.arena.away:
            # A stopped server would stop this loop too, and it is this loop that lets it go on.
            return None
        jobs, rounds, updates = schema.jobs, schema.rounds, schema.updates
        try:
            with self._engine.connect() as connection:
                row = connection.execute(select(jobs.c.state, jobs.c.head_version).where(jobs.c.id == job)).first()
                if row is None:
                    return View()
                latest = select(func.max(rounds.c.number)).where(rounds.c.job_id == job).scalar_subquery()
                now = connection.execute(
                    select(rounds).where(rounds.c.job_id == job, rounds.c.number == latest)
                ).first()
                if now is None:
                    return View(row.state)
                accepted = connection.execute(
                    select(updates.c.site, updates.c.digest).where(
                        updates.c.job_id == job, updates.c.round == now.number, updates.c.fate == "ACCEPTED"
                    )
                ).all()
        except SQLAlchemyError:
            return None
        head = -1 if row.head_version is None else row.head_version
        digests = {one.site: one.digest for one in accepted}
        return View(row.state, now.number, now.phase, now.attempt, head, frozenset(digests), digests)


class _Run:
    """One scenario under way."""

    def __init__(self, runner: Runner, scenario: Scenario, history: History) -> None:
        self._runner, self._arena, self._operator = runner, runner.arena, runner.operator
        self._scenario = scenario
        self.history = history
        self.waiting: list[Fault] = []
        self.injected: list[Injected] = []
        self.skipped: Counter[str] = Counter()
        self.troubles: list[str] = []
        self.recovery_seconds = 0.0
        self.round_begins: dict[int, float] = {}
        # When it is due, the fault by its place in `injected`, what to call.
        self._undo: list[tuple[float, int, Callable[[], None]]] = []
        self._view = View()
        # Bytes that each link had passed when the round in progress was first seen.
        self._passed: dict[str, dict[str, int]] = {}
        # When the moment of each fault came.
        self._came: dict[Fault, float] = {}
        self._came_back: float | None = None
        self._revoked: set[str] = set()

    def prepare(self) -> None:
        for fault in self._scenario.faults:
            if why := faults.missing(fault, self._arena):
                self.skipped[f"{fault.kind}: {why}"] += 1
            else:
                self.waiting.append(fault)
        self._arena.use_clocks({fault.target for fault in self.waiting if fault.kind.startswith("clock")})
        self._arena.settle()

    def until_the_end(self) -> None:
        began = moved = time.monotonic()
        while True:
            seen = self._look()
            self.round_begins.setdefault(seen.round, time.time())
            if seen.state in ENDED or self._arena.unexplained:
                return
            if seen != self._view or self._undo or self._arena.down:
                moved = time.monotonic()
            if seen.round != self._view.round or not self._passed:
                self._passed = {site: dict(link.passed) for site, link in self._arena.network.links.items()}
            self._view = seen
            if time.monotonic() - moved > HANG_SECONDS:
                self.troubles.append(f"nothing happened for {HANG_SECONDS:g} s: {self._why()}")
                return
            if time.monotonic() - began > ROUND_SECONDS * self._scenario.rounds:
                self.troubles.append(f"the job did not end within {ROUND_SECONDS:g} s a round: {self._why()}")
                return
            self._undo_what_is_over(by=time.monotonic())
            self._keep_running()
            for fault in list(self.waiting):
                if self._is_due(fault) and self._try(fault):
                    self.waiting.remove(fault)
            time.sleep(LOOK_SECONDS)

    def heal(self) -> None:
        """Everything is well again when this returns."""
        self._undo_what_is_over(by=math.inf)
        self._arena.network.heal()
        for name in self._arena.clocked:
            self._arena.set_clock(name, 0.0)
        deadline = time.monotonic() + HANG_SECONDS
        while not (self._arena.ready() and self._operator.idle and self._came_back is None):
            self._keep_running()
            if self._arena.unexplained:
                return
            if time.monotonic() > deadline:
                self.troubles.append(f"the federation did not come back within {HANG_SECONDS:g} s")
                return
            time.sleep(LOOK_SECONDS)
        self._arena.has_lost_a_site |= bool(self._revoked)

    # --- looking

    def _look(self) -> View:
        if not self._operator.job:
            return View()
        return self._runner.view(self._operator.job) or self._view

    def _why(self) -> str:
        shown = self._operator.look()
        return shown["job"]["sentence"] if shown else "the coordinator does not answer"

    def _is_due(self, fault: Fault) -> bool:
        if not self._has_come(fault):
            return False
        came = self._came.setdefault(fault, time.monotonic())
        return time.monotonic() >= came + fault.when.after_seconds

    def _has_come(self, fault: Fault) -> bool:
        when, view = fault.when, self._view
        if view.round < when.round or not view.phase:
            return False
        if fault.kind == "damage update":
            # Not the last one: the round would be aggregated before its bytes are touched.
            return (
                view.phase == "COLLECTING"
                and when.site in view.accepted
                and len(view.accepted) < len(self._scenario.sites)
            )
        if view.round > when.round:
            return True  # It went by between two looks; any other moment is as good.
        match when.moment:
            case "selecting":
                return True
            case "aggregating":
                return view.phase == "AGGREGATING"
            case "accepted":
                return when.site in view.accepted
            case "training":
                return self._is_at_it(when.site, "train")
            case "distilling":
                return self._is_at_it(HOUSE, "distill")
            case "downloading":
                return self._share(when.site, "down") >= when.share
            case "uploading":
                return self._share(when.site, "up") >= when.share
        raise NotImplementedError(when.moment)

    def _is_at_it(self, site: str, kind: str) -> bool:
        work = self._arena.federation.home(site) / "tasks" / f"{self._operator.job}-{self._view.round}-{kind}"
        return (work / SPEC).exists() and not (work / RESULT).exists()

    def _share(self, site: str, direction: str) -> float:
        passed = self._arena.network.links[site].passed[direction] - self._passed.get(site, {}).get(direction, 0)
        return passed / (self._scenario.payload_mb * 1e6)

    # --- doing

    def _try(self, fault: Fault) -> bool:
        """Whether it was done."""
        try:
            if fault.kind == "damage update":
                if not damage(self._arena.storage, self._view.digests[fault.when.site]):
                    return False
                undo: Callable[[], None] | None = None
            elif fault.kind == "pause job":
                self._operator.control("pause job")
                undo = lambda: self._operator.control("resume job")  # noqa: E731
            elif fault.kind == "revoke site":
                self._operator.revoke(fault.target)
                self._revoked.add(fault.target)
                undo = None
            else:
                undo = faults.inject(fault, self._arena)
        except (faults.NotNow, psutil.Error):
            return False
        now = time.time()
        lasting = undo is not None or fault.target in self._arena.down or fault.kind.startswith("clock")
        self.injected.append(Injected(fault, now, math.inf if lasting else now, self._view.round))
        self.history.add("chaos", fault.kind, target=fault.target, text=str(fault), seen=f"round {self._view.round}")
        if undo is not None:
            self._undo.append((time.monotonic() + fault.seconds, len(self.injected) - 1, undo))
        return True

    def _undo_what_is_over(self, *, by: float) -> None:
        for due in [due for due in self._undo if due[0] <= by]:
            self._undo.remove(due)
            _, place, undo = due
            undo()
            self._note_end(place)

    def _note_end(self, place: int) -> None:
        self.injected[place] = replace(self.injected[place], ended_unix_seconds=time.time())

    def _keep_running(self) -> None:
        started = self._arena.watch()
        for place, done in enumerate(self.injected):
            back = done.fault.target in started and done.fault.kind.startswith(("kill", "restart"))
            if back and done.ended_unix_seconds == math.inf:
                self._note_end(place)
        if any(name in self._arena.replicas for name in started) and self._came_back is None:
            self._came_back = time.monotonic()
        if self._came_back is not None and self._operator.answered > self._came_back:
            self.recovery_seconds = max(self.recovery_seconds, self._operator.answered - self._came_back)
            self._came_back = None
