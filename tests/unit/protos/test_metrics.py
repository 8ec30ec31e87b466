"""Only numbers of a closed list leave a site."""

from __future__ import annotations

import math
import re

import pytest

from protos import metrics
from protos.errors import InvalidInput


def test_the_listed_numbers_pass_as_they_are() -> None:
    numbers = {"accuracy": 0.5, "loss": 1.25}
    assert metrics.check_numbers(numbers, allowed=metrics.METRICS) == numbers
    assert metrics.check_numbers({}, allowed=metrics.STAGE_SECONDS) == {}


def test_a_number_that_is_not_listed_is_refused_by_its_name() -> None:
    with pytest.raises(InvalidInput, match="'patient_age'"):
        metrics.check_numbers({"accuracy": 0.5, "patient_age": 71.0}, allowed=metrics.METRICS)
    with pytest.raises(InvalidInput):
        metrics.check_numbers({"accuracy": 0.5}, allowed=metrics.STAGE_SECONDS)


def test_a_long_name_is_cut_in_the_message() -> None:
    with pytest.raises(InvalidInput) as caught:
        metrics.check_numbers({"x" * 10_000: 1.0}, allowed=metrics.METRICS)
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_is_finite(value: float) -> None:
    with pytest.raises(InvalidInput, match="accuracy is not a finite number"):
        metrics.check_numbers({"accuracy": value}, allowed=metrics.METRICS)


def test_lower_is_better_only_for_listed_numbers() -> None:
    assert metrics.LOWER_IS_BETTER <= metrics.METRICS
    assert {name for name in metrics.METRICS if "loss" in name} <= metrics.LOWER_IS_BETTER


def test_every_name_can_be_a_label_of_prometheus() -> None:
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", name) for name in metrics.METRICS | metrics.STAGE_SECONDS)
