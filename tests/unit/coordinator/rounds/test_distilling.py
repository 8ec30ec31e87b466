"""The phase DISTILLING: whose turn it is, until when, and that a round is never lost in it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.rounds import state as s
from coordinator.rounds.machine import step
from tests.unit.coordinator.rounds.conftest import aggregating, job, of, round_, sites, spec

RECIPE = spec(distillation={"deadline_seconds": 60})
AGGREGATE = {"digest": "d" * 64, "size": 8, "optimizer_digest": "o" * 64}
HOUSE = s.SiteFact("hq", house=True, connected=True)


def distil(state: s.TaskState, **changes) -> s.Task:
    task = s.Task("j.1.distill.hq", "j", 1, s.TaskKind.DISTILL, "hq", 0, state=state)
    return replace(task, **({"lease_until": 1e9} if state.live else {}), **changes)


def distilling(*tasks: s.Task, house: s.SiteFact | None = HOUSE, **changes) -> s.Facts:
    """At second 0 the round was aggregated; its distillation has until second 60."""
    facts = aggregating(s.CommandState.DONE, **AGGREGATE)
    there = (*sites("a", "b"), *([house] if house else []))
    return replace(facts, sites=there, round=round_(phase=s.Phase.DISTILLING, deadline_at=60.0), tasks=tasks, **changes)


def test_an_aggregate_goes_to_the_house_agent_before_it_is_committed() -> None:
    facts = replace(aggregating(s.CommandState.DONE, **AGGREGATE), sites=(*sites("a", "b"), HOUSE))
    done = step(job(RECIPE), facts, 5.0)
    assert done.effects == (s.Distill(65.0), s.QueueTask(s.TaskKind.DISTILL, 1, "hq", 0))
    assert done.sentence == "round 1 is aggregated, and hq distils it"


def test_only_every_nth_round_is_distilled() -> None:
    recipe = spec(distillation={"every": 2})
    facts = replace(aggregating(s.CommandState.DONE, **AGGREGATE), sites=(*sites("a", "b"), HOUSE))
    first = step(job(recipe), facts, 5.0)
    assert of(first, s.Commit) and "distilled" not in first.sentence
    second = step(job(recipe, head_version=1), replace(facts, round=round_(2, phase=s.Phase.AGGREGATING)), 5.0)
    assert of(second, s.Distill) and not of(second, s.Commit)


def test_without_a_house_agent_the_aggregate_is_committed_and_the_record_says_why() -> None:
    done = step(job(RECIPE), aggregating(s.CommandState.DONE, **AGGREGATE), 5.0)
    (commit,) = of(done, s.Commit)
    assert (commit.digest, commit.undistilled) == ("d" * 64, "no house agent is enrolled")
    assert done.sentence.endswith("from 2 updates, not distilled: no house agent is enrolled")


def test_a_round_says_what_its_distillation_does_and_until_when_it_is_waited_for() -> None:
    at_it = distil(s.TaskState.RUNNING, stage="TRAINING", done=61, total=100, unit="steps", last_progress_at=10.0)
    done = step(job(RECIPE), distilling(at_it), 15.0)
    assert not done.effects
    assert done.sentence == (
        "round 1 is aggregated and waits for its distillation: hq training 61 % (39 steps left); "
        "committed without it in 45 s, or in 25 s when nothing moves"
    )


def test_what_was_distilled_becomes_the_version_with_the_contributions_and_the_state_of_the_aggregate() -> None:
    made = s.Contribution("hq", "e" * 64, 9, 1.0)
    done = step(job(RECIPE), distilling(distil(s.TaskState.SUCCEEDED), distilled=made), 99.0)
    (commit,) = of(done, s.Commit)
    assert (commit.version, commit.digest, commit.size, commit.undistilled) == (1, "e" * 64, 9, "")
    assert commit.optimizer_digest == "o" * 64 and [part.site for part in commit.contributions] == ["a", "b"]
    assert done.sentence == "round 1 is committed: version 1 from 2 updates, distilled by hq"


def test_a_distillation_that_failed_is_tried_once_more_and_then_done_without() -> None:
    once = distil(s.TaskState.FAILED, failures=1, reason="out of memory")
    assert of(step(job(RECIPE), distilling(once), 1.0), s.QueueTask) == [s.QueueTask(s.TaskKind.DISTILL, 1, "hq", 0)]
    done = step(job(RECIPE), distilling(replace(once, failures=2)), 1.0)
    assert of(done, s.Commit)[0].digest == "d" * 64
    assert done.sentence.endswith("not distilled: hq failed: out of memory")


@pytest.mark.parametrize(
    ("task", "house", "now", "why"),
    [
        (distil(s.TaskState.DECLINED, reason="no such model"), HOUSE, 1.0, "hq declined: no such model"),
        (distil(s.TaskState.RUNNING, last_progress_at=59.0), HOUSE, 60.5, "handed nothing in: the deadline passed"),
        (distil(s.TaskState.RUNNING), HOUSE, 30.5, "handed nothing in: nothing moved for 30 s"),
        (distil(s.TaskState.QUEUED), replace(HOUSE, connected=False), 10.5, "handed nothing in: it is not connected"),
    ],
)
def test_a_round_is_committed_without_a_distillation_that_does_not_come(
    task: s.Task, house: s.SiteFact, now: float, why: str
) -> None:
    facts = distilling(task, house=house)
    done = step(job(RECIPE), facts, now)
    (commit,) = of(done, s.Commit)
    assert commit.digest == "d" * 64 and why in commit.undistilled and why in done.sentence
    ended = [effect.task_id for effect in of(done, s.EndTask)]
    assert ended == ([task.id] if task.state.open else [])
    if task.state.open:
        assert not step(job(RECIPE), facts, now - 1.0).effects, "a moment before it was still waited for"


def test_an_agent_that_was_at_it_and_is_away_is_waited_for_as_long_as_one_that_stands_still() -> None:
    gone = distil(s.TaskState.QUEUED, lease_until=5.0, stage="TRAINING", last_progress_at=4.0)
    facts = distilling(gone, house=replace(HOUSE, connected=False))
    assert "hq is silent: its lease ran out 15 s ago" in step(job(RECIPE), facts, 20.0).sentence
    assert of(step(job(RECIPE), facts, 34.5), s.Commit)


def test_an_agent_that_evaluates_before_it_distils_does_not_stand_still() -> None:
    measures = s.Task("j.0.evaluate.hq.validation", "j", 0, s.TaskKind.EVALUATE, "hq", 0, "validation")
    measures = replace(measures, state=s.TaskState.RUNNING, lease_until=1e9, last_progress_at=20.0)
    facts = distilling(distil(s.TaskState.QUEUED), measures)
    assert not step(job(RECIPE), facts, 49.0).effects
    assert of(step(job(RECIPE), facts, 50.5), s.Commit)


def test_an_agent_that_is_there_and_busy_with_another_job_is_waited_for_until_the_deadline() -> None:
    """Of the other job's task this one knows nothing; its own evaluation waits for the same agent."""
    measures = s.Task("j.0.evaluate.hq.validation", "j", 0, s.TaskKind.EVALUATE, "hq", 0, "validation")
    facts = distilling(distil(s.TaskState.QUEUED), measures)
    done = step(job(RECIPE), facts, 59.0)
    assert not done.effects
    assert done.sentence.endswith("hq has not taken the task yet, offered 59 s ago; committed without it in 1 s")
    (commit,) = of(step(job(RECIPE), facts, 60.5), s.Commit)
    assert commit.undistilled == "hq handed nothing in: the deadline passed"


