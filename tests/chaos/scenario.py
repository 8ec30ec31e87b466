"""A seed -> what is run and what goes wrong meanwhile. Pure: the same seed is the same scenario on every machine.

A fault waits for a condition of the run ("when bravo uploads in round 2"), not for a moment of the clock, so that a
seed means the same on a fast machine and on a slow one, as far as processes allow. What a machine cannot do is skipped
there by the runner, loudly, and never drawn anew: seeds would no longer name the same thing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

SITES = ("alfa", "bravo", "charlie", "delta")
# The site whose agent lives in a network namespace of its own, where the machine has them.
SITE_IN_NAMESPACE = "delta"
ENGINES = ("sqlite", "postgres")
# The house agent: it makes version 0, and distils.
HOUSE = "hq"
COORDINATOR = "coordinator"
REPLICAS = (COORDINATOR, "coordinator-2", "coordinator-3")


@dataclass(frozen=True)
class Kind:
    """A kind of fault: how often it is drawn, whom it hits, for how long, and where in a round it begins."""

    name: str
    weight: int
    target: str  # "coordinator" | "site" | "namespace" | "job" | "postgres" | "s3"
    seconds: tuple[float, float]
    moments: tuple[str, ...]
    engines: tuple[str, ...] = ENGINES


ANY = ("selecting", "training", "downloading", "uploading", "accepted", "aggregating")
AT_SITE = ("training", "downloading", "uploading", "accepted")
KINDS = (
    Kind("kill coordinator", 8, "coordinator", (0.0, 1.5), ANY),
    Kind("restart coordinator", 3, "coordinator", (0.0, 1.0), ANY),
    Kind("stop coordinator", 4, "coordinator", (0.5, 4.0), ANY),
    Kind("kill aggregation", 1, "coordinator", (0.0, 0.0), ("aggregating",)),
    Kind("kill agent", 8, "site", (0.0, 2.0), AT_SITE),
    Kind("restart agent", 3, "site", (0.0, 1.0), AT_SITE),
    Kind("stop agent", 4, "site", (1.0, 5.0), AT_SITE),
    Kind("kill trainer", 4, "site", (0.0, 0.0), ("training",)),
    Kind("stop trainer", 2, "site", (0.5, 3.0), ("training",)),
    Kind("kill agent and trainer", 2, "site", (0.0, 1.0), ("training",)),
    Kind("cut", 4, "site", (1.0, 4.0), AT_SITE),
    Kind("cut towards coordinator", 3, "site", (1.0, 4.0), AT_SITE),
    Kind("cut towards agent", 3, "site", (1.0, 4.0), AT_SITE),
    Kind("delay", 2, "site", (2.0, 4.0), AT_SITE),
    Kind("slow link", 2, "site", (2.0, 4.0), AT_SITE),
    Kind("corrupt", 3, "site", (0.0, 0.0), ("downloading", "uploading")),
    Kind("reset", 5, "site", (0.0, 0.0), AT_SITE),
    Kind("refuse", 2, "site", (1.0, 3.0), AT_SITE),
    Kind("namespace cut", 3, "namespace", (1.0, 4.0), AT_SITE),
    Kind("namespace cut towards coordinator", 2, "namespace", (1.0, 4.0), AT_SITE),
    Kind("namespace cut towards agent", 2, "namespace", (1.0, 4.0), AT_SITE),
    Kind("full disk of coordinator", 3, "coordinator", (1.0, 4.0), ANY, ("sqlite",)),
    Kind("full disk of agent", 3, "site", (1.0, 3.0), AT_SITE),
    Kind("clock of coordinator", 2, "coordinator", (2.0, 4.0), ANY),
    Kind("clock of agent", 2, "site", (2.0, 4.0), AT_SITE),
    Kind("damage update", 3, "site", (0.0, 0.0), ("accepted",)),
    Kind("pause job", 2, "job", (0.5, 2.0), ANY),
    Kind("revoke site", 1, "site", (0.0, 0.0), AT_SITE),
    Kind("restart postgres", 6, "postgres", (0.0, 2.0), ANY, ("postgres",)),
    Kind("kill postgres", 4, "postgres", (0.0, 2.0), ANY, ("postgres",)),
    Kind("stop postgres", 4, "postgres", (0.5, 4.0), ANY, ("postgres",)),
    Kind("s3 away", 8, "s3", (0.5, 4.0), ANY, ("postgres",)),
)  # fmt: skip
BY_NAME = {kind.name: kind for kind in KINDS}
# What is done while a round is distilled, to the house agent or to a coordinator.
IN_DISTILLING = (
    "kill coordinator", "restart coordinator", "stop coordinator", "kill agent", "restart agent", "stop agent",
    "kill trainer", "stop trainer", "kill agent and trainer", "cut", "cut towards coordinator", "cut towards agent",
    "reset",
)  # fmt: skip
DISTILLED_SHARE = 0.25
# Each of these may cost a task one of its few attempts, or a site its standing: not twice at one site.
COUNTS_AS_FAILURE = ("kill trainer", "kill agent and trainer", "full disk of agent", "damage update")
KILLS = ("kill coordinator", "kill agent", "kill trainer", "kill agent and trainer", "kill aggregation")
STORM_ROUNDS = 20
OPTIMIZERS: tuple[dict[str, Any], ...] = (
    {"type": "fedavgm", "momentum": 0.5},
    {"type": "fedadam", "learning_rate": 0.01},
    {"type": "fedyogi", "learning_rate": 0.01},
)


@dataclass(frozen=True)
class When:
    """`moment` of `round` (at `site` where the moment is one of a site), and so much of a transfer done by then."""

    round: int
    moment: str
    site: str = ""
    share: float = 0.0
    # So long after that.
    after_seconds: float = 0.0

    def __str__(self) -> str:
        share = f" {self.share:.0%}" if self.share else ""
        after = f" + {self.after_seconds:.1f} s" if self.after_seconds else ""
        return f"round {self.round} {self.moment}{share}{after}" + (f" at {self.site}" if self.site else "")


@dataclass(frozen=True)
class Fault:
    kind: str
    target: str
    when: When
    seconds: float = 0.0
    # What the kind needs besides: seconds of delay, bytes a second, seconds of a clock's step, bytes left on a disk.
    amount: float = 0.0

    def __str__(self) -> str:
        lasting = f" for {self.seconds:.1f} s" if self.seconds else ""
        whom = "" if self.target in self.kind else f" {self.target}"
        return f"{self.kind}{whom}{lasting} ({self.when})"


@dataclass(frozen=True)
class Scenario:
    seed: int
    engine: str
    sites: tuple[str, ...]
    rounds: int
    payload_mb: float
    train_seconds: float
    steps: int
    quorum: int
    deadline_seconds: float
    retries: int
    checkpoint_seconds: float | None
    optimizer: dict[str, Any]
    evaluate: bool
    faults: tuple[Fault, ...]
    # Each round is distilled by the house agent.
    distills: bool = False

    @property
    def whole_cohort(self) -> bool:
        return self.quorum == len(self.sites)

    @property
    def revokes(self) -> bool:
        return any(fault.kind == "revoke site" for fault in self.faults)

    @property
    def patient(self) -> bool:
        """Nobody is done without."""
        return self.whole_cohort and not self.revokes

    @property
    def recipe(self) -> dict[str, Any]:
        """The job, as a recipe's tables."""
        patient = self.patient
        # Without labels it gets all updates of the round, and sees that the aggregate is their mean.
        labels = self.optimizer["type"] != "none"
        distillation = {"distillation": {"labels": labels, "deadline_seconds": 600.0}} if self.distills else {}
        local: dict[str, Any] = {"steps": self.steps}
        if self.checkpoint_seconds is not None:
            local["checkpoint_seconds"] = self.checkpoint_seconds
        return {
            "name": f"chaos-{self.seed}",
            "rounds": self.rounds,
            "seed": self.seed,
            "task": {"type": "synthetic", "payload_mb": self.payload_mb, "train_seconds": self.train_seconds},
            "local": local,
            "cohort": {
                "sites": list(self.sites),
                "quorum": self.quorum,
                "round_deadline_seconds": self.deadline_seconds,
                "stall_limit_seconds": self.deadline_seconds if patient else 4.0,
                "gather_seconds": self.deadline_seconds if patient else 2.0,
                "retries": self.retries,
            },
            "aggregation": {"server_optimizer": self.optimizer},
            "evaluation": {"where": ["sites"] if self.evaluate else [], "deadline_seconds": 5.0},
            **distillation,
        }

    def __str__(self) -> str:
        text = f"{len(self.sites)} sites, {self.rounds} rounds, {self.payload_mb:.1f} MB, quorum {self.quorum}"
        if self.optimizer["type"] != "none":
            text += f", {self.optimizer['type']}"
        return f"{text}, distilled" if self.distills else text


