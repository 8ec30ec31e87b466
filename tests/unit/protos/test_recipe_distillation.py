"""[distillation]: what goes with it, and what is refused before a job begins."""

from __future__ import annotations

from typing import Any

import pytest

from protos import jobspec
from protos.errors import RecipeInvalid

TEACHER = {"teacher": {"name": "bert-large"}}


def recipe(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "name": "questions",
        "task": {"type": "classification", "labels": ["a", "b"]},
        "data": {"name": "answers"},
        "base_model": {"name": "minilm"},
        "local": {"epochs": 1},
        "rounds": 4,
        "distillation": TEACHER,
    }
    return {**fields, **changes}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"distillation": {}}, "distillation with labels needs a teacher"),
        ({"distillation": {**TEACHER, "labels": False}}, "labels = false learns from the sites' updates"),
        ({"distillation": {"teacher": {"name": "large", "dtype": "bfloat16"}}}, "no quantization and dtype float32"),
        ({"distillation": {"teacher": {"name": "large", "quantization": "nf4"}}}, "no quantization and dtype float32"),
        ({"local": {"epochs": 1, "warm_head": {"learning_rate": 0.1}}}, "so it takes no warm_head"),
        ({"distillation": {**TEACHER, "epochs": 0}}, "distillation.epochs must be greater than 0"),
        ({"aggregation": {"rule": "flora"}, "method": {"type": "lora"}}, "rule flora decides what may change"),
        ({"encoding": {"down": "int8"}}, "down must be raw"),
        ({"distillation": {"labels": False}, "encoding": {"up": "int8"}}, "up must be raw"),
        (
            {"distillation": {"labels": False}, "aggregation": {"rule": "svd"}, "method": {"type": "lora"}},
            "takes the mean of all sites' logits",
        ),
        (
            {"task": {"type": "causal-lm"}, "evaluation": {"metric": "loss"}},
            "distillation is for classification",
        ),
    ],
)
def test_a_distillation_that_cannot_be_is_refused_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeInvalid) as refused:
        jobspec.parse(recipe(**changes))
    assert sentence in str(refused.value)


def test_a_synthetic_job_is_distilled_without_teacher_and_data() -> None:
    fields = {"name": "j", "task": {"type": "synthetic"}, "local": {"steps": 1}, "rounds": 1}
    assert jobspec.parse({**fields, "distillation": {}}).proxy_data == ""
    with pytest.raises(RecipeInvalid, match="a synthetic task has neither teacher nor data"):
        jobspec.parse({**fields, "distillation": TEACHER})


def test_every_nth_round_is_distilled_and_never_version_0() -> None:
    spec = jobspec.parse(recipe(distillation={**TEACHER, "every": 2}))
    assert [number for number in range(5) if spec.is_distilled(number)] == [2, 4]
    plain = jobspec.parse(recipe(distillation=None))
    assert not any(plain.is_distilled(number) for number in range(5))


def test_it_learns_from_the_jobs_own_data_set_unless_another_is_named() -> None:
    assert jobspec.parse(recipe()).proxy_data == "answers"
    assert jobspec.parse(recipe(distillation={**TEACHER, "data": "public"})).proxy_data == "public"
