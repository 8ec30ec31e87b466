"""The judge judged: a sound run passes, and for each promise a history that breaks it is found out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.chaos import checker
from tests.chaos.checker import BACK, DIGEST, HANGING, LOST, REPEATED, TWICE, check
from tests.chaos.evidence import Evidence, Injected, Part, Round, Task, Update, Version
from tests.chaos.history import Fact
from tests.chaos.recompute import Made, recompute
from tests.chaos.scenario import HOUSE, Fault, When, generate

SITES = ("alfa", "bravo")
CALM = replace(
    generate(1, undisturbed=True),
    sites=SITES,
    rounds=2,
    payload_mb=0.01,
    quorum=2,
    optimizer={"type": "none"},
    evaluate=False,
    distills=False,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Made]:
    scratch = tmp_path_factory.mktemp("recompute")
    return recompute(CALM.recipe, versions(weights={}), scratch=scratch)


def versions(*, weights: dict[str, float], made: dict[int, Made] | None = None) -> tuple[Version, ...]:
    """What a sound coordinator would have committed; without `made` only who contributed."""
    seeded = weights or dict.fromkeys(SITES, 0.5)
    found = []
    for number in range(CALM.rounds + 1):
        digest = made[number].digest if made else ""
        parts = () if number == 0 else tuple(
            Part(site, made[number].updates[site] if made else "", seeded[site]) for site in SITES
        )  # fmt: skip
        found.append(Version(number, digest, parts, stored_digest=digest))
    return tuple(found)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Evidence, dict[int, Made]]:
    """A run in which nothing went wrong, with the weights that its examples give."""
    scratch = tmp_path_factory.mktemp("sound")
    first = recompute(CALM.recipe, versions(weights={}), scratch=scratch)
    examples = {number: one.examples for number, one in first.items()}
    weighted = tuple(
        replace(
            version,
            parts=tuple(
                replace(part, weight=examples[version.number][part.site] / sum(examples[version.number].values()))
                for part in version.parts
            ),
        )
        for version in versions(weights={})
    )
    right = recompute(CALM.recipe, weighted, scratch=scratch)
    committed = tuple(
        replace(
            version,
            digest=right[version.number].digest,
            stored_digest=right[version.number].digest,
            parts=tuple(replace(part, digest=right[version.number].updates[part.site]) for part in version.parts),
        )
        for version in weighted
    )
    facts = [Fact("operator", "submit", about={"job": "job"})]
    updates = []
    for version in committed[1:]:
        for part in version.parts:
            about = {"job": "job", "task": "train", "round": version.number, "digest": part.digest}
            facts += [
                Fact(part.site, "begun", about={**about, "resumed_step": 0}),
                Fact(part.site, "sealed", about=about),
                Fact(part.site, "acknowledged", about={**about, "fate": "accepted"}),
            ]
            updates.append(Update(version.number, part.site, "ACCEPTED", part.digest))
        facts.append(shown(version.number))
    evidence = Evidence(
        scenario=CALM,
        job="job",
        state="COMPLETED",
        head=CALM.rounds,
        rounds=tuple(Round(number, 1, "COMMITTED") for number in range(CALM.rounds + 1)),
        tasks=(Task(1, "TRAIN", "alfa", "SUCCEEDED", 1),),
        updates=tuple(updates),
        versions=committed,
        facts=tuple(facts),
    )
    return evidence, right


def shown(head: int | None, *, state: str = "RUNNING", round_number: int = 1) -> Fact:
    return Fact("operator", "shown", about={"job": "job", "head": head, "round": round_number, "state": state})


def rules(evidence: Evidence, made: dict[int, Made]) -> set[str]:
    return {violation.rule for violation in check(evidence, made)}


Sound = tuple[Evidence, dict[int, Made]]


def test_a_sound_run_breaks_no_promise(sound: Sound) -> None:
    assert check(*sound) == []


def test_an_acknowledged_update_that_is_not_in_the_store_is_lost(sound: Sound) -> None:
    evidence, made = sound
    assert LOST in rules(replace(evidence, updates=evidence.updates[1:]), made)


def test_an_acknowledged_update_that_is_stored_with_other_bytes_is_lost(sound: Sound) -> None:
    evidence, made = sound
    other = (replace(evidence.updates[0], digest="0" * 64), *evidence.updates[1:])
    assert LOST in rules(replace(evidence, updates=other), made)


def test_an_acknowledged_update_may_be_rejected_only_where_a_fault_damaged_it(sound: Sound) -> None:
    evidence, _ = sound
    first = evidence.updates[0]
    rejected = replace(
        evidence,
        updates=(replace(first, fate="REJECTED"), *evidence.updates[1:]),
        versions=evidence.versions[:1],
        head=0,
    )
    assert [violation.rule for violation in checker.acknowledged_is_stored(rejected)] == [LOST]
    damage = Injected(Fault("damage update", first.site, When(1, "accepted", first.site)), 0.0, round=1)
    assert not list(checker.acknowledged_is_stored(replace(rejected, injected=(damage,))))
    in_another_round = replace(damage, round=2)
    assert list(checker.acknowledged_is_stored(replace(rejected, injected=(in_another_round,))))


def test_a_round_that_everyone_is_waited_for_is_distilled_or_that_is_found(sound: Sound) -> None:
    evidence, made = sound
    without = (*evidence.rounds[:-1], replace(evidence.rounds[-1], undistilled="hq failed: a defect"))
    distilling = replace(evidence, scenario=replace(CALM, distills=True))
    assert not list(checker.distilled(distilling))
    assert [found.rule for found in checker.distilled(replace(distilling, rounds=without))] == [LOST]
    hurried = replace(distilling.scenario, quorum=1)
    assert not list(checker.distilled(replace(distilling, rounds=without, scenario=hurried)))
    assert LOST in rules(replace(evidence, rounds=without), made), "nobody asked for a distillation"


def test_a_distillation_that_was_acknowledged_and_is_not_the_version_is_lost(sound: Sound) -> None:
    evidence, _ = sound
    about = {"job": "job", "task": "distill", "round": 1, "fate": "accepted", "digest": evidence.versions[1].digest}
    told = replace(evidence, facts=(*evidence.facts, Fact(HOUSE, "acknowledged", about=about)))
    assert not list(checker.distilled(told))
    other = Fact(HOUSE, "acknowledged", about={**about, "digest": "0" * 64})
    assert [found.rule for found in checker.distilled(replace(told, facts=(other,)))] == [LOST]


def test_a_finished_distillation_that_is_done_again_is_found(sound: Sound) -> None:
    evidence, made = sound
    about = {"job": "job", "task": "distill", "round": 1, "resumed_step": 0}
    begun, sealed = (Fact(HOUSE, kind, about=about) for kind in ("begun", "sealed"))
    assert not rules(replace(evidence, facts=(*evidence.facts, begun, sealed)), made)
    assert rules(replace(evidence, facts=(*evidence.facts, begun, sealed, begun)), made) == {REPEATED}


def test_an_accepted_update_that_no_version_counts_is_lost(sound: Sound) -> None:
    evidence, made = sound
    without = replace(evidence.versions[1], parts=evidence.versions[1].parts[:1])
    assert LOST in rules(replace(evidence, versions=(evidence.versions[0], without, evidence.versions[2])), made)


def test_a_committed_version_whose_bytes_are_gone_is_lost(sound: Sound) -> None:
    evidence, made = sound
    gone = replace(evidence.versions[1], stored_digest="")
    assert rules(replace(evidence, versions=(evidence.versions[0], gone, evidence.versions[2])), made) == {LOST}
    deleted = replace(gone, deleted=True)
    assert not rules(replace(evidence, versions=(evidence.versions[0], deleted, evidence.versions[2])), made)


def test_a_job_that_was_acknowledged_and_is_not_there_is_lost(sound: Sound) -> None:
    evidence, made = sound
    nothing = Evidence(scenario=CALM, job="job", facts=evidence.facts[:1])
    assert LOST in rules(nothing, made)


def test_a_site_that_is_twice_in_a_version_is_found(sound: Sound) -> None:
    evidence, made = sound
    twice = replace(evidence.versions[1], parts=(evidence.versions[1].parts[0], *evidence.versions[1].parts))
    assert TWICE in rules(replace(evidence, versions=(evidence.versions[0], twice, evidence.versions[2])), made)


def test_two_updates_of_a_site_in_a_round_are_found(sound: Sound) -> None:
    evidence, made = sound
    assert TWICE in rules(replace(evidence, updates=(evidence.updates[0], *evidence.updates)), made)


def test_a_part_whose_update_was_not_accepted_is_found(sound: Sound) -> None:
    evidence, made = sound
    late = (replace(evidence.updates[0], fate="DISCARDED"), *evidence.updates[1:])
    assert TWICE in rules(replace(evidence, updates=late, facts=evidence.facts[:1]), made)


def test_bytes_that_are_not_those_of_the_digest_are_found(sound: Sound) -> None:
    evidence, made = sound
    wrong = replace(evidence.versions[2], stored_digest="0" * 64)
    assert rules(replace(evidence, versions=(*evidence.versions[:2], wrong)), made) == {DIGEST}


def test_a_version_that_is_not_what_its_contributors_make_is_found(sound: Sound) -> None:
    evidence, made = sound
    other = replace(evidence.versions[2], digest="0" * 64, stored_digest="0" * 64)
    assert rules(replace(evidence, versions=(*evidence.versions[:2], other)), made) == {DIGEST}


def test_an_update_that_is_not_its_sites_training_is_found(sound: Sound) -> None:
    evidence, made = sound
    update, part = evidence.updates[0], evidence.versions[1].parts[0]
    assert (update.round, update.site) == (1, part.site)
    forged = replace(evidence.versions[1], parts=(replace(part, digest="0" * 64), evidence.versions[1].parts[1]))
    changed = replace(
        evidence,
        versions=(evidence.versions[0], forged, evidence.versions[2]),
        updates=(replace(update, digest="0" * 64), *evidence.updates[1:]),
        facts=evidence.facts[:1],
    )
    assert rules(changed, made) == {DIGEST}


def test_a_weight_that_its_examples_do_not_give_is_found(sound: Sound) -> None:
    evidence, made = sound
    first, second = evidence.versions[1].parts
    moved = (replace(first, weight=first.weight + 0.1), replace(second, weight=second.weight - 0.1))
    changed = (evidence.versions[0], replace(evidence.versions[1], parts=moved), evidence.versions[2])
    assert rules(replace(evidence, versions=changed), made) == {DIGEST}


def test_arithmetic_that_is_off_is_found(sound: Sound) -> None:
    evidence, made = sound
    assert rules(evidence, {**made, 2: replace(made[2], off_by=1e-3)}) == {DIGEST}


def test_a_site_that_is_left_out_although_the_whole_cohort_is_the_quorum_is_found(sound: Sound) -> None:
    evidence, made = sound
    alone = replace(evidence.versions[1], parts=evidence.versions[1].parts[:1])
    found = list(checker.as_undisturbed(replace(evidence, versions=(evidence.versions[0], alone)), made))
    assert [violation.rule for violation in found] == [DIGEST]
    smaller = replace(evidence, versions=(alone,), scenario=replace(CALM, quorum=1))
    assert not list(checker.as_undisturbed(smaller, made))


@pytest.mark.parametrize("later", [shown(1, round_number=2), shown(None), shown(2, round_number=0)])
def test_a_head_or_a_round_that_goes_back_is_found(sound: Sound, later: Fact) -> None:
    evidence, made = sound
    facts = (*evidence.facts, shown(2, round_number=2), later)
    assert rules(replace(evidence, facts=facts), made) == {BACK}


def test_a_head_that_was_shown_and_is_not_the_stores_is_found(sound: Sound) -> None:
    evidence, made = sound
    assert rules(replace(evidence, facts=(*evidence.facts, shown(7))), made) == {BACK}


def test_a_job_that_was_over_and_runs_again_is_found(sound: Sound) -> None:
    evidence, made = sound
    facts = (*evidence.facts, shown(2, state="COMPLETED"), shown(2))
    assert rules(replace(evidence, facts=facts), made) == {BACK}


def test_a_gap_in_the_versions_is_found(sound: Sound) -> None:
    evidence, made = sound
    assert BACK in rules(replace(evidence, versions=(evidence.versions[0], evidence.versions[2])), made)


def begun(site: str, round_number: int, *, step: int = 0) -> Fact:
    about = {"job": "job", "task": "train", "round": round_number, "resumed_step": step}
    return Fact(site, "begun", about=about)


def test_a_finished_training_that_is_done_again_is_found(sound: Sound) -> None:
    evidence, made = sound
    kill = Injected(Fault("kill agent", "alfa", When(1, "training", "alfa")), 0.0)
    assert rules(replace(evidence, facts=(*evidence.facts, begun("alfa", 1)), injected=(kill,)), made) == {REPEATED}


def test_a_finished_training_that_goes_on_from_a_checkpoint_is_found(sound: Sound) -> None:
    evidence, made = sound
    stale = replace(evidence, facts=(*evidence.facts, begun("alfa", 1, step=3)))
    assert rules(stale, made) == {REPEATED}


def test_only_the_training_of_a_damaged_round_may_be_done_again(sound: Sound) -> None:
    evidence, _ = sound
    damage = Injected(Fault("damage update", "alfa", When(1, "accepted", "alfa")), 0.0, round=1)
    again = replace(evidence, facts=(*evidence.facts, begun("alfa", 1, step=3)))
    assert not list(checker.trained_once(replace(again, injected=(damage,))))
    assert list(checker.trained_once(replace(again, injected=(replace(damage, round=2),))))


def test_a_fault_excuses_only_the_rounds_that_its_time_touches(sound: Sound) -> None:
    evidence, made = sound
    fault = Fault("kill agent", "alfa", When(1, "training", "alfa"))
    in_round = {
        number: replace(evidence, facts=(begun("alfa", number), *evidence.facts), round_begins={1: 100.0, 2: 200.0})
        for number in (1, 2)
    }
    for number, (began, ended), allowed in (
        (1, (150.0, 160.0), True),
        (2, (150.0, 160.0), False),
        (1, (250.0, 260.0), False),
        (2, (250.0, 260.0), True),
        (2, (150.0, 210.0), True),
    ):
        kill = Injected(fault, began, ended)
        found = rules(replace(in_round[number], injected=(kill,)), made)
        assert found == (set() if allowed else {REPEATED}), (number, began, ended)


def test_a_training_that_begins_anew_without_a_fault_that_ended_it_is_found(sound: Sound) -> None:
    evidence, made = sound
    again = replace(evidence, facts=(begun("alfa", 1), *evidence.facts))
    assert rules(again, made) == {REPEATED}
    cut = Injected(Fault("cut", "alfa", When(1, "training", "alfa")), 0.0)
    assert rules(replace(again, injected=(cut,)), made) == {REPEATED}
    elsewhere = Injected(Fault("kill trainer", "bravo", When(1, "training", "bravo")), 0.0)
    assert rules(replace(again, injected=(elsewhere,)), made) == {REPEATED}


@pytest.mark.parametrize("kind", checker.ENDS_A_TRAINER)
def test_a_training_may_begin_anew_after_a_fault_that_ended_it(sound: Sound, kind: str) -> None:
    evidence, made = sound
    ended = Injected(Fault(kind, "alfa", When(1, "training", "alfa")), 0.0)
    assert not rules(replace(evidence, facts=(begun("alfa", 1), *evidence.facts), injected=(ended,)), made)


def test_a_training_that_goes_on_from_a_checkpoint_is_not_done_again(sound: Sound) -> None:
    evidence, made = sound
    assert not rules(replace(evidence, facts=(begun("alfa", 1, step=3), *evidence.facts)), made)


def test_a_job_that_does_not_end_is_found(sound: Sound) -> None:
    evidence, made = sound
    assert HANGING in rules(replace(evidence, state="RUNNING"), made)
    assert HANGING in rules(replace(evidence, troubles=("nothing happened for 90 s",)), made)


def test_a_job_that_fails_although_its_quorum_was_there_is_found(sound: Sound) -> None:
    evidence, made = sound
    failed = replace(evidence, state="FAILED", sentence="round 2 has 1 of the 2 updates it needs: x")
    assert HANGING in rules(failed, made)
    revoked = Injected(Fault("revoke site", "bravo", When(1, "training", "bravo")), 0.0)
    revoking = replace(CALM, faults=(revoked.fault,))
    assert not rules(replace(failed, injected=(revoked,), scenario=revoking), made)
    defect = replace(failed, injected=(revoked,), scenario=revoking, sentence="a defect")
    assert HANGING in rules(defect, made)


def test_a_task_that_is_left_open_by_a_complete_job_is_found(sound: Sound) -> None:
    evidence, made = sound
    assert rules(replace(evidence, tasks=(Task(1, "TRAIN", "alfa", "LEASED", 1),)), made) == {HANGING}


def test_an_order_of_the_operator_that_was_refused_is_found(sound: Sound) -> None:
    evidence, made = sound
    refused = Fact("operator", "refused", about={"order": "pause job", "reason": "a defect"})
    assert rules(replace(evidence, facts=(*evidence.facts, refused)), made) == {HANGING}
    for state, found in (("completed", set()), ("failed", set()), ("paused", {HANGING})):
        reason = f"Job job is {state}: it cannot be told to pause."
        late = Fact("operator", "refused", about={"order": "pause job", "reason": reason})
        assert rules(replace(evidence, facts=(*evidence.facts, late)), made) == found
