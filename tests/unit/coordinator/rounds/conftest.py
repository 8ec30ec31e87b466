"""Facts of a job, made up in a line each."""

from __future__ import annotations

from dataclasses import replace

from coordinator.rounds import state as s
from protos import jobspec


def spec(**changes) -> jobspec.JobSpec:
    fields = {
        "name": "study",
        "task": {"type": "synthetic"},
        "local": {"steps": 1},
        "rounds": 3,
        "cohort": {"quorum": 2, "round_deadline_seconds": 100, "stall_limit_seconds": 30, "gather_seconds": 10},
        "evaluation": {"where": []},
    }
    return jobspec.parse({**fields, **changes})


def job(recipe: jobspec.JobSpec | None = None, **changes) -> s.Job:
    plain = s.Job("j", recipe or spec(), s.JobState.RUNNING, head_version=0, best_version=None, service_seconds=0.0)
    return replace(plain, **changes)


def sites(*names: str, away: tuple[str, ...] = (), house: str = "") -> tuple[s.SiteFact, ...]:
    found = [s.SiteFact(name, house=False, connected=name not in away) for name in names]
    return tuple(found + ([s.SiteFact(house, house=True, connected=True)] if house else []))


def round_(number: int = 1, phase: s.Phase = s.Phase.COLLECTING, cohort=("a", "b", "c"), **changes) -> s.Round:
    return replace(s.Round(number, 1, phase, cohort, opened_at=0.0, deadline_at=100.0), **changes)


def train(site: str, state: s.TaskState, **changes) -> s.Task:
    until = 1e9 if state.live else 0.0
    task = s.Task(f"j.1.train.{site}", "j", 1, s.TaskKind.TRAIN, site, 0, state=state, lease_until=until)
    return replace(task, **changes)


def update(site: str, fate: s.Fate = s.Fate.ACCEPTED, examples: int = 10) -> s.Update:
    return s.Update(site, fate, digest=site * 64, size=8, examples=examples, steps=5)


def of(transition: s.Transition, kind: type) -> list:
    return [effect for effect in transition.effects if isinstance(effect, kind)]


def aggregating(state: s.CommandState, **changes) -> s.Facts:
    shares = (s.Contribution("a", "a" * 64, 8, 0.5), s.Contribution("b", "b" * 64, 8, 0.5))
    command = replace(s.Command(1, 1, state, shares, queued_at=0.0), **changes)
    return s.Facts(
        sites("a", "b"), round_(phase=s.Phase.AGGREGATING), updates=(update("a"), update("b")), command=command
    )
