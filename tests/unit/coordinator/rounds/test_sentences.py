"""For every state in which a job can wait: who, at which stage, how much is left, until when, and what happens then."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.rounds import state as s
from coordinator.rounds.machine import step
from coordinator.rounds.sentences import duration, status
from tests.unit.coordinator.rounds.conftest import aggregating, job, round_, sites, spec, train, update

RUNNING, QUEUED = s.TaskState.RUNNING, s.TaskState.QUEUED


def why(facts: s.Facts, now: float, recipe=None, **changes) -> str:
    done = step(job(recipe, **changes), facts, now)
    assert not done.effects, done.sentence
    return done.sentence


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0 s"), (0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (11_100, "3 h 05 min")],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# --- what one site is doing


@pytest.mark.parametrize(
    ("task", "text"),
    [
        (train("a", QUEUED, queued_at=28.0), "a has not taken the task yet, offered 12 s ago"),
        (
            train("a", QUEUED, queued_at=39.0, failures=1, reason="out of memory"),
            "a has not taken its second try after it failed (out of memory) yet, offered 1 s ago",
        ),
        (train("a", s.TaskState.LEASED, last_progress_at=39.0), "a has the task and is about to begin"),
        (
            train("a", RUNNING, stage="APPROVING", last_progress_at=10.0),
            "a waits for its administrator to approve the job (`silotune-agent approvals` there) for 30 s",
        ),
        (
            train("a", RUNNING, stage="FETCHING", done=1_000_000, total=4_000_000, unit="bytes", last_progress_at=39.0),
            "a fetching 25 % (3.0 MB left)",
        ),
        (train("a", RUNNING, stage="LOADING", last_progress_at=39.0), "a loading the model"),
        (
            train("a", RUNNING, stage="TRAINING", done=61, total=100, unit="steps", last_progress_at=39.0),
            "a training 61 % (39 steps left)",
        ),
        (
            train("a", RUNNING, stage="TRAINING", done=61, total=100, unit="steps", last_progress_at=0.0),
            "a training 61 % (39 steps left), no progress for 40 s",
        ),
        (
            train("a", RUNNING, stage="UPLOADING", done=9, total=90_000_000, unit="bytes", last_progress_at=39.0),
            "a uploading 0 % (90.0 MB left)",
        ),
        (
            train("a", RUNNING, stage="PAUSED", last_progress_at=0.0),
            "a is paused by its administrator or outside its hours for 40 s",
        ),
        (
            train("a", RUNNING, stage="WAITING_FOR_DISK", done=9, total=9, unit="steps", last_progress_at=0.0),
            "a waits for room on its disk for 40 s",
        ),
    ],
)
def test_a_site_at_work_says_its_stage_and_what_is_left(task: s.Task, text: str) -> None:
    assert status(task, now=40.0) == text


def test_a_silent_site_is_told_from_one_that_was_never_there_and_from_one_that_only_its_work_is_not_heard_of() -> None:
    lost = train("a", QUEUED, lease_until=30.0, stage="TRAINING", done=1, total=4, unit="steps")
    was = "its lease ran out 40 s ago, was training 25 % (3 steps left)"
    assert status(lost, now=70.0, connected=False) == f"a is silent: {was}"
    assert status(lost, now=70.0) == f"a is connected but silent about its task: {was}"
    assert status(train("a", QUEUED), now=70.0, connected=False) == "a is not connected"
    live = train("a", RUNNING, stage="TRAINING", done=1, total=4, last_progress_at=60.0)
    assert status(live, now=70.0, connected=False) == "a training 25 %, not connected now"


# --- what a round waits for


def test_below_its_quorum_a_round_says_whether_it_can_still_reach_it_and_what_comes_then() -> None:
    tasks = (
        train("a", RUNNING, stage="TRAINING", last_progress_at=39.0),
        train("b", s.TaskState.FAILED, failures=2, reason="out of memory"),
        train("c", s.TaskState.EXPIRED, reason="the site's enrollment was revoked"),
    )
    facts = s.Facts(sites("a", "b", "c"), round_(attempt=3), tasks)
    assert why(facts, 40.0) == (
        "round 1 waits for 1 of 3 updates: a training; without b failed: out of memory; "
        "c expired: the site's enrollment was revoked; ends in 60 s, and needs 2 more for its quorum of 2, "
        "which this attempt cannot reach any more, then the job fails, because no attempts are left"
    )


def test_with_its_quorum_a_round_says_when_it_closes_and_when_it_does_so_sooner() -> None:
    done = (train("a", s.TaskState.SUCCEEDED), train("b", s.TaskState.SUCCEEDED))
    paused = train("c", RUNNING, stage="PAUSED", last_progress_at=20.0)
    facts = s.Facts(sites("a", "b", "c"), round_(), (*done, paused), (update("a"), update("b")))
    assert why(facts, 45.0) == (
        "round 1 waits for 1 of 3 updates: c is paused by its administrator or outside its hours; "
        "closes without them in 55 s, or in 5 s when nothing moves"
    )
    moving = replace(facts, tasks=(*done, replace(paused, stage="TRAINING", last_progress_at=95.0)))
    assert why(moving, 96.0).endswith("c training; closes without them in 4 s")


def test_a_round_that_gathers_says_who_is_missing_and_when_it_begins_or_ends() -> None:
    facts = s.Facts(sites("a", "b", "c", away=("c",)), round_(1, s.Phase.SELECTING, ()))
    there = "round 1 waits for sites to connect: 2 of 3 are there, missing c"
    assert why(facts, 3.0) == f"{there}; begins without them in 7 s"
    few = replace(facts, sites=sites("a", "b", away=("a",)))
    assert why(few, 50.0) == (
        "round 1 waits for sites to connect: 1 of 2 are there, missing a; needs 2, gives up in 50 s, "
        "then attempt 2 of 3 begins"
    )
    assert "no site is enrolled yet, `silotune site invite NAME`" in why(replace(facts, sites=()), 3.0)


def test_a_site_that_is_set_aside_has_its_reason_and_the_command_that_readmits_it() -> None:
    facts = s.Facts(
        sites("a", "b", "c", away=("a",)), round_(1, s.Phase.SELECTING, ()), set_aside={"c": "no column 'text'"}
    )
    assert "set aside: c (no column 'text'); `silotune job readmit j` lets them take part again" in why(facts, 50.0)
    begun = step(job(), replace(facts, sites=sites("a", "b", "c")), 0.0)
    assert begun.sentence == "round 1 begins with a, b; set aside: c (no column 'text')"


def test_a_full_disk_is_said_with_what_is_needed_and_until_when() -> None:
    facts = s.Facts(sites("a", "b"), round_(1, s.Phase.SELECTING, ()), model_bytes=10**9, spare_bytes=4 * 10**9)
    assert why(facts, 40.0) == (
        "round 1 waits for room on the coordinator's disk: it needs 5,000 MB and has 4,000 MB above the reserve; "
        "the operator can make room within 60 s, then attempt 2 of 3 begins"
    )


# --- version 0


def test_version_0_names_who_makes_it_and_who_would_be_next() -> None:
    nobody = s.Facts((), round_(0, s.Phase.SELECTING, ()))
    assert why(nobody, 40.0) == (
        "version 0 waits for a house agent or a site to enroll; given up in 60 s, then the job fails"
    )
    house_away = replace(sites(house="hq")[0], connected=False)
    waiting = replace(nobody, sites=(*sites("a"), house_away))
    assert why(waiting, 3.0) == "version 0 waits for hq to connect; a makes it instead in 7 s"
    making = replace(train("hq", RUNNING, stage="LOADING", last_progress_at=39.0), kind=s.TaskKind.INIT, round=0)
    facts = s.Facts(sites("a", house="hq"), round_(0, cohort=("hq",)), tasks=(making,))
    assert why(facts, 40.0) == "version 0 is being made: hq loading the model; given up in 60 s, then a tries"
    alone = replace(facts, sites=sites(house="hq"))
    assert why(alone, 40.0).endswith("given up in 60 s, then the job fails")


# --- aggregating, evaluating, at rest


def test_an_aggregation_says_since_when_of_how_many_and_what_went_wrong_before() -> None:
    busy = aggregating(s.CommandState.QUEUED, queued_at=30.0)
    assert why(busy, 42.0) == (
        "round 1: the coordinator aggregates 2 updates, begun 12 s ago; given up in 3 min, then the job fails"
    )
    again = aggregating(s.CommandState.QUEUED, queued_at=30.0, error="No space left on device")
    assert "begun 12 s ago, again after: No space left on device;" in why(again, 42.0)
    failed = aggregating(s.CommandState.FAILED, error="No space left on device")
    assert why(failed, 4.0) == (
        "round 1: the coordinator could not aggregate 2 updates: No space left on device; tries again in 6 s; "
        "given up in 3 min, then the job fails"
    )


@pytest.mark.parametrize(
    ("rule", "metrics", "said"),
    [
        ({"type": "krum"}, {"a": 0.0, "b": 1.0, "c": 0.0}, "; krum counts b alone"),
        ({"type": "multi-krum"}, {"a": 0.5, "b": 0.0, "c": 0.5}, "; multi-krum leaves out b"),
        ({"type": "norm-bound"}, {"a": 0.25, "b": 0.025, "c": 0.25}, "; norm-bound counts b at 10%"),
        ({"type": "norm-bound"}, {"a": 0.25, "b": 0.2, "c": 0.25}, ""),
        ({"type": "median"}, {}, ""),
    ],
)
def test_what_a_robust_rule_did_to_a_site_is_said_when_the_round_is_committed(
    rule: dict[str, str], metrics: dict[str, float], said: str
) -> None:
    recipe = spec(cohort={"quorum": 5}, aggregation={"robust": rule})
    shares = tuple(
        s.Contribution(name, name * 64, 8, weight) for name, weight in zip("abc", (0.25, 0.25, 0.5), strict=True)
    )
    measured = {f"update_coefficient.{site}": value for site, value in metrics.items()}
    done = aggregating(s.CommandState.DONE, contributions=shares, metrics=measured)
    assert step(job(recipe), done, 1.0).sentence == f"round 1 is committed: version 1 from 3 updates{said}"


def test_an_update_unlike_the_others_is_named_also_where_it_counts() -> None:
    measured = {"update_cosine.a": -0.9, "update_cosine.b": 0.4, "update_norm_z.a": 0.1, "update_norm_z.b": -8.04}
    done = step(job(), aggregating(s.CommandState.DONE, metrics=measured), 1.0)
    assert done.sentence.endswith(
        "from 2 updates; against the mean of the others: a; of unusual length, in deviations: b (-8.0)"
    )


def test_the_last_evaluations_are_named_with_what_they_measure() -> None:
    recipe = spec(rounds=1, evaluation={"where": ["sites"], "deadline_seconds": 60})
    tasks = (
        s.Task("e", "j", 1, s.TaskKind.EVALUATE, "a", 1, split="validation", state=RUNNING, lease_until=99.0,
               stage="EVALUATING", done=50, total=200, unit="rows", last_progress_at=39.0),
        s.Task("t", "j", 1, s.TaskKind.EVALUATE, "hq", 1, split="test", queued_at=30.0),
    )  # fmt: skip
    facts = s.Facts(sites("a", house="hq"), round_(1, s.Phase.COMMITTED), tasks=tasks)
    assert why(facts, 40.0, recipe) == (
        "all rounds are committed; waits for 2 evaluations: "
        "a evaluating 25 % (150 rows left) (validation of version 1), "
        "hq has not taken the task yet, offered 10 s ago (test of version 1); the job ends without them in 50 s"
    )


def test_a_paused_job_says_what_resumes_it() -> None:
    assert why(s.Facts(), 1.0, state=s.JobState.PAUSED) == (
        "paused by the operator: no deadline runs, and `silotune job resume j` goes on where it stopped"
    )
