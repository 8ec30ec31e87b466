from __future__ import annotations

import math

import pytest

from deploy.lab.certainty import holm, over_seeds, paired, quantile, within


@pytest.mark.parametrize(
    ("freedom", "both_sides", "one_side"),
    [(1, 12.7062, 6.3138), (2, 4.3027, 2.9200), (4, 2.7764, 2.1318), (5, 2.5706, 2.0150), (9, 2.2622, 1.8331),
     (30, 2.0423, 1.6973)],
)  # fmt: skip
def test_the_quantiles_are_those_of_the_printed_table(freedom: int, both_sides: float, one_side: float) -> None:
    assert quantile(0.975, freedom=freedom) == pytest.approx(both_sides, abs=5e-5)
    assert quantile(0.95, freedom=freedom) == pytest.approx(one_side, abs=5e-5)


def test_with_many_degrees_of_freedom_it_is_the_normal_distribution() -> None:
    assert within(1.0, freedom=100_000) == pytest.approx(math.erf(1 / math.sqrt(2)), abs=1e-5)


def test_the_interval_of_a_mean_is_students() -> None:
    """By hand: mean 0.8, deviation 0.02, t = 4.3027 at two degrees of freedom."""
    found = over_seeds([0.78, 0.80, 0.82])
    assert found.value == pytest.approx(0.80)
    assert found.half == pytest.approx(4.3027 * 0.02 / math.sqrt(3), abs=1e-6)


def test_one_seed_says_nothing_of_how_sure_it_is() -> None:
    found = over_seeds([0.7])
    assert (found.count, found.value, found.half, found.low, found.high) == (1, 0.7, None, None, None)


def test_variants_are_compared_seed_by_seed() -> None:
    """By hand: gains 1, 2, 3 of a hundred; their error is 1 / sqrt(3), t = 3.464 at two degrees: p = 0.0742."""
    change = paired({1: 0.70, 2: 0.80, 3: 0.75, 9: 0.1}, {1: 0.71, 2: 0.82, 3: 0.78, 8: 0.9})
    assert change is not None and change.count == 3
    assert change.mean.value == pytest.approx(0.02)
    assert change.t_p == pytest.approx(0.07418, abs=1e-5)
    assert change.sign_p == pytest.approx(2 / 2**3)
    error = 0.01 / math.sqrt(3)
    assert change.lower == pytest.approx(0.02 - 2.9200 * error, abs=1e-6)
    assert change.upper == pytest.approx(0.02 + 2.9200 * error, abs=1e-6)


def test_what_both_variants_owe_to_a_seed_is_no_part_of_their_difference() -> None:
    change = paired({1: 0.5, 2: 0.9}, {1: 0.51, 2: 0.9099999})
    assert change is not None and change.mean.half is not None and change.mean.half < 1e-6


def test_equal_figures_are_no_difference_and_equal_gains_are_judged_by_their_number() -> None:
    same, gained = paired({1: 0.5, 2: 0.75}, {1: 0.5, 2: 0.75}), paired({1: 0.5, 2: 0.75}, {1: 0.625, 2: 0.875})
    assert same is not None and (same.t_p, same.sign_p) == (1.0, 1.0)
    assert gained is not None and gained.t_p == gained.sign_p == 0.5 and gained.lower == gained.upper == 0.125


def test_gains_that_are_equal_but_for_rounding_are_no_win() -> None:
    """One more of 500 rows right, with each of two seeds: as decimals the gains differ in their last digit."""
    change = paired({1: 0.912, 2: 0.684}, {1: 0.914, 2: 0.686})
    assert change is not None and change.t_p == 0.5


def test_a_pair_of_one_common_seed_is_no_comparison() -> None:
    assert paired({1: 0.5, 2: 0.6}, {1: 0.5, 3: 0.6}) is None


def test_many_questions_at_once_need_stronger_answers() -> None:
    """Holm's own procedure on four values, by hand."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
