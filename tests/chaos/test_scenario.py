"""Scenarios: pure, valid, and together of every kind."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from protos import jobspec
from tests.chaos.scenario import (
    AT_SITE,
    COORDINATOR,
    ENGINES,
    HOUSE,
    IN_DISTILLING,
    KILLS,
    KINDS,
    STORM_ROUNDS,
    generate,
    storm,
)

SEEDS = range(400)


def test_a_seed_is_the_same_scenario_every_time() -> None:
    assert [generate(seed) for seed in SEEDS] == [generate(seed) for seed in SEEDS]
    assert len({repr(generate(seed)) for seed in SEEDS}) == len(SEEDS)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_scenario_is_a_job_that_a_coordinator_takes_with_faults_that_have_a_moment(engine: str) -> None:
    for seed in SEEDS:
        scenario = generate(seed, engine=engine)
        spec = jobspec.parse(scenario.recipe)
        assert 1 <= spec.cohort.quorum <= len(scenario.sites)
        for fault in scenario.faults:
            assert 1 <= fault.when.round <= scenario.rounds
            assert (fault.when.site in scenario.sites) if fault.when.moment in AT_SITE else not fault.when.site


@pytest.mark.parametrize("engine", ENGINES)
def test_the_seeds_together_have_every_kind_of_fault(engine: str) -> None:
    drawn = Counter(fault.kind for seed in SEEDS for fault in generate(seed, engine=engine).faults)
    assert set(drawn) == {kind.name for kind in KINDS if engine in kind.engines}


def test_a_scenario_that_distils_has_a_fault_in_that_phase_and_no_other_scenario_has() -> None:
    distilled = [generate(seed) for seed in SEEDS if generate(seed).distills]
    assert 0.15 < len(distilled) / len(SEEDS) < 0.35
    for scenario in (generate(seed) for seed in SEEDS):
        hit = [fault for fault in scenario.faults if fault.when.moment == "distilling"]
        assert bool(hit) == scenario.distills
        assert all(fault.target in (HOUSE, COORDINATOR) for fault in hit)
    drawn = {fault.kind for scenario in distilled for fault in scenario.faults if fault.when.moment == "distilling"}
    assert drawn == set(IN_DISTILLING)


def test_an_undisturbed_scenario_is_the_same_job_without_faults() -> None:
    for seed in SEEDS:
        calm, rough = generate(seed, undisturbed=True), generate(seed)
        assert not calm.faults
        assert calm.recipe["cohort"]["sites"] == rough.recipe["cohort"]["sites"]
        assert (calm.payload_mb, calm.rounds, calm.quorum) == (rough.payload_mb, rough.rounds, rough.quorum)


@pytest.mark.parametrize("seed", range(20))
def test_a_storm_kills_in_nearly_every_round_and_no_trainer_so_often_that_its_site_is_set_aside(seed: int) -> None:
    found = storm(seed)
    assert {fault.kind for fault in found.faults} <= set(KILLS)
    assert len(found.faults) >= 15 and found.whole_cohort and found.rounds == STORM_ROUNDS
    for site in found.sites:
        hit = [fault.when.round for fault in found.faults if fault.target == site and fault.kind.endswith("trainer")]
        assert all(later - earlier >= 3 for earlier, later in pairwise(hit))
