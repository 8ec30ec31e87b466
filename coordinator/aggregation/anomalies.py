"""What is unusual about the updates of a round, by site, from their Gram matrix (see robust.py).

protos/update_figures.py says what the figures are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from coordinator.aggregation.robust import Matrix, Vector, norms
from protos.update_figures import COEFFICIENT, COSINE, NORM, NORM_Z

# Rounds that are pooled, and the fewest values of which a deviation is taken.
POOLED_ROUNDS = 10
FEWEST_POOLED = 12
# In logs. Under Adam all updates of a round are about as long as the learning rate allows, and their lengths differ by
# 2 %: measured by that alone, some honest site would be an outlier in every other round.
LEAST_DEVIATION = 0.1


def figures(
    gram: Matrix, *, sites: Sequence[str], coefficients: Vector | None, history: Sequence[Mapping[str, float]]
) -> dict[str, float]:
    """All figures of a round, in site order. `history` has the norms of the rounds before, by site."""
    lengths = norms(gram)
    of_sites = dict(zip(sites, lengths.tolist(), strict=True))
    found = {f"{NORM}.{site}": length for site, length in of_sites.items()}
    found |= {f"{COSINE}.{site}": cosine for site, cosine in _cosines_to_others(gram, sites=sites).items()}
    found |= {f"{NORM_Z}.{site}": z for site, z in _robust_z(of_sites, history=history).items()}
    if coefficients is not None:
        found |= {f"{COEFFICIENT}.{site}": a for site, a in zip(sites, coefficients.tolist(), strict=True)}
    return found


def _cosines_to_others(gram: Matrix, *, sites: Sequence[str]) -> dict[str, float]:
    """Without sites whose update is zero, and where there are no others. All by the directions' own Gram matrix."""
    lengths = norms(gram)
    moved = lengths > 0
    directions = gram[np.ix_(moved, moved)] / np.outer(lengths[moved], lengths[moved])
    found = {}
    for place, site in enumerate(site for site, one in zip(sites, moved, strict=True) if one):
        others = np.arange(len(directions)) != place
        length = math.sqrt(max(0.0, float(directions[np.ix_(others, others)].sum())))
        if length > 0:
            found[site] = float(directions[place, others].sum()) / length
    return found


def _robust_z(now: Mapping[str, float], *, history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    residuals = _residuals(now)
    pooled = [value for lengths in history[-POOLED_ROUNDS + 1 :] for value in _residuals(lengths).values()]
    pooled += residuals.values()
    if len(pooled) < FEWEST_POOLED:
        return {}
    centre = float(np.median(pooled))
    deviation = max(1.4826 * float(np.median(np.abs(np.array(pooled) - centre))), LEAST_DEVIATION)
    return {site: (value - centre) / deviation for site, value in residuals.items()}


def _residuals(lengths: Mapping[str, float]) -> dict[str, float]:
    """Logs of the lengths less their median, so that rounds may be compared in which all of them shrink."""
    logs = {site: math.log(length) for site, length in lengths.items() if length > 0}
    middle = float(np.median(list(logs.values()))) if logs else 0.0
    return {site: value - middle for site, value in logs.items()}
