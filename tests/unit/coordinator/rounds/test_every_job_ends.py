"""Whatever sites, operators and disks do to a job: it ends, or it says until when it waits, and it can be resumed.

The store is a real one. The sites are these tests: they connect, take tasks, end them in every way, and leave.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.rounds import state as s
from coordinator.rounds.machine import step
from coordinator.storage.store import Store
from coordinator.storage.work import Result
from protos import jobspec
from protos.errors import Conflict
from protos.identity import Role

NOW = 1_000_000.0
DEADLINE_SECONDS = 100.0
SITES, ROUNDS = 3, 2
LEASE_SECONDS = 20.0
SAYS_WHEN = re.compile(r"\d+ (s|min|h)\b")
_numbers = itertools.count()


@dataclass
class World:
    """One job, the sites that may take part in it, and what is held up against every decision."""

    store: Store
    spec: jobspec.JobSpec
    names: list[str]
    job_id: str
    house: str = ""
    connected: set[str] = field(default_factory=set)
    held: dict[str, s.Task] = field(default_factory=dict)

    @staticmethod
    def of(store: Store, *, size: int | str, quorum: int, retries: int, where: list[str], distils: int) -> World:
        number = next(_numbers)
        names = [f"s{number}-{letter}" for letter in "abc"]
        spec = jobspec.parse(
            {
                "name": "study",
                "task": {"type": "synthetic"},
                "local": {"steps": 1},
                "rounds": ROUNDS,
                "cohort": {
                    "sites": names,
                    "size": size,
                    "quorum": quorum,
                    "retries": retries,
                    "gather_seconds": 10,
                    "round_deadline_seconds": DEADLINE_SECONDS,
                    "stall_limit_seconds": 30,
                },
                "evaluation": {"where": where, "deadline_seconds": DEADLINE_SECONDS},
                **({"distillation": {"every": distils, "deadline_seconds": DEADLINE_SECONDS}} if distils else {}),
            }
        )
        job_id = store.jobs.create(spec, job_id=f"j{number}", submit_token="", now_unix_seconds=NOW)
        return World(store, spec, names, job_id, house=f"s{number}-hq" if distils else "")

    @property
    def everybody(self) -> list[str]:
        return [*self.names, self.house] if self.house else self.names

    # --- the controller

    def drive(self) -> s.Job:
        """Steps until the job waits or is at rest."""
        for _ in range(50):
            job, facts, revision = self.store.jobs.facts(self.job_id, now_unix_seconds=NOW)
            sites = tuple(
                replace(site, connected=site.name in self.connected)
                for site in facts.sites
                if site.name in self.everybody
            )
            facts = replace(facts, sites=sites)
            done = step(job, facts, job.service_seconds)
            assert done == step(job, facts, job.service_seconds), "a decision depends on its facts alone"
            self.check(job, facts, done)
            if not done.effects:
                return job
            assert self.store.jobs.apply(job, done, revision=revision, now_unix_seconds=NOW)
        raise AssertionError(f"the job never waits: {done.sentence}")

    def within(self, turns: int, there: Callable[[s.Job], bool], *, then: Callable[[], None]) -> None:
        """Does `then` until the job is there."""
        for _ in range(turns):
            if there(self.drive()):
                return
            then()
        raise AssertionError(f"after {turns} turns: {self.store.views.job(self.job_id).sentence}")

    def check(self, job: s.Job, facts: s.Facts, done: s.Transition) -> None:
        assert done.sentence
        if not done.effects and job.state is s.JobState.RUNNING:
            assert SAYS_WHEN.search(done.sentence), f"until when? {done.sentence}"
        accepted = {(update.site, update.digest) for update in facts.updates if update.fate is s.Fate.ACCEPTED}
        for effect in done.effects:
            if isinstance(effect, s.OpenRound) and effect.number > 0:
                assert job.head_version == effect.number - 1, "a round opens on the committed one before it"
            if isinstance(effect, s.Commit):
                assert effect.version == (0 if job.head_version is None else job.head_version + 1)
            if isinstance(effect, s.Commit) and effect.version > 0:
                parts = {(part.site, part.digest) for part in effect.contributions}
                assert len(parts) == len(effect.contributions) >= self.spec.cohort.quorum
                assert parts <= accepted
                assert sum(part.weight for part in effect.contributions) == pytest.approx(1.0)
                assert facts.command is not None
                distilled = effect.digest != facts.command.digest
                assert (distilled or bool(effect.undistilled)) == self.spec.is_distilled(effect.version)

    def pass_time(self, seconds: float) -> None:
        job = self.store.jobs.facts(self.job_id, now_unix_seconds=NOW)[0]
        self.store.jobs.tick(self.job_id, elapsed_seconds=seconds, driver_generation=job.driver_generation)

    def control(self, action: str) -> None:
        # Not every state allows it.
        with contextlib.suppress(Conflict):
            self.store.jobs.control(self.job_id, action=action, now_unix_seconds=NOW)

    # --- the sites

    def enroll(self, name: str) -> None:
        row = self.store.sites.get(name)
        if row is None or row.state != "ENROLLED":
            secret = f"{name} {next(_numbers)}"
            valid = {"expires_unix_seconds": NOW + 60, "now_unix_seconds": NOW}
            role = Role.HOUSE if name == self.house else Role.SITE
            self.store.sites.invite(name, role=role, secret_hash=secret, **valid)
            self.store.sites.redeem(secret, key_hash="key", serial="1", **valid)
        self.connected.add(name)

    def leave(self, name: str) -> None:
        self.connected.discard(name)

    def revoke(self, name: str) -> None:
        row = self.store.sites.get(name)
        if row is not None and row.state == "ENROLLED":
            self.store.sites.revoke(name)
        self.connected.discard(name)

    def take(self, name: str) -> s.Task | None:
        if name not in self.connected:
            return None
        grant = self.store.work.lease(name, lease_seconds=LEASE_SECONDS)
        if grant is not None:
            self.held[name] = grant.task
        return self.held.get(name)

    def report(self, name: str, ending: str) -> None:
        task = self.take(name)
        if task is None:
            return
        mine: dict[str, Any] = {"site": name, "generation": task.generation}
        digest = f"{next(_numbers):064x}"
        work = self.store.work
        try:
            if ending == "succeed":
                result = Result(digest=digest, size=8, examples=10, steps=1)
                work.finish(task.id, result=result, sealed_size=lambda _: 8, **mine)
            elif ending == "reject":
                work.reject(task.id, result=Result(digest=digest, size=8, examples=10), reason="NaN", **mine)
            elif ending in ("fail", "decline"):
                state = s.TaskState.FAILED if ending == "fail" else s.TaskState.DECLINED
                work.fail(task.id, state=state, reason="out of memory", **mine)
            else:
                progress = {"stage": ending, "done": 1, "total": 9, "unit": "steps"}
                work.heartbeat(task.id, progress=progress, lease_seconds=LEASE_SECONDS, **mine)
                return
        except Conflict:
            pass  # fenced meanwhile
        self.held.pop(name, None)

    def aggregate(self, ending: str) -> None:
        command = self.store.jobs.facts(self.job_id, now_unix_seconds=NOW)[1].command
        if command is None or command.state is not s.CommandState.QUEUED:
            return
        which: dict[str, Any] = {"round_number": command.round, "generation": command.generation}
        if ending == "done":
            made = {"digest": "d" * 64, "size": 8, "optimizer_digest": "", "seconds": {}, "sealed_size": lambda _: 8}
            self.store.jobs.finish_command(self.job_id, **made, **which)
        else:
            site = command.contributions[0].site if ending == "corrupt" else ""
            self.store.jobs.fail_command(self.job_id, error="no space left", corrupt_site=site, **which)

    def cooperate(self) -> None:
        for name in self.everybody:
            self.report(name, "succeed")
        self.aggregate("done")


SITE_ACTIONS: dict[str, Callable[[World, str], None]] = {
    "enroll": World.enroll,
    "leave": World.leave,
    "revoke": World.revoke,
    "take": lambda world, name: world.take(name) and None,
    **{
        ending: lambda world, name, ending=ending: world.report(name, ending)
        for ending in ("succeed", "fail", "decline", "reject", "TRAINING", "PAUSED", "UPLOADING")
    },
}
actions = st.one_of(
    # The last is the house agent, where there is one.
    st.tuples(st.sampled_from(sorted(SITE_ACTIONS)), st.integers(0, SITES)),
    st.tuples(st.just("cooperate"), st.none()),
    st.tuples(st.just("pass"), st.sampled_from([1.0, 11.0, 31.0, 101.0])),
    st.tuples(st.just("aggregate"), st.sampled_from(["done", "fail", "corrupt"])),
    st.tuples(st.just("control"), st.sampled_from(["pause", "resume", "readmit"])),
)


def act(world: World, what: str, how: Any) -> None:
    if what == "pass":
        world.pass_time(how)
    elif what == "cooperate":
        world.cooperate()
    elif what == "aggregate":
        world.aggregate(how)
    elif what == "control":
        world.control(how)
    else:
        SITE_ACTIONS[what](world, world.everybody[how % len(world.everybody)])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    path: Path = tmp_path_factory.mktemp("store") / "coordinator.db"
    with contextlib.closing(Store.open(f"sqlite:///{path}")) as opened:
        yield opened


rules = st.fixed_dictionaries(
    {
        "size": st.sampled_from(["all", 2]),
        "quorum": st.integers(1, 2),
        "retries": st.integers(0, 1),
        "where": st.sampled_from([[], ["sites"]]),
        "distils": st.sampled_from([0, 1, 2]),
    }
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(rules=rules, present=st.integers(0, SITES), begun=st.integers(0, 3), story=st.lists(actions, max_size=30))
def test_a_job_ends_whatever_happens_and_goes_on_when_everything_is_well_again(
    store: Store, rules: dict[str, Any], present: int, begun: int, story: list[Any]
) -> None:
    world = World.of(store, **rules)
    for name in [*world.names[:present], *([world.house] if world.house and present else [])]:
        world.enroll(name)
    world.drive()
    for what, how in [("cooperate", None)] * begun + story:
        act(world, what, how)
        world.drive()
    # From here on nobody does anything: each attempt has one deadline, version 0 one for each site, an aggregate two, a
    # distillation one.
    world.control("resume")
    deadlines = SITES + 1 + rules["retries"] + 1 + 2 + 2 + 1
    world.within(2 * deadlines, lambda job: job.state.ended, then=lambda: world.pass_time(DEADLINE_SECONDS / 2 + 1))
    # And now everybody does what he should.
    for name in world.everybody:
        world.enroll(name)
    world.control("readmit")
    world.control("resume")
    world.within(20, lambda job: job.state is s.JobState.COMPLETED, then=world.cooperate)
