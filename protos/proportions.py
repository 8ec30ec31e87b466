"""How sure a share of right answers is, and whether two of them differ by more than chance."""

from __future__ import annotations

import math

_Z95 = 1.959963984540054


def wilson(correct: float, questions: float) -> tuple[float, float]:
    """95 % confidence interval of a share: Wilson's score interval (JASA 22, 1927, 209-212).

    Unlike the normal one it stays between 0 and 1 and holds for few questions.
    """
    share, square = correct / questions, _Z95**2 / questions
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact test, two-sided: how likely the two counts are this far apart when neither is favoured.

    `gained` questions were answered rightly only the second time, `lost` only the first (Psychometrika 12, 1947,
    153-157; the binomial form, with nothing approximated).
    """
    changed = gained + lost
    tail = term = 1
    for k in range(min(gained, lost)):
        term = term * (changed - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**changed)
