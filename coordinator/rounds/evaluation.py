"""Which versions are measured where, which one is best, and when to stop. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from coordinator.rounds.cohort import eligible
from coordinator.rounds.state import Effect, Evaluation, Facts, Job, QueueTask, TaskKind
from protos.jobspec import JobSpec

VALIDATION, TEST = "validation", "test"


def house_agent(facts: Facts) -> str | None:
    """The name of the operator's own agent, the first in name order when there are several."""
    return min((site.name for site in facts.sites if site.house), default=None)


def measure(job: Job, facts: Facts, *, version: int) -> tuple[Effect, ...]:
    """The EVALUATE tasks of a version that was just committed."""
    if not job.spec.is_evaluated(version):
        return ()
    places: list[str] = []
    house = house_agent(facts)
    if "house" in job.spec.evaluation.where and house:
        places.append(house)
    if "sites" in job.spec.evaluation.where:
        # The cohort just trained, so it counts as there: after a restart nobody has been heard of yet.
        cohort = facts.round.cohort if facts.round else ()
        places += [site.name for site in eligible(job, facts) if site.connected or site.name in cohort]
    return tuple(QueueTask(TaskKind.EVALUATE, version, place, version, VALIDATION) for place in places)


def score(spec: JobSpec, evaluations: Sequence[Evaluation], *, version: int, house: str | None) -> float | None:
    """The key metric of a version on validation data; higher is better. None while it is not measured.

    The house agent's where it evaluates this job, so that every version is judged on the same rows; else the mean over
    the sites, weighted by their validation rows.
    """
    found = [
        evaluation
        for evaluation in evaluations
        if (evaluation.version, evaluation.split) == (version, VALIDATION)
        and spec.evaluation.metric in evaluation.metrics
    ]
    if "house" in spec.evaluation.where and house:
        found = [evaluation for evaluation in found if evaluation.site == house]
    rows = sum(evaluation.examples for evaluation in found)
    if not rows:
        return None
    # Exact, so that the order in which a database gives the rows cannot decide which version is best.
    mean = math.fsum(each.metrics[spec.evaluation.metric] * each.examples for each in found) / rows
    return -mean if spec.evaluation.lower_is_better else mean


def _pending(facts: Facts) -> set[int]:
    return {task.version for task in facts.tasks if task.split == VALIDATION and task.state.open}


def unjudged(facts: Facts) -> tuple[int, ...]:
    """Versions that were measured as far as they will be, and not compared with the best one yet."""
    return tuple(sorted(facts.unjudged - _pending(facts)))


def scores(job: Job, facts: Facts) -> dict[int, float]:
    """The score of every version in the facts that has one and is no longer being measured."""
    house = house_agent(facts)
    found: dict[int, float] = {}
    for version in sorted({evaluation.version for evaluation in facts.evaluations} - _pending(facts)):
        value = score(job.spec, facts.evaluations, version=version, house=house)
        if value is not None:
            found[version] = value
    return found


def best_version(job: Job, facts: Facts) -> int | None:
    """The version with the best score, the earliest of equals."""
    found = scores(job, facts)
    return max(found, key=lambda version: (found[version], -version)) if found else None


def should_stop_early(job: Job, facts: Facts) -> bool:
    """Whether the last `early_stop` measured versions all failed to improve on the best before them."""
    patience = job.spec.evaluation.early_stop
    best = best_version(job, facts)
    if not patience or best is None:
        return False
    return sum(version > best for version in scores(job, facts)) >= patience
