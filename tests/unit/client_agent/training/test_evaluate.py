"""Metrics of a classifier against figures worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from torch import Tensor, nn

from client_agent.taskdir import UPDATE
from client_agent.training.classification import Scores, TextClassification
from protos.errors import OutOfSpace
from tests.unit.client_agent.training.conftest import LABELS, Site


def scores_of(true: list[int], predicted: list[int], *, classes: int) -> dict[str, float]:
    scores = Scores(torch.zeros(classes, classes, dtype=torch.int64))
    logits = nn.functional.one_hot(torch.tensor(predicted), classes).float()
    scores.add(logits, torch.tensor(true), loss_sum=0.5 * len(true))
    return scores.metrics()


def test_two_classes_give_the_textbook_figures() -> None:
    # 3 true positives, 1 false negative, 2 false positives, 4 true negatives.
    found = scores_of([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1, 0, 0, 0, 0], classes=2)
    assert found["loss"] == 0.5
    assert found["accuracy"] == 0.7
    assert found["macro_f1"] == pytest.approx((2 * 3 / (2 * 3 + 1 + 2) + 2 * 4 / (2 * 4 + 1 + 2)) / 2)
    assert found["matthews_correlation"] == pytest.approx((3 * 4 - 2 * 1) / math.sqrt(5 * 4 * 6 * 5))


def test_a_label_that_nowhere_occurs_does_not_lower_the_mean_f1() -> None:
    assert scores_of([0, 1], [0, 1], classes=5)["macro_f1"] == 1.0


def test_a_constant_answer_has_no_correlation() -> None:
    found = scores_of([0, 1, 2], [1, 1, 1], classes=3)
    assert found["matthews_correlation"] == 0.0
    assert found["macro_f1"] == pytest.approx(0.5 / 3)


def test_several_batches_count_as_one(site: Site) -> None:
    true, predicted = [0, 1, 2, 2, 1, 0, 1], [0, 2, 2, 1, 1, 0, 0]
    scores = TextClassification(("a", "b", "c"), 8).new_scores()
    for start in range(0, 7, 3):
        logits = nn.functional.one_hot(torch.tensor(predicted[start : start + 3]), 3).float()
        scores.add(logits, torch.tensor(true[start : start + 3]), loss_sum=0.5 * len(logits))
    assert scores.metrics() == scores_of(true, predicted, classes=3)


def test_a_batch_that_does_not_fit_is_evaluated_in_parts(site: Site) -> None:
    init, _ = site.run("init", site.task("init", recipe=site.recipe()))
    task = site.task("evaluate", recipe=site.recipe(), model=init / UPDATE, split="test")
    _, whole = site.run("whole", task)
    (model,) = site.warm.models.values()
    limit = 5

    def little_memory(module: nn.Module, args: object, kwargs: dict[str, Tensor]) -> None:
        if len(kwargs["input_ids"]) > limit:
            raise torch.OutOfMemoryError("out of memory")

    model.network.register_forward_pre_hook(little_memory, with_kwargs=True)
    _, parts = site.run("parts", task)
    assert parts.metrics == pytest.approx(whole.metrics)
    assert parts.examples == whole.examples == 42
    assert site.stages[-1] == ("evaluating", 42, 42)
    limit = 0
    with pytest.raises(OutOfSpace, match="1 row"):
        site.run("none", task)


def test_what_was_said_of_each_row_is_kept_where_the_site_wants_it_and_nowhere_else(site: Site, tmp_path: Path) -> None:
    keeping = replace(site, data_set=site.data_set.model_copy(update={"predictions": str(tmp_path / "said")}))
    init, _ = site.run("init", site.task("init", recipe=site.recipe()))
    for split in ("validation", "test"):
        task = keeping.task("evaluate", recipe=site.recipe(), model=init / UPDATE, split=split)
        for name in ("once", "again"):
            _, measured = keeping.run(f"{split}-{name}", task)
        rows = pyarrow.parquet.read_table(tmp_path / "said" / f"job-1-version-1-{split}.parquet").to_pylist()
        assert [row["row"] for row in rows] == list(range(measured.examples))
        right = sum(row["right"] == row["predicted"] for row in rows)
        assert right / len(rows) == pytest.approx(measured.metrics["accuracy"])
        assert all(1 / len(LABELS) <= row["probability"] <= 1 for row in rows)
    assert len(list((tmp_path / "said").iterdir())) == 2
    _, silent = site.run("silent", site.task("evaluate", recipe=site.recipe(), model=init / UPDATE, split="test"))
    assert silent.metrics == measured.metrics and len(list((tmp_path / "said").iterdir())) == 2
