"""What many runs came to: one table for people, one JSON for machines."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.checker import DIGEST, LOST, RULES, TWICE
from tests.chaos.runner import Outcome


@dataclass
class Report:
    engine: str
    seeds: list[int] = field(default_factory=list)
    failing_seeds: list[int] = field(default_factory=list)
    injected: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    # Processes that ended by themselves on a full disk.
    excused: Counter[str] = field(default_factory=Counter)
    # Their moment did not come before the job ended.
    not_reached: int = 0
    jobs: Counter[str] = field(default_factory=Counter)
    rounds_committed: int = 0
    updates: Counter[str] = field(default_factory=Counter)
    # How often a site began its training of a round -> in how many cases.
    trainings: Counter[int] = field(default_factory=Counter)
    violations: Counter[str] = field(default_factory=Counter)
    longest_recovery_seconds: float = 0.0
    seconds: float = 0.0

    def add(self, outcome: Outcome) -> None:
        evidence = outcome.evidence
        self.seeds.append(outcome.scenario.seed)
        if outcome.violations:
            self.failing_seeds.append(outcome.scenario.seed)
        self.injected += outcome.injected
        self.skipped += outcome.skipped
        self.excused += outcome.excused
        self.not_reached += outcome.missed.total()
        self.jobs[evidence.state] += 1
        self.rounds_committed += sum(version.number > 0 for version in evidence.versions)
        self.updates.update(update.fate.lower() for update in evidence.updates)
        # A grant of work that had been granted before.
        self.updates["retried"] += sum(max(0, task.generation - 1) for task in evidence.tasks if task.kind == "TRAIN")
        begun = Counter((fact["round"], fact.actor) for fact in evidence.of_agents("begun") if not fact["resumed_step"])
        self.trainings.update(begun.values())
        self.violations.update(violation.rule for violation in outcome.violations)
        self.longest_recovery_seconds = max(self.longest_recovery_seconds, outcome.recovery_seconds)
        self.seconds += outcome.seconds

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "seeds": len(self.seeds),
            "first_seed": min(self.seeds, default=None),
            "last_seed": max(self.seeds, default=None),
            "failing_seeds": self.failing_seeds,
            "faults_injected": dict(self.injected.most_common()),
            "faults_injected_total": self.injected.total(),
            "faults_skipped": dict(self.skipped.most_common()),
            "faults_not_reached": self.not_reached,
            "ends_excused": dict(self.excused),
            "ends_excused_total": self.excused.total(),
            "jobs": dict(self.jobs),
            "rounds_committed": self.rounds_committed,
            "updates_accepted": self.updates["accepted"],
            "updates_retried": self.updates["retried"],
            "updates_discarded": self.updates["discarded"],
            "updates_rejected": self.updates["rejected"],
            "trainings_begun": {f"{times} times": count for times, count in sorted(self.trainings.items())},
            "lost": self.violations[LOST],
            "counted_twice": self.violations[TWICE],
            "digest_differences": self.violations[DIGEST],
            "other_violations": {rule: self.violations[rule] for rule in RULES[3:] if self.violations[rule]},
            "longest_recovery_seconds": round(self.longest_recovery_seconds, 1),
            "seconds": round(self.seconds, 1),
        }

    def __str__(self) -> str:
        facts = self.facts
        lines = [f"{self.engine}: {facts['seeds']} seeds in {self.seconds:.0f} s", "", "  faults injected"]
        lines += [f"    {name:<38}{count:>7}" for name, count in sorted(self.injected.items())]
        lines += [f"    {'all':<38}{self.injected.total():>7}"]
        lines += [f"    {'their moment did not come':<38}{self.not_reached:>7}"]
        lines += [f"    {'processes that ended on a full disk':<38}{self.excused.total():>7}"]
        lines += ["  SKIPPED, because this machine cannot do them"] if self.skipped else []
        lines += [f"    {why:<70}{count:>7}" for why, count in sorted(self.skipped.items())]
        lines += ["", "  " + ", ".join(f"{count} jobs {state}" for state, count in sorted(self.jobs.items()))]
        shown = ("rounds_committed", "updates_accepted", "updates_retried", "updates_discarded", "updates_rejected")
        lines += [f"  {name.replace('_', ' '):<40}{facts[name]:>7}" for name in shown]
        begun = ", ".join(f"{count} {times} x" for times, count in sorted(self.trainings.items()))
        lines += [f"  trainings of a site in a round, begun {begun}"]
        lines += [f"  {'longest recovery of a coordinator':<40}{facts['longest_recovery_seconds']:>7} s", ""]
        lines += [f"  {name.replace('_', ' '):<40}{facts[name]:>7}" for name in ("lost", "counted_twice")]
        lines += [f"  {'digest differences':<40}{facts['digest_differences']:>7}"]
        lines += [f"  {name:<40}{count:>7}" for name, count in facts["other_violations"].items()]
        if self.failing_seeds:
            lines += ["", f"  FAILED: seeds {', '.join(map(str, self.failing_seeds))}"]
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.facts, indent=2) + "\n")
