from __future__ import annotations

import json
from typing import Any

import pytest

from deploy.demo import report
from tests.unit.deploy.demo.conftest import SPEC


def test_the_report_is_json_and_holds_what_is_judged(made: dict[str, Any]):
    again = json.loads(json.dumps(made))
    assert again["federated_accuracy"] == 0.875
    assert again["pooled_accuracy"] == 0.9
    assert again["alone_accuracy"] == {"alfa": 0.6, "bravo": 0.7}
    assert again["best_alone"] == "bravo"
    assert again["coordinator_peak_rss_bytes"] == 200_000_000
    for entry in again["rounds"]:
        assert {"number", "accuracy", "seconds", "bytes_up", "bytes_down"} <= set(entry)


def test_the_federated_accuracy_is_of_the_best_round_on_test_rows(made: dict[str, Any]):
    assert (made["best_round"], made["federated_accuracy"]) == (1, 0.875)


def test_accuracy_by_round_is_the_house_agents_on_validation_rows(made: dict[str, Any]):
    assert [entry["accuracy"] for entry in made["rounds"]] == [0.9, 0.8]
    assert made["accuracy_before_training"] == 0.5


def test_only_updates_that_counted_are_averaged(made: dict[str, Any]):
    first = made["rounds"][0]
    assert first["updates"] == 2
    assert first["train_loss"] == pytest.approx((30 * 1.0 + 10 * 2.0) / 40)
    assert first["site_seconds"]["train"] == pytest.approx(3.0)


def test_a_best_round_without_test_rows_is_an_error_not_a_gap(shown: dict[str, Any]):
    shown["evaluations"] = [view for view in shown["evaluations"] if view["split"] == "validation"]
    with pytest.raises(KeyError, match="version 1 on test data"):
        report.build(
            shown, spec=SPEC, baselines={"pooled": {"accuracy": 1.0}, "alfa": {"accuracy": 1.0}}, holds={},
            exported_accuracy=1.0, recall={}, memory={}, seconds={}, commands=[], usage="",
        )  # fmt: skip