@pytest.mark.parametrize("state", [s.TaskState.QUEUED, s.TaskState.RUNNING])
def test_an_evaluation_that_stood_still_before_is_not_held_against_the_distillation(state: s.TaskState) -> None:
    """QUEUED: its lease ran out, when the agent died, and the agent has come back."""
    measures = s.Task("j.0.evaluate.hq.validation", "j", 0, s.TaskKind.EVALUATE, "hq", 0, "validation")
    stood = replace(measures, state=state, lease_until=90.0, last_progress_at=1.0)
    facts = distilling(distil(s.TaskState.QUEUED, queued_at=80.0, last_progress_at=80.0), stood)
    facts = replace(facts, round=round_(phase=s.Phase.DISTILLING, deadline_at=140.0))
    assert not step(job(RECIPE), facts, 85.0).effects


def test_a_house_agent_that_is_revoked_does_not_hold_up_the_round() -> None:
    facts = distilling(distil(s.TaskState.RUNNING), house=None)
    (end,) = of(step(job(RECIPE), facts, 1.0), s.EndTask)
    assert end.state is s.TaskState.EXPIRED
    over = distilling(distil(s.TaskState.EXPIRED, reason=end.reason), house=None)
    (commit,) = of(step(job(RECIPE), over, 1.0), s.Commit)
    assert "enrollment was revoked" in commit.undistilled
