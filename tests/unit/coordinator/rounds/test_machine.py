"""Every decision of a job, and its sentence, from facts alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.rounds import state as s
from coordinator.rounds.machine import step
from protos import jobspec
from tests.unit.coordinator.rounds.conftest import aggregating, job, of, round_, sites, spec, train, update


def test_a_submitted_job_begins_with_round_0() -> None:
    done = step(job(state=s.JobState.SUBMITTED, head_version=None), s.Facts(), 5.0)
    assert of(done, s.SetJobState) == [s.SetJobState(s.JobState.RUNNING)]
    assert of(done, s.OpenRound) == [s.OpenRound(0, 1, 105.0)]


@pytest.mark.parametrize("state", [s.JobState.PAUSED, s.JobState.COMPLETED, s.JobState.FAILED, s.JobState.CANCELLED])
def test_a_job_at_rest_decides_nothing_and_says_so(state: s.JobState) -> None:
    done = step(job(state=state), s.Facts(), 5.0)
    assert not done.effects and done.sentence


def test_the_house_agent_makes_version_0_even_when_sites_are_there() -> None:
    facts = s.Facts(sites("a", "b", house="hq"), round_(0, s.Phase.SELECTING, ()))
    assert of(step(job(), facts, 0.0), s.QueueTask) == [s.QueueTask(s.TaskKind.INIT, 0, "hq", 0)]


def test_without_a_house_agent_the_first_drawn_site_makes_version_0() -> None:
    facts = s.Facts(sites("a", "b"), round_(0, s.Phase.SELECTING, ()))
    assert of(step(job(), facts, 0.0), s.QueueTask)[0].site in ("a", "b")


def test_when_the_first_site_cannot_make_version_0_the_next_one_tries() -> None:
    failed = replace(train("a", s.TaskState.DECLINED), kind=s.TaskKind.INIT, round=0, reason="no policy")
    facts = s.Facts(sites("a", "b"), round_(0, s.Phase.SELECTING, ()), tasks=(failed,))
    assert of(step(job(), facts, 0.0), s.QueueTask)[0].site == "b"


def test_when_nobody_can_make_version_0_the_job_fails_with_every_reason() -> None:
    tasks = tuple(
        replace(train(name, s.TaskState.FAILED), kind=s.TaskKind.INIT, round=0, reason=f"no model at {name}")
        for name in "ab"
    )
    done = step(job(), s.Facts(sites("a", "b"), round_(0, s.Phase.SELECTING, ()), tasks=tasks), 0.0)
    assert of(done, s.SetJobState) == [s.SetJobState(s.JobState.FAILED)]
    assert "no model at a" in done.sentence and "no model at b" in done.sentence


def test_a_round_begins_with_all_enrolled_sites_when_all_are_connected() -> None:
    done = step(job(), s.Facts(sites("b", "a", "c", house="hq"), round_(1, s.Phase.SELECTING, ())), 0.0)
    assert of(done, s.SetCohort) == [s.SetCohort(("a", "b", "c"))]
    assert [task.site for task in of(done, s.QueueTask)] == ["a", "b", "c"]


def test_a_round_below_quorum_in_sites_waits_until_its_deadline_and_is_tried_again() -> None:
    facts = s.Facts(sites("a", "b", away=("a",)), round_(1, s.Phase.SELECTING, ()))
    assert "needs 2, gives up in 50 s" in step(job(), facts, 50.0).sentence
    again = step(job(), facts, 101.0)
    assert of(again, s.OpenRound) == [s.OpenRound(1, 2, 201.0)]


def test_a_job_whose_sites_were_set_aside_fails_at_once_with_their_reasons() -> None:
    facts = s.Facts(sites("a", "b"), round_(1, s.Phase.SELECTING, ()), set_aside={"a": "no such column"})
    done = step(job(), facts, 0.0)
    assert of(done, s.SetJobState) == [s.SetJobState(s.JobState.FAILED)]
    assert "set aside: a (no such column)" in done.sentence
    named = spec(cohort={"sites": ["a", "b", "c"], "quorum": 2})
    assert not step(job(named), facts, 0.0).effects, "c may still enroll"


def test_a_round_waits_for_updates_and_names_who_does_what_until_when() -> None:
    tasks = (
        train("a", s.TaskState.SUCCEEDED),
        train("b", s.TaskState.RUNNING, stage="TRAINING", done=61, total=100, last_progress_at=40.0),
        train("c", s.TaskState.QUEUED, last_progress_at=40.0),
    )
    facts = s.Facts(sites("a", "b", "c", away=("c",)), round_(), tasks, (update("a"),))
    done = step(job(), facts, 40.0)
    assert not done.effects
    assert done.sentence == (
        "round 1 waits for 2 of 3 updates: b training 61 %, c is not connected; "
        "ends in 60 s, and needs 1 more for its quorum of 2, then attempt 2 of 3 begins"
    )


def test_a_round_closes_at_once_when_every_site_has_answered() -> None:
    tasks = tuple(train(name, s.TaskState.SUCCEEDED) for name in "abc")
    updates = (update("c", examples=70), update("a", examples=10), update("b", examples=20))
    done = step(job(), s.Facts(sites("a", "b", "c"), round_(), tasks, updates), 1.0)
    (start,) = of(done, s.Aggregate)
    assert [(part.site, part.weight) for part in start.contributions] == [("a", 0.1), ("b", 0.2), ("c", 0.7)]


def test_at_the_deadline_a_round_with_quorum_closes_and_ends_the_late_tasks() -> None:
    tasks = (*(train(name, s.TaskState.SUCCEEDED) for name in "ab"), train("c", s.TaskState.RUNNING))
    facts = s.Facts(sites("a", "b", "c"), round_(), tasks, (update("a"), update("b")))
    assert not step(job(), replace(facts, tasks=(*tasks[:2], replace(tasks[2], last_progress_at=99.0))), 99.0).effects
    done = step(job(), facts, 100.5)
    assert [effect.task_id for effect in of(done, s.EndTask)] == ["j.1.train.c"]
    assert of(done, s.Aggregate) and "without c" in done.sentence


def test_a_stalled_site_no_longer_holds_up_a_round_that_has_its_quorum() -> None:
    tasks = (*(train(name, s.TaskState.SUCCEEDED) for name in "ab"), train("c", s.TaskState.RUNNING))
    facts = s.Facts(sites("a", "b", "c"), round_(), tasks, (update("a"), update("b")))
    assert not step(job(), facts, 29.0).effects
    assert of(step(job(), facts, 31.0), s.Aggregate)


def test_a_round_that_misses_its_quorum_is_tried_again_and_keeps_what_was_accepted() -> None:
    tasks = (train("a", s.TaskState.SUCCEEDED), train("b", s.TaskState.RUNNING), train("c", s.TaskState.RUNNING))
    facts = s.Facts(sites("a", "b", "c"), round_(), tasks, (update("a"),))
    done = step(job(), facts, 101.0)
    assert of(done, s.OpenRound) == [s.OpenRound(1, 2, 201.0)]
    assert "1 of the 2 updates it needs" in done.sentence and "attempt 2 of 3" in done.sentence
    selecting = replace(facts, round=round_(1, s.Phase.SELECTING, (), attempt=2, opened_at=101.0), tasks=(tasks[0],))
    again = step(job(), selecting, 101.0)
    assert of(again, s.SetCohort) == [s.SetCohort(("a", "b", "c"))]
    assert [task.site for task in of(again, s.QueueTask)] == ["b", "c"]


def test_a_round_without_attempts_left_fails_the_job_with_its_reason() -> None:
    tasks = (train("a", s.TaskState.SUCCEEDED), train("b", s.TaskState.FAILED, failures=2, reason="out of memory"))
    facts = s.Facts(sites("a", "b"), round_(cohort=("a", "b"), attempt=3), tasks, (update("a"),))
    done = step(job(), facts, 5.0)
    assert of(done, s.SetJobState) == [s.SetJobState(s.JobState.FAILED)]
    assert "b failed: out of memory" in done.sentence


def test_a_site_that_failed_once_gets_the_task_once_more_and_no_oftener() -> None:
    facts = s.Facts(
        sites("a", "b", "c"),
        round_(),
        (train("a", s.TaskState.FAILED, failures=1), train("b", s.TaskState.RUNNING), train("c", s.TaskState.RUNNING)),
    )
    assert of(step(job(), facts, 1.0), s.QueueTask)[0].site == "a"
    twice = replace(facts, tasks=(train("a", s.TaskState.FAILED, failures=2), *facts.tasks[1:]))
    assert not step(job(), twice, 1.0).effects


def test_a_lease_that_runs_out_puts_the_task_back() -> None:
    tasks = (train("a", s.TaskState.RUNNING, lease_until=9.0), train("b", s.TaskState.RUNNING))
    done = step(job(), s.Facts(sites("a", "b"), round_(cohort=("a", "b")), tasks), 9.5)
    assert [task.site for task in of(done, s.QueueTask)] == ["a"]
    assert "a was not heard of in time" in done.sentence


def test_a_finished_aggregate_is_committed_with_its_contributors() -> None:
    done = step(job(), aggregating(s.CommandState.DONE, digest="d" * 64, size=8), 5.0)
    (commit,) = of(done, s.Commit)
    assert (commit.version, commit.digest) == (1, "d" * 64)
    assert [part.site for part in commit.contributions] == ["a", "b"]


def test_an_aggregate_that_failed_is_tried_again_after_a_pause() -> None:
    facts = aggregating(s.CommandState.FAILED, error="No space left on device")
    assert "No space left" in step(job(), facts, 5.0).sentence and not step(job(), facts, 5.0).effects
    assert of(step(job(), facts, 11.0), s.Aggregate)[0].generation == 2


def test_an_aggregate_that_cannot_be_made_is_given_up_with_its_reason() -> None:
    facts = aggregating(s.CommandState.FAILED, error="No space left on device", queued_at=195.0)
    assert "given up in" in step(job(), facts, 196.0).sentence
    done = step(job(), facts, 201.0)
    assert of(done, s.SetJobState) == [s.SetJobState(s.JobState.FAILED)] and "No space left" in done.sentence


def test_a_round_begins_when_its_updates_fit_on_the_disk() -> None:
    room = s.Facts(sites("a", "b"), round_(1, s.Phase.SELECTING, ()), model_bytes=10**9, spare_bytes=4 * 10**9)
    waiting = step(job(), room, 1.0)
    assert not waiting.effects and "needs 5,000 MB and has 4,000 MB" in waiting.sentence
    assert of(step(job(), replace(room, spare_bytes=6 * 10**9), 1.0), s.SetCohort)


def test_a_damaged_update_is_rejected_and_the_round_goes_on_down_to_its_quorum() -> None:
    facts = aggregating(s.CommandState.FAILED, error="damaged", corrupt_site="b")
    one_is_enough = spec(cohort={"quorum": 1})
    done = step(job(one_is_enough), facts, 1.0)
    assert of(done, s.RejectUpdate)[0].site == "b"
    assert [part.site for part in of(done, s.Aggregate)[0].contributions] == ["a"]
    assert of(step(job(), facts, 1.0), s.OpenRound)[0].attempt == 2


def measured(recipe: jobspec.JobSpec, *values: float) -> s.Facts:
    evaluations = tuple(
        s.Evaluation(version, "hq", "validation", 100, {"accuracy": value}) for version, value in enumerate(values)
    )
    last = round_(len(values) - 1, s.Phase.COMMITTED)
    return s.Facts(sites("a", "b", house="hq"), last, evaluations=evaluations)


def test_the_best_version_is_the_earliest_of_equals_on_validation_data() -> None:
    recipe = spec(evaluation={"where": ["house"]})
    done = step(job(recipe), measured(recipe, 0.2, 0.9, 0.9, 0.5), 1.0)
    assert of(done, s.SetBest) == [s.SetBest(1)]


def test_loss_is_better_when_it_is_lower() -> None:
    recipe = spec(evaluation={"where": ["house"], "metric": "loss"})
    evaluations = tuple(
        s.Evaluation(version, "hq", "validation", 100, {"loss": value}) for version, value in enumerate([3.0, 1.0, 2.0])
    )
    facts = s.Facts(sites("a", house="hq"), round_(2, s.Phase.COMMITTED), evaluations=evaluations)
    assert of(step(job(recipe), facts, 1.0), s.SetBest) == [s.SetBest(1)]


def test_test_data_never_selects_a_version() -> None:
    recipe = spec(evaluation={"where": ["house"], "test": True})
    facts = measured(recipe, 0.2, 0.9)
    cheat = s.Evaluation(0, "hq", "test", 100, {"accuracy": 1.0})
    done = step(job(recipe), replace(facts, evaluations=(*facts.evaluations, cheat)), 1.0)
    assert of(done, s.SetBest) == [s.SetBest(1)]


def test_training_stops_early_when_the_metric_no_longer_improves() -> None:
    recipe = spec(rounds=50, evaluation={"where": ["house"], "early_stop": 2})
    still = step(job(recipe, best_version=1), measured(recipe, 0.2, 0.9, 0.8), 1.0)
    assert of(still, s.OpenRound)
    stop = step(job(recipe, best_version=1), measured(recipe, 0.2, 0.9, 0.8, 0.85), 1.0)
    assert of(stop, s.SetJobState) == [s.SetJobState(s.JobState.COMPLETED)]
    assert "accuracy no longer improved" in stop.sentence


def test_the_last_round_waits_for_evaluations_then_tests_the_best_version_once_then_completes() -> None:
    recipe = spec(rounds=1, evaluation={"where": ["house"], "test": True})
    pending = s.Task("j.1.evaluate.hq.validation", "j", 1, s.TaskKind.EVALUATE, "hq", 1, split="validation")
    facts = replace(measured(recipe, 0.2), round=round_(1, s.Phase.COMMITTED), tasks=(pending,))
    assert "waits for 1 evaluations" in step(job(recipe, best_version=0), facts, 1.0).sentence
    over = replace(measured(recipe, 0.2, 0.7), round=round_(1, s.Phase.COMMITTED))
    test = step(job(recipe, best_version=1), over, 1.0)
    assert of(test, s.QueueTask) == [s.QueueTask(s.TaskKind.EVALUATE, 1, "hq", 1, "test")]
    done_task = replace(pending, split="test", state=s.TaskState.SUCCEEDED)
    end = step(job(recipe, best_version=1), replace(over, tasks=(done_task,)), 1.0)
    assert of(end, s.SetJobState) == [s.SetJobState(s.JobState.COMPLETED)]


def test_an_evaluation_past_its_time_is_given_up_and_recorded() -> None:
    recipe = spec(rounds=1, evaluation={"where": ["house"], "deadline_seconds": 60})
    pending = s.Task("e", "j", 1, s.TaskKind.EVALUATE, "hq", 1, split="validation")
    facts = s.Facts(sites("a", house="hq"), round_(1, s.Phase.COMMITTED), tasks=(pending,))
    done = step(job(recipe), facts, 61.0)
    assert of(done, s.EndTask)[0].state is s.TaskState.EXPIRED
    assert "not evaluated within 60 s" in done.sentence


def test_a_commit_is_measured_at_the_places_that_the_recipe_names() -> None:
    both = spec(evaluation={"where": ["sites", "house"]})
    facts = replace(
        aggregating(s.CommandState.DONE, digest="d" * 64), sites=sites("a", "b", "c", "d", away=("a", "d"), house="hq")
    )
    facts = replace(facts, round=round_(phase=s.Phase.AGGREGATING, cohort=("a", "b")))
    tasks = of(step(job(both), facts, 1.0), s.QueueTask)
    # "a" trained, so it is there, whatever the coordinator has heard since its restart; "d" is away.
    assert {(task.site, task.split) for task in tasks} == {(name, "validation") for name in ("hq", "a", "b", "c")}
    rarely = spec(evaluation={"where": ["house"], "every": 2})
    assert not of(step(job(rarely), facts, 1.0), s.QueueTask)


def test_work_of_a_revoked_site_ends_at_once_and_the_round_closes_without_it() -> None:
    tasks = (train("a", s.TaskState.SUCCEEDED), train("b", s.TaskState.SUCCEEDED), train("c", s.TaskState.RUNNING))
    facts = s.Facts(sites("a", "b"), round_(), tasks, updates=(update("a"), update("b")))
    done = step(job(), facts, 1.0)
    assert of(done, s.EndTask) == [s.EndTask("j.1.train.c", s.TaskState.EXPIRED, "the site's enrollment was revoked")]
    ended = replace(tasks[2], state=s.TaskState.EXPIRED)
    assert of(step(job(), replace(facts, tasks=(*tasks[:2], ended)), 1.0), s.Aggregate)


def test_a_job_that_failed_says_which_commands_go_on_with_it() -> None:
    tasks = (train("a", s.TaskState.SUCCEEDED), train("b", s.TaskState.FAILED, failures=2, reason="out of memory"))
    facts = s.Facts(sites("a", "b"), round_(cohort=("a", "b"), attempt=3), tasks, (update("a"),))
    sentence = step(job(), facts, 5.0).sentence
    assert "`silotune job resume j` tries round 1 again and keeps the update that has come" in sentence
    assert "`silotune job readmit j` first lets the sites that were set aside take part again" in sentence


def test_a_failed_round_begins_again_with_all_its_attempts_when_its_job_is_resumed() -> None:
    done = step(job(), s.Facts(sites("a", "b"), round_(2, s.Phase.FAILED, attempt=3)), 500.0)
    assert of(done, s.OpenRound) == [s.OpenRound(2, 1, 600.0)]


def test_a_round_without_room_on_the_disk_ends_at_its_deadline() -> None:
    room = s.Facts(sites("a", "b"), round_(1, s.Phase.SELECTING, ()), model_bytes=10**9, spare_bytes=4 * 10**9)
    done = step(job(), room, 101.0)
    assert of(done, s.OpenRound)[0].attempt == 2 and "needs 5,000 MB and has 4,000 MB" in done.sentence


def test_a_silent_site_does_not_keep_version_0_from_being_made_by_another() -> None:
    silent = replace(train("a", s.TaskState.QUEUED, last_progress_at=1.0), kind=s.TaskKind.INIT, round=0)
    facts = s.Facts(sites("a", "b", away=("a",)), round_(0, cohort=("a",)), tasks=(silent,))
    assert not step(job(), facts, 30.0).effects
    done = step(job(), facts, 32.0)
    assert of(done, s.EndTask)[0].state is s.TaskState.EXPIRED and of(done, s.OpenRound)[0].attempt == 2
    alone = replace(facts, sites=sites("a", away=("a",)))
    assert not step(job(), alone, 99.0).effects, "nobody else could make it"


def test_a_site_that_was_readmitted_in_mid_round_gets_its_task_again() -> None:
    tasks = (train("a", s.TaskState.DECLINED, reason="not at night"), train("b", s.TaskState.RUNNING))
    facts = s.Facts(sites("a", "b"), round_(cohort=("a", "b")), tasks)
    assert [task.site for task in of(step(job(), facts, 1.0), s.QueueTask)] == ["a"]
    assert not step(job(), replace(facts, set_aside={"a": "not at night"}), 1.0).effects


def test_damage_again_and_again_ends_with_the_attempts_of_the_round() -> None:
    facts = aggregating(s.CommandState.FAILED, error="damaged", corrupt_site="b")
    assert facts.round is not None
    done = step(job(), replace(facts, round=replace(facts.round, attempt=3)), 1.0)
    assert of(done, s.RejectUpdate) and of(done, s.SetJobState) == [s.SetJobState(s.JobState.FAILED)]


def test_each_measured_version_is_compared_once() -> None:
    recipe = spec(evaluation={"where": ["house"]})
    facts = replace(measured(recipe, 0.2, 0.9, 0.8), unjudged=frozenset({0, 1, 2}))
    better = step(job(recipe), facts, 1.0)
    assert of(better, s.SetBest) == [s.SetBest(1)] and of(better, s.Judged) == [s.Judged((0, 1, 2))]
    worse = step(job(recipe, best_version=1), replace(facts, unjudged=frozenset({2})), 1.0)
    assert worse.sentence == "version 2 is no better than version 1 by accuracy"
    assert not of(worse, s.SetBest) and of(worse, s.Judged) == [s.Judged((2,))]
    pending = s.Task("e", "j", 2, s.TaskKind.EVALUATE, "hq", 2, split="validation")
    waits = replace(facts, unjudged=frozenset({2}), tasks=(pending,))
    assert not of(step(job(recipe, best_version=1), waits, 1.0), s.Judged)
