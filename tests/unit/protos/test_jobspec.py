"""A recipe is checked whole: every contradiction has its sentence, and what both sides derive from it never differs."""

from __future__ import annotations

import copy
import json
import math
import tomllib
from typing import Any

import pytest

from protos import jobspec
from protos.errors import RecipeInvalid
from protos.metrics import METRICS

RECIPE = """
name = "question-kinds"
rounds = 5
seed = 7

[task]
type = "classification"
labels = ["treatment", "symptoms", "causes"]

[data]
name = "questions"

[base_model]
name = "minilm"

[local]
steps = 8
learning_rate = 2e-4
"""


LORA = {"method": {"type": "lora"}}
CAUSAL = {"type": "causal-lm"}
MIXED = {"type": "lora", "rank": 8, "ranks": {"oslo": 4}}
SCAFFOLD = {"local__optimizer": "sgd", "aggregation__rule": "scaffold"}


def recipe(**changes: Any) -> dict[str, Any]:
    """The recipe above; `local__steps=3` sets local.steps, None takes a key away."""
    fields: dict[str, Any] = copy.deepcopy(tomllib.loads(RECIPE))
    for path, value in changes.items():
        *tables, key = path.split("__")
        place = fields
        for table in tables:
            place = place.setdefault(table, {})
        if value is None:
            del place[key]
        else:
            place[key] = value
    return fields


def refusal(**changes: Any) -> RecipeInvalid:
    with pytest.raises(RecipeInvalid) as caught:
        jobspec.parse(recipe(**changes))
    return caught.value


