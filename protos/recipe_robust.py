"""[aggregation] robust: rules that hold when a few sites send wrong updates, by fault or on purpose.

Delta_i is a site's update less the version that the round began with, over all tensors that travel; n the number of
updates that count. coordinator/aggregation/robust.py has the arithmetic, and where each rule is from.

    type               what the next version is                                         weights
    median             the median of each coordinate                                    equal
    trimmed-mean       the mean of each coordinate without its `trim` largest and       equal
                       `trim` smallest values
    krum               the update that is nearest to its n - byzantine - 2 neighbours   the chosen one alone
    multi-krum         the mean of the n - byzantine best by the same score             equal
    centered-clipping  the mean, each update clipped to `radius` around it              capped
    norm-bound         the mean of updates that are no longer than `radius`             capped

A site says itself how many rows it has, and one that lies could claim a billion. So the first four give every site the
same weight, and with the last two none counts for more than 2 / n, or `max_share` where that is less. Where sites'
data differ much, krum and median leave honest minorities out: the round says whom.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from protos.recipe_part import Part

# The median of fewer is decided by one of them.
FEWEST_FOR_A_MEDIAN = 3


class NotRobust(Part):
    """Every update counts as it is."""

    type: Literal["none"]


class Median(Part):
    """Yin et al. 2018, arXiv:1803.01498."""

    type: Literal["median"]


class TrimmedMean(Part):
    """Yin et al. 2018, arXiv:1803.01498."""

    type: Literal["trimmed-mean"]
    trim: Annotated[int, Field(ge=1)] = 1


class Krum(Part):
    """Blanchard et al. 2017, arXiv:1703.02757. `byzantine`: how many updates may be wrong."""

    type: Literal["krum"]
    byzantine: Annotated[int, Field(ge=1)] = 1


class MultiKrum(Part):
    """Blanchard et al. 2017, arXiv:1703.02757. `byzantine`: how many updates may be wrong; as many are left out."""

    type: Literal["multi-krum"]
    byzantine: Annotated[int, Field(ge=1)] = 1


class CenteredClipping(Part):
    """Karimireddy, He and Jaggi 2021, arXiv:2012.10333, from zero. `radius`: by default the median norm."""

    type: Literal["centered-clipping"]
    radius: Annotated[float, Field(gt=0)] | None = None
    iterations: Annotated[int, Field(ge=1, le=10)] = 3


class NormBound(Part):
    """Sun et al. 2019, arXiv:1911.07963, without their noise. `radius`: by default the median norm."""

    type: Literal["norm-bound"]
    radius: Annotated[float, Field(gt=0)] | None = None


Robust = Annotated[
    NotRobust | Median | TrimmedMean | Krum | MultiKrum | CenteredClipping | NormBound, Field(discriminator="type")
]
# Rules under which an update is one vector, and a combination of updates a combination of what they stand for.
LINEAR_RULES = ("mean", "ffa-lora", "rolora", "fed-sb")


def has_equal_weights(robust: Robust) -> bool:
    """Whether what sites say of their rows has no part in it."""
    return isinstance(robust, (Median, TrimmedMean, Krum, MultiKrum))


def is_clipping(robust: Robust) -> bool:
    return isinstance(robust, (CenteredClipping, NormBound))


def fewest_updates(robust: Robust) -> int:
    """How many updates the rule needs for its promise."""
    if isinstance(robust, TrimmedMean):
        return 2 * robust.trim + 1
    if isinstance(robust, (Krum, MultiKrum)):
        return 2 * robust.byzantine + 3
    if isinstance(robust, Median) or (isinstance(robust, (CenteredClipping, NormBound)) and robust.radius is None):
        return FEWEST_FOR_A_MEDIAN
    return 1


def check(robust: Robust, *, report: bool, rule: str, mixed_ranks: bool, quorum: int) -> None:
    """ValueError with one sentence where the rest of a recipe contradicts it."""
    if mixed_ranks and (report or not isinstance(robust, NotRobust)):
        asks = "report" if isinstance(robust, NotRobust) else f"robust {robust.type}"
        raise ValueError(f"{asks} compares whole updates, so ranks must give every site the same")
    if isinstance(robust, NotRobust):
        return
    if rule not in LINEAR_RULES:
        raise ValueError(f"rule {rule} combines more than plain vectors, so robust must be none")
    if quorum < (fewest := fewest_updates(robust)):
        raise ValueError(f"quorum is {quorum}, but robust {robust.type} needs at least {fewest} updates")
