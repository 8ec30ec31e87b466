from __future__ import annotations

from client_agent.training.data import Rows
from deploy.demo import exported
from deploy.demo.baselines import pooled


def rows(*labels: int, skipped: int = 0) -> Rows:
    return Rows([f"text {number}" for number in labels], list(labels), ("cause", "cure", "cost"), skipped)


def test_pooled_rows_are_all_rows_in_the_order_of_the_sites():
    together = pooled([rows(0, 1, skipped=2), rows(1, skipped=1)])
    assert together.labels == [0, 1, 1]
    assert together.texts == ["text 0", "text 1", "text 1"]
    assert (together.label_names, together.skipped) == (("cause", "cure", "cost"), 3)


def test_accuracy_counts_right_answers():
    assert exported.accuracy(rows(0, 0, 1, 1), ["cause", "cure", "cure", "cost"]) == 0.5


def test_recall_leaves_out_labels_that_nobody_asked_for():
    found = exported.recall_by_label(rows(0, 0, 1), ["cause", "cure", "cure"])
    assert found == {"cause": 0.5, "cure": 1.0}