def generate(seed: int, *, engine: str = "sqlite", undisturbed: bool = False) -> Scenario:
    """The scenario of this seed. `undisturbed`: the same job without its faults."""
    draw = random.Random(f"silotune {engine} {seed}")
    sites = tuple(sorted(draw.sample(SITES, draw.choice((2, 3, 3, 4)))))
    rounds = draw.choice((3, 3, 4, 4, 5, 6))
    large = draw.random() < 0.12
    faults = _faults(draw, engine=engine, sites=sites, rounds=rounds)
    revokes = any(fault.kind == "revoke site" for fault in faults)
    whole = draw.random() < (0.3 if revokes else 0.7)
    patient = whole and not revokes
    found = Scenario(
        seed=seed,
        engine=engine,
        sites=sites,
        rounds=rounds,
        payload_mb=12.0 if large else round(draw.uniform(0.3, 2.0), 2),
        train_seconds=round(draw.uniform(0.05, 0.6), 2),
        steps=draw.randint(2, 20),
        quorum=len(sites) if whole else draw.randint(1, len(sites) - 1),
        # Where sites may be left out a round closes when they stall; its deadline is for what should not happen.
        deadline_seconds=600.0 if patient else 15.0 if whole else 40.0,
        retries=0 if whole and revokes else 5,
        checkpoint_seconds=draw.choice((None, None, 0.05, 0.2)),
        optimizer=draw.choice(OPTIMIZERS) if draw.random() < 0.25 else {"type": "none"},
        evaluate=draw.random() < 0.3,
        faults=faults,
        distills=draw.random() < DISTILLED_SHARE,
    )
    if found.distills:
        found = replace(found, faults=faults + _in_distilling(draw, engine=engine, rounds=rounds))
    return replace(found, faults=()) if undisturbed else found


