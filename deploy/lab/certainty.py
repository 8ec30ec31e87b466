"""How sure a mean over seeds is, and whether two variants differ by more than chance.

Seeds are few, so intervals are Student's, and variants are compared seed by seed: what a seed does to both of them is
then no part of the difference.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from protos.proportions import mcnemar

BOTH_SIDES, ONE_SIDE = 0.975, 0.95
BISECTIONS = 100
# Differences are equal when they spread by less than this part of their mean.
EQUAL = 1e-9


@dataclass(frozen=True)
class Mean:
    """`low` and `high`: the 95 % interval; None where one value alone says nothing of it."""

    count: int
    value: float
    low: float | None
    high: float | None

    @property
    def half(self) -> float | None:
        return None if self.high is None else self.high - self.value


@dataclass(frozen=True)
class Difference:
    """Second less first, over the seeds that both have.

    `upper` and `lower`: what it is below or above with 95 % certainty on that one side, for showing that something is
    not worse. `t_p` is of the paired t-test (of the sign test where all seeds differ by the
    same), `sign_p` of the exact sign test, both two-sided.
    """

    count: int
    mean: Mean
    lower: float
    upper: float
    t_p: float
    sign_p: float


def over_seeds(values: Sequence[float]) -> Mean:
    """At least one value."""
    middle = mean(values)
    if len(values) < 2:
        return Mean(len(values), middle, None, None)
    half = quantile(BOTH_SIDES, freedom=len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Mean(len(values), middle, middle - half, middle + half)


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """Of two variants' values by seed; None where fewer than two seeds have both."""
    gains = [second[seed] - first[seed] for seed in sorted(first.keys() & second.keys())]
    if len(gains) < 2:
        return None
    middle, error = mean(gains), stdev(gains) / math.sqrt(len(gains))
    freedom = len(gains) - 1
    up, down = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    # The sign test is McNemar's: how often one was ahead, ties left out.
    sign_p = mcnemar(up, down)
    # Shares of few rows are often equal in all seeds by chance, and then Student's t would be endless.
    equal = error <= EQUAL * abs(middle)
    t_p = sign_p if equal else 1 - within(middle / error, freedom=freedom)
    reach = quantile(ONE_SIDE, freedom=freedom) * error
    return Difference(len(gains), over_seeds(gains), middle - reach, middle + reach, t_p, sign_p)


def holm(p_values: Sequence[float]) -> list[float]:
    """The same p values made larger for that many questions asked at once (Holm 1979, Scand. J. Stat. 6, 65-70)."""
    order = sorted(range(len(p_values)), key=lambda number: p_values[number])
    adjusted, largest = [1.0] * len(p_values), 0.0
    for place, number in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p_values[number]))
        adjusted[number] = largest
    return adjusted


def within(t: float, *, freedom: int) -> float:
    """How likely Student's t lies between -t and t: exact for whole degrees of freedom.

    Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 26.7.3 and 26.7.4.
    """
    angle = math.atan(abs(t) / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    term = 1.0 if freedom % 2 == 0 else cosine
    total = term if freedom > 1 else 0.0
    for k in range(2 + freedom % 2, freedom - 1, 2):
        term *= (k - 1) / k * cosine * cosine
        total += term
    return sine * total if freedom % 2 == 0 else (angle + sine * total) * 2 / math.pi


@functools.cache
def quantile(share: float, *, freedom: int) -> float:
    """The t below which `share`, above one half, of Student's distribution lies."""
    low, high = 0.0, 1.0
    while within(high, freedom=freedom) < 2 * share - 1:
        high *= 2
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, freedom=freedom) < 2 * share - 1 else (low, middle)
    return high
