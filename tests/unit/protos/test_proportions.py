"""Confidence intervals and McNemar's test against published numbers."""

from __future__ import annotations

import math

import pytest

from protos.proportions import mcnemar, wilson


@pytest.mark.parametrize(
    ("correct", "questions", "low", "high"),
    # Newcombe 1998 (Statistics in Medicine 17, 857-872), Table I, method 3: to four decimals.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_wilsons(correct: int, questions: int, low: float, high: float) -> None:
    assert wilson(correct, questions) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_the_interval_holds_at_both_ends() -> None:
    assert wilson(7, 7)[1] == 1.0
    assert wilson(0, 7)[0] == 0.0


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (0, 5), (5, 0), (4, 12), (10, 10), (1, 400)])
def test_mcnemars_test_is_the_binomials_two_tails(gained: int, lost: int) -> None:
    changed = gained + lost
    tail = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1))
    assert mcnemar(gained, lost) == pytest.approx(min(1.0, 2 * tail / 2**changed))


def test_mcnemars_test_gives_the_published_value() -> None:
    # R: binom.test(4, 16)$p.value
    assert mcnemar(4, 12) == pytest.approx(0.076812744140625)
