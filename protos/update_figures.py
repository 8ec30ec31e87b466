"""What the coordinator measures of each site's update, under these names in the record of a round: `<kind>.<site>`.

With Delta_i a site's update less the version that the round began with:

    update_norm         |Delta_i|
    update_cosine       between Delta_i and the mean of the others' directions (leave one out; each has length 1, so
                        that no long one turns the mean round); a flipped sign shows here
    update_norm_z       by how many standard deviations log |Delta_i| is off the round's median, where the deviation is
                        1.4826 MAD, pooled over the last rounds (Iglewicz and Hoaglin 1993), and 0.1 at least: the MAD
                        of three values alone means nothing, so it is missing until enough were seen
    update_coefficient  what a robust rule multiplies Delta_i with: 0 for who is left out. Its sum is 1, or less where
                        updates are clipped; missing for rules that take each coordinate by itself
"""

from __future__ import annotations

from collections.abc import Mapping

NORM, COSINE, NORM_Z, COEFFICIENT = "update_norm", "update_cosine", "update_norm_z", "update_coefficient"
KINDS = (NORM, COSINE, NORM_Z, COEFFICIENT)
# A modified z-score beyond this is an outlier (Iglewicz and Hoaglin 1993).
OUTLYING_Z = 3.5


def by_site(metrics: Mapping[str, float], kind: str) -> dict[str, float]:
    """One kind out of a round's metrics, {site: value}."""
    return {key.removeprefix(f"{kind}."): value for key, value in metrics.items() if key.startswith(f"{kind}.")}
