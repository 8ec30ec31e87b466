"""Rules that hold when a few updates are wrong: pure functions, in float64.

Delta_i is a site's update less the version x that the round began with, one vector over all tensors that travel; n is
their number, p_i a site's weight. All but two rules make x + sum a_i Delta_i, and the a_i follow from the Gram matrix
G_ij = Delta_i . Delta_j alone, which one reading of the updates gives (gram.py):

    krum               score_i = the sum of the n - f - 2 smallest |Delta_i - Delta_j|^2; the least score counts alone.
                       n >= 2 f + 3 (Blanchard et al. 2017, arXiv:1703.02757)
    multi-krum         the mean of the n - f least scores (the same)
    centered-clipping  v = 0, then some times v <- v + sum p_i (Delta_i - v) min(1, radius / |Delta_i - v|)
                       (Karimireddy, He and Jaggi 2021, arXiv:2012.10333). v is always a combination of the Delta_i
    norm-bound         sum p_i Delta_i min(1, radius / |Delta_i|) (Sun et al. 2019, arXiv:1911.07963)

Median and trimmed mean (Yin et al. 2018, arXiv:1803.01498) take each coordinate by itself; `coordinate_wise` makes them
of a block of every update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from protos.recipe_robust import CenteredClipping, Krum, Median, MultiKrum, NormBound, Robust, TrimmedMean

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


def coefficients(robust: Robust, gram: Matrix, *, weights: Sequence[float]) -> Vector | None:
    """a_i, for gram [n, n] and the sites' weights, which sum to 1; None where the rule takes coordinates.

    Their sum is 1, or less where updates are clipped.
    """
    p = np.asarray(weights, dtype=np.float64)
    match robust:
        case Krum():
            return _mean_of(krum_order(gram, byzantine=robust.byzantine)[:1], count=len(p))
        case MultiKrum():
            best = krum_order(gram, byzantine=robust.byzantine)[: len(p) - robust.byzantine]
            return _mean_of(best, count=len(p))
        case CenteredClipping():
            return centered_clipping(gram, weights=p, radius=_radius(robust, gram), iterations=robust.iterations)
        case NormBound():
            return p * _kept(norms(gram), radius=_radius(robust, gram))
    return None


def norms(gram: Matrix) -> Vector:
    """|Delta_i|."""
    return np.sqrt(np.maximum(np.diag(gram), 0.0))


def krum_order(gram: Matrix, *, byzantine: int) -> list[int]:
    """All updates, the least score first; of equal scores the first in site order."""
    squares = np.diag(gram)
    distances = np.maximum(squares[:, None] + squares[None, :] - 2 * gram, 0.0)
    np.fill_diagonal(distances, np.inf)
    nearest = np.sort(distances, axis=1)[:, : len(gram) - byzantine - 2]
    return [int(place) for place in np.argsort(nearest.sum(axis=1), kind="stable")]


def centered_clipping(gram: Matrix, *, weights: Vector, radius: float, iterations: int) -> Vector:
    """c with v = sum c_i Delta_i after so many iterations."""
    c = np.zeros(len(gram))
    for _ in range(iterations):
        squares = np.diag(gram) - 2 * (gram @ c) + c @ gram @ c
        kept = weights * _kept(np.sqrt(np.maximum(squares, 0.0)), radius=radius)
        c = c * (1 - math.fsum(kept)) + kept
    return c


def coordinate_wise(robust: Robust, values: Matrix) -> Vector:
    """The median or trimmed mean of values [n, count] over the sites, [count]; `values` is sorted by it.

    The same for any order of the sites, bit for bit.
    """
    values.sort(axis=0)
    count = len(values)
    if isinstance(robust, Median):
        return (values[(count - 1) // 2] + values[count // 2]) / 2
    assert isinstance(robust, TrimmedMean)
    kept = values[robust.trim : count - robust.trim]
    total = kept[0].copy()
    for row in kept[1:]:
        total += row
    return total / len(kept)


def is_coordinate_wise(robust: Robust) -> bool:
    return isinstance(robust, (Median, TrimmedMean))


def _mean_of(places: Sequence[int], *, count: int) -> Vector:
    found = np.zeros(count)
    found[list(places)] = 1 / len(places)
    return found


def _radius(robust: CenteredClipping | NormBound, gram: Matrix) -> float:
    return robust.radius if robust.radius is not None else float(np.median(norms(gram)))


def _kept(lengths: Vector, *, radius: float) -> Vector:
    """min(1, radius / length), in 12 digits: the last bits of a sum of products may differ from machine to machine."""
    longer = lengths > radius
    kept = np.divide(radius, lengths, out=np.ones_like(lengths), where=longer)
    return np.where(longer, [float(f"{value:.12g}") for value in kept], 1.0)