def storm(seed: int, *, engine: str = "sqlite", undisturbed: bool = False) -> Scenario:
    """A long job of a whole cohort; one or two processes are killed in each of its rounds, and nothing else happens."""
    draw = random.Random(f"silotune storm {engine} {seed}")
    sites = SITES[: draw.randint(2, 4)]
    kinds = [BY_NAME[name] for name in KILLS]
    faults: list[Fault] = []
    for number in range(1, STORM_ROUNDS + 1):
        for kind in draw.choices(kinds, [kind.weight for kind in kinds], k=draw.choice((1, 1, 2))):
            site = draw.choice(sites)
            # A site whose trainer dies three times in a row is set aside; a fault may come a round late.
            if kind.name in COUNTS_AS_FAILURE and any(
                fault.kind in COUNTS_AS_FAILURE and fault.target == site and number - fault.when.round < 3
                for fault in faults
            ):
                continue
            fault = _fault(draw, kind, site=site, engine=engine, rounds=STORM_ROUNDS)
            when = replace(fault.when, round=number, after_seconds=round(draw.choice((0.0, draw.uniform(0, 0.6))), 2))
            faults.append(replace(fault, when=when))
    return replace(
        generate(seed, engine=engine, undisturbed=True),
        sites=sites,
        rounds=STORM_ROUNDS,
        quorum=len(sites),
        deadline_seconds=600.0,
        faults=() if undisturbed else tuple(faults),
    )


def _faults(draw: random.Random, *, engine: str, sites: tuple[str, ...], rounds: int) -> tuple[Fault, ...]:
    kinds = [kind for kind in KINDS if engine in kind.engines]
    faults: list[Fault] = []
    for _ in range(draw.randint(1, 5)):
        kind = draw.choices(kinds, [kind.weight for kind in kinds])[0]
        if kind.target == "namespace" and SITE_IN_NAMESPACE not in sites:
            continue
        site = SITE_IN_NAMESPACE if kind.target == "namespace" else draw.choice(sites)
        if kind.name in COUNTS_AS_FAILURE and any(
            fault.kind in COUNTS_AS_FAILURE and fault.target == site for fault in faults
        ):
            continue
        if kind.name == "revoke site" and any(fault.kind == kind.name for fault in faults):
            continue
        faults.append(_fault(draw, kind, site=site, engine=engine, rounds=rounds))
    return tuple(sorted(faults, key=lambda fault: fault.when.round))


def _in_distilling(draw: random.Random, *, engine: str, rounds: int) -> tuple[Fault, ...]:
    faults: list[Fault] = []
    kinds = [BY_NAME[name] for name in IN_DISTILLING]
    for kind in draw.choices(kinds, [kind.weight for kind in kinds], k=draw.choice((1, 2))):
        if kind.name in COUNTS_AS_FAILURE and any(fault.kind in COUNTS_AS_FAILURE for fault in faults):
            continue
        fault = _fault(draw, kind, site=HOUSE, engine=engine, rounds=rounds)
        faults.append(replace(fault, when=When(fault.when.round, "distilling")))
    return tuple(faults)


def _fault(draw: random.Random, kind: Kind, *, site: str, engine: str, rounds: int) -> Fault:
    moment = draw.choice(kind.moments)
    targets = {
        "coordinator": draw.choice(REPLICAS) if engine == "postgres" else COORDINATOR,
        "site": site,
        "namespace": site,
    }
    amounts = {
        "delay": draw.uniform(0.02, 0.3),
        "slow link": draw.uniform(1e5, 1e6),
        "clock of coordinator": draw.choice((-86_400.0, -7_200.0, 7_200.0, 86_400.0)),
        "clock of agent": draw.choice((-7_200.0, 7_200.0)),
        "full disk of coordinator": draw.choice((0.0, 200e3, 900e3)),
        "full disk of agent": draw.choice((0.0, 100e3, 400e3)),
    }
    return Fault(
        kind=kind.name,
        target=targets.get(kind.target, kind.target),
        when=When(
            round=draw.randint(1, rounds),
            moment=moment,
            site=site if moment in AT_SITE else "",
            share=round(draw.uniform(0.05, 0.95), 2) if moment in ("downloading", "uploading") else 0.0,
        ),
        seconds=round(draw.uniform(*kind.seconds), 1),
        amount=amounts.get(kind.name, 0.0),
    )