def test_a_short_recipe_is_enough() -> None:
    spec = jobspec.parse(recipe())
    assert (spec.method.type, spec.cohort.sites, spec.aggregation.rule) == ("full", "all", "mean")
    assert isinstance(spec.task, jobspec.Classification) and spec.task.labels == ("treatment", "symptoms", "causes")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"local__epochs": 1.0}, "give either epochs or steps"),
        ({"local__steps": None}, "give either epochs or steps"),
        ({"local__momentum": 0.9}, "momentum goes with optimizer = 'sgd'"),
        ({"local__micro_batch_size": 64}, "micro_batch_size is larger than batch_size"),
        ({"task__labels": ["a", "b", "a"]}, "labels must differ"),
        ({"cohort__sites": ["a", "a"]}, "a site is named twice"),
        ({"cohort__sites": ["a", "b"], "cohort__quorum": 3}, "quorum is 3, but only 2 sites are named"),
        ({"cohort__sites": ["a", "b"], "cohort__size": 3}, "size is 3, but only 2 sites are named"),
        ({"cohort__size": 2, "cohort__quorum": 3}, "quorum is 3, but only 2 sites are drawn"),
        ({"evaluation__where": ["house", "house"]}, "names a place twice"),
        ({"evaluation__metric": "beauty"}, "metric must be one of accuracy"),
        ({"evaluation__metric": "perplexity"}, "matthews_correlation for a classification task"),
        ({"evaluation__where": [], "evaluation__early_stop": 3}, "early_stop needs an evaluation"),
        ({"cohort__size": 3, "aggregation__max_share": 0.2}, "max_share 0.2 cannot hold for 3 sites"),
        ({"base_model": None}, "needs [base_model] and [data]"),
        ({"data": None}, "needs [base_model] and [data]"),
        ({"task": {"type": "synthetic"}}, "a synthetic task has neither base_model nor data"),
        ({"base_model__quantization": "nf4"}, "quantization freezes the base model, so it needs method lora"),
        ({"base_model__double_quantization": True}, "double_quantization goes with quantization nf4 or fp4"),
        ({"aggregation__rule": "svd"}, "rule svd combines pairs of LoRA factors, so it needs method lora"),
        ({"aggregation__rule": "fednova", "local__proximal": 0.1}, "so proximal must be 0"),
        ({"method": MIXED, "aggregation__rule": "fednova"}, "combines factors of one shape, so it takes no ranks"),
        ({"aggregation__rule": "scaffold"}, "needs optimizer = 'sgd' and momentum = 0"),
        ({**SCAFFOLD, "local__momentum": 0.9}, "needs optimizer = 'sgd' and momentum = 0"),
        ({**SCAFFOLD, "local__max_gradient_norm": 1.0}, "takes no max_gradient_norm"),
        ({**SCAFFOLD, "local__schedule": {"type": "linear", "over": "steps"}}, "one rate above 0 in each round"),
        ({**SCAFFOLD, "local__schedule": {"type": "linear", "final": 0.0}}, "one rate above 0 in each round"),
        ({**SCAFFOLD, "encoding__up": "int8"}, "needs up = raw and down = raw"),
        ({**SCAFFOLD, "cohort__size": 2}, "needs weights = 'equal'"),
        ({**SCAFFOLD, "distillation": {"labels": False}}, "so it takes no distillation"),
        (
            {"task": {"type": "synthetic"}, "data": None, "base_model": None, "aggregation__rule": "scaffold"},
            "corrects gradients, and a synthetic task has none",
        ),
        ({**LORA, "aggregation": {"rule": "flora", "server_optimizer": {"type": "fedadam"}}}, "no server_optimizer"),
        ({**LORA, "aggregation__rule": "svd", "encoding__up": "int8"}, "error_feedback must be false"),
        ({**LORA, "aggregation__rule": "svd", "encoding__down": "int8"}, "error_feedback must be false"),
        ({**LORA, "aggregation__rule": "fedex", "encoding__down": "int8"}, "down must be raw under [encoding]"),
        ({"method": {"type": "lora", "rank": 4, "ranks": {"oslo": 8}}}, "ranks gives oslo 8, more than rank = 4"),
        ({"evaluation__benchmarks": ["medqa"]}, "benchmarks are questions to a causal-lm"),
        ({"task": CAUSAL, "evaluation__metric": "medqa_accuracy"}, "benchmarks does not name medqa"),
        ({"task": {**CAUSAL, "template": {"prompt": "{instruction} {secret}"}}}, "not {secret}"),
        ({"task": {**CAUSAL, "template": {"prompt": "{instruction!r}"}}}, "fields are written plainly"),
        ({"task": {**CAUSAL, "template": {"prompt": "Answer:"}}}, "a template needs {instruction}"),
        ({"local__schedule": {"over": "steps", "one_based": True}}, "one_based counts rounds"),
        (
            {**LORA, "cohort__quorum": 5, "aggregation": {"rule": "svd", "robust": {"type": "krum"}}},
            "rule svd combines more than plain vectors, so robust must be none",
        ),
        (
            {"method": MIXED, "cohort__quorum": 3, "aggregation__robust": {"type": "median"}},
            "robust median compares whole updates, so ranks must give every site the same",
        ),
        ({"method": MIXED, "aggregation__report": True}, "report compares whole updates"),
        (
            {"cohort__quorum": 6, "aggregation__robust": {"type": "multi-krum", "byzantine": 2}},
            "quorum is 6, but robust multi-krum needs at least 7 updates",
        ),
        (
            {"cohort__quorum": 4, "aggregation__robust": {"type": "trimmed-mean", "trim": 2}},
            "quorum is 4, but robust trimmed-mean needs at least 5 updates",
        ),
        ({"aggregation__robust": {"type": "norm-bound"}}, "quorum is 1, but robust norm-bound needs at least 3"),
    ],
)
def test_each_contradiction_has_its_sentence(changes: dict[str, Any], sentence: str) -> None:
    assert sentence in str(refusal(**changes))


