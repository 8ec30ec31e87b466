"""What is said of each site's update: its length, its direction, and how unusual its length is."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.aggregation.anomalies import FEWEST_POOLED, figures
from protos.update_figures import COEFFICIENT, COSINE, NORM, NORM_Z, OUTLYING_Z, by_site

SITES = ("alfa", "bravo", "charlie", "delta")


def test_length_and_direction_are_those_of_the_vectors() -> None:
    delta = np.random.default_rng(1).standard_normal((4, 30))
    found = figures(delta @ delta.T, sites=SITES, coefficients=np.array([1.0, 0.0, 0.0, 0.0]), history=())
    for place, site in enumerate(SITES):
        directions = delta / np.linalg.norm(delta, axis=1, keepdims=True)
        others = np.delete(directions, place, axis=0).mean(axis=0)
        cosine = delta[place] @ others / np.linalg.norm(delta[place]) / np.linalg.norm(others)
        assert by_site(found, NORM)[site] == pytest.approx(np.linalg.norm(delta[place]))
        assert by_site(found, COSINE)[site] == pytest.approx(cosine)
    assert by_site(found, COEFFICIENT) == {"alfa": 1.0, "bravo": 0.0, "charlie": 0.0, "delta": 0.0}


def test_a_long_update_against_all_others_does_not_make_them_look_wrong() -> None:
    delta = np.random.default_rng(1).standard_normal((5, 30)) * 0.1 + 1.0
    delta[2] *= -50
    cosines = by_site(figures(delta @ delta.T, sites="abcde", coefficients=None, history=()), COSINE)
    assert [site for site, cosine in cosines.items() if cosine < 0] == ["c"]


def test_what_has_no_direction_is_given_none() -> None:
    assert by_site(figures(np.zeros((2, 2)), sites=SITES[:2], coefficients=None, history=()), COSINE) == {}
    assert set(figures(np.eye(1), sites=SITES[:1], coefficients=None, history=())) == {"update_norm.alfa"}


def test_an_unusual_length_shows_once_enough_rounds_were_seen_also_while_all_updates_shrink() -> None:
    rng = np.random.default_rng(2)
    history: list[dict[str, float]] = []
    for number in range(6):
        lengths = 0.5**number * np.exp(0.1 * rng.standard_normal(4))
        if number >= 3:
            lengths[2] *= 10
        found = figures(np.diag(lengths**2), sites=SITES, coefficients=None, history=history)
        z = by_site(found, NORM_Z)
        assert bool(z) == (4 * (number + 1) >= FEWEST_POOLED)
        if number >= 3:
            assert z["charlie"] > OUTLYING_Z
            assert all(abs(value) < OUTLYING_Z for site, value in z.items() if site != "charlie")
        history.append(by_site(found, NORM))


def test_one_that_is_a_little_longer_than_equal_ones_is_no_outlier() -> None:
    lengths = dict.fromkeys(SITES, 1.0)
    for length, outlying in ((1.3, False), (1.5, True)):
        found = figures(np.diag([1.0, 1.0, 1.0, length**2]), sites=SITES, coefficients=None, history=[lengths] * 5)
        assert (abs(by_site(found, NORM_Z)["delta"]) > OUTLYING_Z) == outlying
