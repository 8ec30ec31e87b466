"""What is said of a job's questions: the published figures of a model that was worse after 100 rounds than after 10."""

from __future__ import annotations

import pytest

from coordinator.benchmarks import lines, measured, parts
from protos.jobspec import Evaluation
from protos.v1.operator_pb2 import EvaluationView

EVALUATION = Evaluation(where=("house",), metric="medqa_accuracy", benchmarks=("medqa",))


def view(
    version: int, *, right: int, unparseable: int, of: int = 1273, site: str = "house", **more: float
) -> EvaluationView:
    shares = {"questions": of, "accuracy": right / of, "unparseable": unparseable / of, **more}
    metrics = {f"medqa_{name}": float(value) for name, value in shares.items()}
    return EvaluationView(version=version, site=site, split="validation", examples=of, metrics=metrics)


TEN = view(10, right=783, unparseable=3, gained=60, lost=40)
HUNDRED = view(100, right=663, unparseable=153)


def test_a_fall_is_parted_into_format_and_knowledge() -> None:
    both = measured([TEN, HUNDRED], benchmark="medqa")
    drift, knowledge = parts(both[10], both[100])
    assert drift + knowledge == pytest.approx((663 - 783) / 1273)
    assert drift == pytest.approx(-(150 / 1273) * (783 / 1270 + 663 / 1120) / 2)


def test_the_published_fall_reads_as_two_sentences() -> None:
    said = lines([TEN, HUNDRED], evaluation=EVALUATION, version=10, house={"house"})
    assert said == [
        "medqa, version 10: 61.51 % of 1273 answers are right (95 % interval 58.80 to 64.14 %); since version 0 it "
        "gained 60 and lost 40 (McNemar's p = 0.057).",
        "medqa, version 100: 52.08 %, 9.43 points fewer. Format makes 7.12 of them: 12.02 % of the answers are none of "
        "the options, 0.24 % before. Knowledge makes 2.31: of the others 59.20 % are right, 61.65 % before.",
    ]


def test_no_fall_is_not_explained() -> None:
    better = view(100, right=800, unparseable=153)
    assert len(lines([TEN, better], evaluation=EVALUATION, version=10, house={"house"})) == 1
    assert len(lines([TEN, HUNDRED], evaluation=EVALUATION, version=100, house={"house"})) == 1


def test_a_model_that_says_nothing_readable_has_lost_its_format_only() -> None:
    silent = measured([view(2, right=0, unparseable=50, of=50)], benchmark="medqa")[2]
    before = measured([view(1, right=25, unparseable=0, of=50)], benchmark="medqa")[1]
    assert parts(before, silent) == (pytest.approx(-0.5), 0.0)


def test_the_answers_of_several_sites_are_counted_together() -> None:
    evaluation = EVALUATION.model_copy(update={"where": ("sites",)})
    views = [view(1, right=3, unparseable=0, of=4, site="a"), view(1, right=1, unparseable=1, of=6, site="b")]
    (said,) = lines(views, evaluation=evaluation, version=1, house=set())
    assert "40.00 % of 10 answers are right" in said


def test_only_the_house_agent_counts_where_it_evaluates() -> None:
    views = [TEN, view(10, right=1, unparseable=0, of=1, site="gard")]
    (said,) = lines(views, evaluation=EVALUATION, version=10, house={"house"})
    assert "of 1273 answers" in said


def test_a_job_without_questions_has_nothing_to_say() -> None:
    assert lines([TEN], evaluation=Evaluation(), version=10, house=set()) == []
    assert lines([TEN], evaluation=EVALUATION, version=None, house=set()) == []