@pytest.mark.parametrize(
    ("changes", "path", "word"),
    [
        ({"learning_rate": 1}, "learning_rate", "not a known key"),
        ({"local__learning_rat": 1}, "local.learning_rat", "not a known key"),
        ({"task__lables": ["a", "b"], "task__labels": None}, "task.lables", "not a known key"),
        ({"rounds": None}, "rounds", "missing"),
        ({"rounds": 0}, "rounds", "1"),
        ({"rounds": "many"}, "rounds", "whole number"),
        ({"local__learning_rate": math.nan}, "local.learning_rate", "finite"),
        ({"task__type": "poetry"}, "task", "classification"),
        ({"task__labels": ["only"]}, "task.labels", "2"),
        ({"method": {"type": "lora", "rank": 0}}, "method.rank", "1"),
        ({"aggregation__server_optimizer": {"type": "fedadam", "beta1": 1.0}}, "server_optimizer.beta1", "1"),
        ({"cohort__sites": ["St Olav"]}, "cohort.sites", "lower-case"),
        ({"base_model__digest": "ab"}, "base_model.digest", "64"),
        ({"base_model__digest": "a" * 65}, "base_model.digest", "64"),
        ({"base_model__digest": "x" + "a" * 64}, "base_model.digest", "64"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_it_should_be(
    changes: dict[str, Any], path: str, word: str
) -> None:
    error = refusal(**changes)
    assert path in error.message and path in error.facts["path"]
    assert word in error.message
    assert "\n" not in error.message


def test_a_synthetic_task_measures_less() -> None:
    changes = {"task": {"type": "synthetic"}, "data": None, "base_model": None}
    for metric in ("accuracy", "loss"):
        assert jobspec.parse(recipe(**changes, evaluation__metric=metric)).evaluation.metric == metric
    error = refusal(**changes, evaluation__metric="macro_f1")
    assert "metric must be one of accuracy, loss for a synthetic task" in error.message
    assert error.facts["path"] == "evaluation.metric"


def test_whatever_a_task_measures_may_leave_a_site() -> None:
    for task in (jobspec.Classification, jobspec.CausalLm, jobspec.Synthetic):
        assert set(task.measures) <= METRICS


def test_the_hash_of_a_recipe_never_changes() -> None:
    """Approvals at sites are bound to it: a new field with a default must not change the hash of an old recipe."""
    assert jobspec.parse(recipe()).hash == "b84da1448e52c54f2c030ef57b6c5f2ccfedb1ed6bade8ea1913ef14adeb6a88"


def test_the_hash_does_not_depend_on_how_a_recipe_is_written() -> None:
    spec = jobspec.parse(recipe())
    backwards = dict(reversed(list(recipe().items())))
    assert jobspec.parse(backwards).hash == spec.hash
    assert jobspec.from_json(spec.canonical_json) == spec
    assert jobspec.from_json(spec.canonical_json).hash == spec.hash


def test_a_default_that_is_written_out_gives_the_same_hash() -> None:
    """A recipe's `alpha = 16` and the default 16 are the same number, also in the canonical text."""
    for method in ({"type": "full"}, {"type": "lora"}):
        spec = jobspec.parse(recipe(method=method))
        assert jobspec.from_json(spec.canonical_json).canonical_json == spec.canonical_json


def test_each_later_key_changes_the_hash_once_it_is_not_its_default() -> None:
    spec = jobspec.parse(recipe(method={"type": "lora"}))
    for (*tables, key), default in jobspec.LATER_KEYS:
        part: Any = spec
        for table in tables:
            part = getattr(part, table)
        value = part.model_dump(mode="json")[key]
        assert value == default, f"{key} has another default"
        assert f'"{key}":' not in spec.canonical_json
    changed = jobspec.parse(recipe(method={"type": "lora", "ranks": {"oslo": 4}}, encoding={"up": "int8"}))
    assert changed.hash != spec.hash
    assert jobspec.from_json(changed.canonical_json) == changed


def test_every_change_changes_the_hash() -> None:
    changed = [recipe(), recipe(seed=8), recipe(rounds=6), recipe(local__steps=9), recipe(task__labels=["b", "a"])]
    assert len({jobspec.parse(fields).hash for fields in changed}) == len(changed)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "null", "{}"])
def test_a_spec_that_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(RecipeInvalid):
        jobspec.from_json(text)


def test_seeds_are_fixed_for_ever() -> None:
    assert jobspec.task_seed(7, round_number=1, site="st-olav") == 6994372379854191306
    assert jobspec.task_seed(7, round_number=2, site="st-olav") == 16916682438006993


def test_no_two_rounds_or_sites_share_a_seed() -> None:
    seeds = {
        jobspec.task_seed(job_seed, round_number=number, site=site)
        for job_seed in (0, 1, 11)
        for number in range(1, 40)
        for site in ("a", "b", "1", "11")
    }
    assert len(seeds) == 3 * 39 * 4
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_a_constant_learning_rate_is_the_written_one_to_the_bit() -> None:
    spec = jobspec.parse(recipe())
    assert {spec.learning_rate_at(number) for number in range(1, 6)} == {2e-4}


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_last_round_trains_where_no_end_is_written(kind: str) -> None:
    spec = jobspec.parse(recipe(local__learning_rate=1.0, local__schedule={"type": kind}))
    assert spec.learning_rate_at(5) == pytest.approx(0.1, abs=1e-15)


def test_a_linear_schedule_falls_in_equal_steps_to_its_end() -> None:
    spec = jobspec.parse(recipe(local__learning_rate=1.0, local__schedule={"type": "linear", "final": 0.0}))
    assert [spec.learning_rate_at(number) for number in range(1, 6)] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_a_cosine_schedule_begins_at_the_start_and_ends_at_the_end() -> None:
    spec = jobspec.parse(recipe(local__learning_rate=1.0, local__schedule={"type": "cosine", "final": 0.1}))
    rates = [spec.learning_rate_at(number) for number in range(1, 6)]
    assert rates[0] == 1.0 and rates[-1] == pytest.approx(0.1, abs=1e-15)
    assert rates[2] == pytest.approx(0.55, abs=1e-15)
    assert rates == sorted(rates, reverse=True)


def test_a_schedule_over_steps_falls_within_a_round_and_goes_on_in_the_next() -> None:
    schedule = {"type": "linear", "final": 0.0, "over": "steps"}
    spec = jobspec.parse(recipe(rounds=2, local__learning_rate=1.0, local__schedule=schedule))
    assert [spec.learning_rate_at(1, part=part) for part in (0.0, 0.5, 1.0)] == [1.0, 0.75, 0.5]
    assert spec.learning_rate_at(2) == 0.5
    constant = jobspec.parse(recipe(rounds=2, local__learning_rate=1.0, local__schedule={"type": "linear"}))
    assert constant.learning_rate_at(1, part=0.9) == 1.0


def test_flowertunes_cosine_is_below_the_start_in_round_1_and_at_the_end_in_the_last() -> None:
    """lr_min + (lr_max - lr_min) (1 + cos(pi t / R)) / 2 for t = 1 .. R, with 5e-5 and 1e-6."""
    schedule = {"type": "cosine", "final": 0.02, "one_based": True}
    spec = jobspec.parse(recipe(rounds=10, local__learning_rate=5e-5, local__schedule=schedule))
    for number in range(1, 11):
        expected = 1e-6 + 0.5 * (5e-5 - 1e-6) * (1 + math.cos(math.pi * number / 10))
        assert spec.learning_rate_at(number) == pytest.approx(expected, rel=1e-12)


def test_a_site_of_lower_rank_has_the_same_scale() -> None:
    method = {"type": "lora", "rank": 16, "alpha": 8, "scale": "rslora", "ranks": {"oslo": 4}}
    spec = jobspec.parse(recipe(method=method))
    assert isinstance(spec.method, jobspec.Lora)
    assert (spec.rank_at("oslo"), spec.rank_at("bergen"), spec.method.factor) == (4, 16, 2.0)
    assert jobspec.parse(recipe(method={"type": "lora", "rank": 16, "alpha": 8})).method.factor == 0.5  # type: ignore[union-attr]


def test_a_job_of_one_round_trains_with_the_starting_rate() -> None:
    spec = jobspec.parse(recipe(rounds=1, local__schedule={"type": "cosine", "final": 0.0}))
    assert spec.learning_rate_at(1) == 2e-4


def test_the_first_and_the_last_version_are_always_evaluated() -> None:
    spec = jobspec.parse(recipe(rounds=7, evaluation={"every": 3}))
    assert [version for version in range(8) if spec.is_evaluated(version)] == [0, 3, 6, 7]
    nowhere = jobspec.parse(recipe(evaluation={"where": []}))
    assert not any(nowhere.is_evaluated(version) for version in range(6))


def test_a_spec_holds_only_what_json_holds() -> None:
    spec = jobspec.parse(recipe(method={"type": "lora", "targets": ["query"]}))
    assert json.loads(spec.canonical_json)["method"]["targets"] == ["query"]
