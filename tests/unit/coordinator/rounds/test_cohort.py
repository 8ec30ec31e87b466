"""Who trains in a round, who is waited for, and what share each update has."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.rounds import state as s
from coordinator.rounds.machine import step
from protos import jobspec
from tests.unit.coordinator.rounds.conftest import job, of, round_, sites, spec, train, update


def test_a_round_waits_for_an_absent_site_and_then_begins_without_it() -> None:
    facts = s.Facts(sites("a", "b", "c", away=("c",)), round_(1, s.Phase.SELECTING, ()))
    early = step(job(), facts, 3.0)
    assert not early.effects
    assert "missing c" in early.sentence and "begins without them in 7 s" in early.sentence
    assert of(step(job(), facts, 10.0), s.SetCohort) == [s.SetCohort(("a", "b"))]


def test_the_draw_of_a_part_of_the_sites_depends_on_seed_and_round_only() -> None:
    recipe = spec(cohort={"size": 2, "quorum": 1, "gather_seconds": 10})
    names = [f"s{number}" for number in range(20)]

    def drawn(number: int, order: list[str], seed: int = 0) -> tuple[str, ...]:
        seeded = recipe.model_copy(update={"seed": seed})
        facts = s.Facts(sites(*order), round_(number, s.Phase.SELECTING, ()))
        return of(step(job(seeded), facts, 0.0), s.SetCohort)[0].cohort

    assert drawn(1, names) == drawn(1, names[::-1])
    assert len({drawn(number, names) for number in range(1, 9)}) > 1
    assert drawn(1, names) != drawn(1, names, seed=1)


def test_a_site_that_declines_is_replaced_by_the_next_in_the_draw() -> None:
    recipe = spec(cohort={"size": 2, "quorum": 2})
    tasks = (train("a", s.TaskState.DECLINED, reason="not at night"), train("b", s.TaskState.RUNNING))
    facts = s.Facts(sites("a", "b", "c"), round_(cohort=("a", "b")), tasks, set_aside={"a": "not at night"})
    done = step(job(recipe), facts, 1.0)
    assert of(done, s.SetCohort) == [s.SetCohort(("b", "c"))]
    assert of(done, s.QueueTask)[0].site == "c"
    settled = replace(facts, round=round_(cohort=("b", "c")), tasks=(*tasks, train("c", s.TaskState.RUNNING)))
    assert not step(job(recipe), settled, 1.0).effects


def test_weights_of_sites_that_did_nothing_are_equal() -> None:
    recipe = spec(aggregation={"weights": "steps", "max_share": 0.5})
    updates = (replace(update("a"), steps=0), replace(update("b"), steps=0), update("c"))
    tasks = tuple(train(name, s.TaskState.SUCCEEDED) for name in "abc")
    for found in (updates, updates[:2]):
        (start,) = of(step(job(recipe), s.Facts(sites("a", "b", "c"), round_(), tasks, found), 1.0), s.Aggregate)
        assert sum(part.weight for part in start.contributions) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("weights", "shares"), [("examples", [0.1, 0.3, 0.6]), ("steps", [1 / 3] * 3), ("equal", [1 / 3] * 3)]
)
def test_weights_follow_the_recipe(weights: str, shares: list[float]) -> None:
    recipe = spec(aggregation={"weights": weights})
    updates = (update("a", examples=10), update("b", examples=30), update("c", examples=60))
    tasks = tuple(train(name, s.TaskState.SUCCEEDED) for name in "abc")
    (start,) = of(step(job(recipe), s.Facts(sites("a", "b", "c"), round_(), tasks, updates), 1.0), s.Aggregate)
    assert [part.weight for part in start.contributions] == pytest.approx(shares)


@pytest.mark.parametrize(
    ("max_share", "examples", "wanted"),
    [
        (0.5, (10, 30, 960), [0.125, 0.375, 0.5]),
        # What c has too much would bring b to 0.525.
        (0.4, (5, 35, 60), [0.2, 0.4, 0.4]),
        # No one is above it.
        (0.6, (5, 35, 60), [0.05, 0.35, 0.6]),
        # Fewer sites than the cap is made for.
        (0.4, (10, 90), [0.5, 0.5]),
    ],
)
def test_a_capped_share_gives_its_excess_to_the_others_in_proportion(
    max_share: float, examples: tuple[int, ...], wanted: list[float]
) -> None:
    recipe = spec(aggregation={"max_share": max_share})
    found = shares(recipe, *(update(name, examples=count) for name, count in zip("abc", examples, strict=False)))
    assert [part.weight for part in found] == pytest.approx(wanted, rel=1e-12)


def test_under_a_robust_rule_no_site_counts_for_more_because_it_claims_more_rows() -> None:
    names = "abcde"
    updates = tuple(update(name, examples=10**9 if name == "a" else 10) for name in names)
    tasks = tuple(train(name, s.TaskState.SUCCEEDED) for name in names)
    facts = s.Facts(sites(*names), round_(cohort=tuple(names)), tasks, updates[::-1])

    def shares(**aggregation) -> list[float]:
        recipe = spec(cohort={"quorum": 5}, aggregation=aggregation)
        (start,) = of(step(job(recipe), facts, 1.0), s.Aggregate)
        assert [part.site for part in start.contributions] == list(names)
        return [part.weight for part in start.contributions]

    for rule in ("median", "trimmed-mean", "krum", "multi-krum"):
        assert shares(robust={"type": rule}) == pytest.approx([0.2] * 5)
    for rule in ("norm-bound", "centered-clipping"):
        assert shares(robust={"type": rule}) == pytest.approx([0.4] + [0.15] * 4)
        assert shares(robust={"type": rule}, max_share=0.3) == pytest.approx([0.3] + [0.175] * 4)


def test_a_round_that_has_its_quorum_already_begins_although_nobody_is_connected() -> None:
    updates = (update("a"), update("b"))
    away = s.Facts(sites("a", "b", "c", away=("a", "b", "c")), round_(1, s.Phase.SELECTING, ()), updates=updates)
    assert not step(job(), away, 9.0).effects, "c may still come"
    done = step(job(), away, 10.0)
    assert of(done, s.SetCohort) == [s.SetCohort(("a", "b"))] and not of(done, s.QueueTask)


def test_a_site_that_was_not_counted_in_the_round_before_is_not_waited_for_and_joins_when_it_is_back() -> None:
    selecting = round_(2, s.Phase.SELECTING, ())
    before = {"last_cohort": ("a", "b"), "last_counted": frozenset("ab")}
    away = s.Facts(sites("a", "b", "c", away=("c",)), selecting, **before)
    done = step(job(), away, 0.0)
    assert of(done, s.SetCohort) == [s.SetCohort(("a", "b"))]
    assert done.sentence == "round 2 begins with a, b, without c, not connected"
    back = replace(away, sites=sites("a", "b", "c"))
    assert of(step(job(), back, 0.0), s.SetCohort) == [s.SetCohort(("a", "b", "c"))]
    was_there = replace(away, last_cohort=("a", "b", "c"), last_counted=frozenset("abc"))
    assert not step(job(), was_there, 9.0).effects, "it was there a moment ago"


def test_where_some_are_drawn_only_a_site_that_was_asked_in_vain_is_passed_over() -> None:
    recipe = spec(cohort={"size": 1, "quorum": 1, "gather_seconds": 10})
    first = of(step(job(recipe), s.Facts(sites("a", "b"), round_(2, s.Phase.SELECTING, ())), 0.0), s.SetCohort)[0]
    (drawn,) = first.cohort
    other = "b" if drawn == "a" else "a"
    away = s.Facts(sites("a", "b", away=(drawn,)), round_(2, s.Phase.SELECTING, ()))
    not_asked = replace(away, last_cohort=(other,), last_counted=frozenset(other))
    assert not step(job(recipe), not_asked, 0.0).effects
    asked = replace(away, last_cohort=(drawn,), last_counted=frozenset(other))
    assert of(step(job(recipe), asked, 0.0), s.SetCohort) == [s.SetCohort((other,))]


def test_only_the_first_round_waits_for_named_sites_that_are_not_enrolled() -> None:
    recipe = spec(cohort={"sites": ["a", "b", "new"], "quorum": 2, "gather_seconds": 10})
    first = s.Facts(sites("a", "b"), round_(1, s.Phase.SELECTING, ()))
    assert not step(job(recipe), first, 0.0).effects
    second = replace(
        first, round=round_(2, s.Phase.SELECTING, ()), last_cohort=("a", "b"), last_counted=frozenset("ab")
    )
    assert of(step(job(recipe), second, 0.0), s.SetCohort)


def test_a_round_never_waits_longer_for_sites_than_half_of_its_time() -> None:
    recipe = spec(cohort={"quorum": 1, "gather_seconds": 1000, "round_deadline_seconds": 100})
    facts = s.Facts(sites("a", "b", away=("b",)), round_(1, s.Phase.SELECTING, ()))
    assert "begins without them in 50 s" in step(job(recipe), facts, 0.0).sentence
    assert of(step(job(recipe), facts, 50.0), s.SetCohort) == [s.SetCohort(("a",))]


def shares(recipe: jobspec.JobSpec, *updates: s.Update, here: str = "abc") -> tuple[s.Contribution, ...]:
    tasks = tuple(train(one.site, s.TaskState.SUCCEEDED) for one in updates)
    cohort = tuple(one.site for one in updates)
    (start,) = of(step(job(recipe), s.Facts(sites(*here), round_(cohort=cohort), tasks, updates), 1.0), s.Aggregate)
    return start.contributions


def test_fednova_divides_each_share_by_the_length_of_the_path_and_keeps_the_length_of_the_step() -> None:
    updates = (replace(update("a", examples=10), steps=2), replace(update("b", examples=30), steps=6))
    recipe = spec(aggregation={"rule": "fednova"})
    # tau_eff = 1/4 x 2 + 3/4 x 6 = 5.
    assert [part.weight for part in shares(recipe, *updates)] == [0.25 * 5 / 2, 0.75 * 5 / 6]
    # With momentum 1/2 two steps are 1 + 3/2 of one, six 1 + 3/2 + 7/4 + 15/8 + 31/16 + 63/32.
    heavy = spec(aggregation={"rule": "fednova"}, local={"steps": 1, "optimizer": "sgd", "momentum": 0.5})
    effective = 0.25 * 2.5 + 0.75 * 10.03125
    assert [part.weight for part in shares(heavy, *updates)] == pytest.approx(
        [0.25 * effective / 2.5, 0.75 * effective / 10.03125], rel=1e-12
    )


def test_with_as_many_steps_everywhere_fednova_is_the_mean_to_the_bit() -> None:
    updates = (update("a", examples=10), update("b", examples=37), update("c", examples=101))
    assert shares(spec(aggregation={"rule": "fednova"}), *updates) == shares(spec(), *updates)


def test_scaffolds_controls_weigh_by_all_sites_that_may_train() -> None:
    fields = {
        "task": {"type": "classification", "labels": ["a", "b"]}, "data": {"name": "d"}, "base_model": {"name": "m"},
        "local": {"steps": 1, "optimizer": "sgd"}, "aggregation": {"rule": "scaffold", "weights": "equal"},
    }  # fmt: skip
    recipe = spec(**fields)
    found = shares(recipe, update("a"), update("b"), here="abcd")
    assert [(part.weight, part.control_weight, part.steps) for part in found] == [(0.5, 0.25, 5)] * 2
    # One that trained and is gone since counts all the same.
    found = shares(recipe, update("a"), update("b"), here="a")
    assert [part.control_weight for part in found] == [0.5, 0.5]
