from __future__ import annotations

import yaml

from coordinator import model_card
from protos import jobspec
from protos.v1 import manifest_pb2, operator_pb2

FIELDS = {
    "name": "questions",
    "task": {"type": "classification", "labels": ["cause|effect", "symptom"], "max_length": 64},
    "data": {"name": "passages"},
    "base_model": {"name": "mini-lm", "layers": 3},
    "local": {"steps": 2},
    "rounds": 5,
}
FILES = {"model.safetensors": {"size": 12, "digest": "d" * 64}}


def spec_of(**changes: object) -> jobspec.JobSpec:
    return jobspec.parse({**FIELDS, **changes})


def model_of(spec: jobspec.JobSpec) -> operator_pb2.GetModelResponse:
    return operator_pb2.GetModelResponse(
        job_id="j1",
        version=4,
        model=manifest_pb2.BlobRef(digest="a" * 64, size=12),
        base_digest="b" * 64,
        spec_json=spec.canonical_json,
        contributors=[
            operator_pb2.UpdateView(site="gard", examples=120, steps=8),
            operator_pb2.UpdateView(site="ninds", examples=80, steps=8),
        ],
        evaluations=[
            operator_pb2.EvaluationView(
                version=4, site="house", split="test", examples=500, metrics={"accuracy": 0.91234, "loss": 0.3}
            ),
            operator_pb2.EvaluationView(version=4, site="gard", split="validation", examples=12, metrics={"loss": 0.4}),
            operator_pb2.EvaluationView(version=3, site="gard", split="validation", examples=12, metrics={"loss": 9.9}),
        ],
    )


def card_of(spec: jobspec.JobSpec) -> str:
    return model_card.card(model_of(spec), spec=spec, files=FILES)


def test_the_front_matter_is_yaml_that_the_hub_understands():
    _, front, _ = card_of(spec_of()).split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "base_model": "mini-lm",
        "tags": ["federated-learning", "silotune"],
    }


def test_the_card_says_who_took_part_with_how_many_rows():
    text = card_of(spec_of())
    assert "| gard | 120 | 8 |" in text
    assert "2 sites with 200 rows" in text


def test_the_card_reports_this_version_on_each_split():
    text = card_of(spec_of())
    assert "| split | at | rows | accuracy | loss |" in text
    assert "| test | house | 500 | 0.9123 | 0.3 |" in text
    assert "| validation | gard | 12 |  | 0.4 |" in text
    assert "9.9" not in text


def test_the_card_names_base_model_version_and_files_by_digest():
    text = card_of(spec_of())
    for digest in ("a" * 64, "b" * 64, "d" * 64, spec_of().hash):
        assert digest in text
    assert "mini-lm, its first 3 layers" in text


def test_the_card_says_what_the_model_is_not_for():
    assert "Not a medical device" in card_of(spec_of())


def test_a_version_without_contributors_or_evaluations_says_so():
    spec = spec_of()
    model = model_of(spec)
    del model.contributors[:]
    del model.evaluations[:]
    text = model_card.card(model, spec=spec, files=FILES)
    assert "Nobody yet" in text
    assert "This version was not evaluated." in text


def test_the_usage_of_a_whole_model_is_three_lines_of_python():
    usage = model_card.usage(spec_of(), directory="model")
    assert len(usage.splitlines()) == 3
    compile(usage, "usage", "exec")


def test_the_usage_of_an_adapter_begins_from_its_base_model():
    usage = model_card.usage(spec_of(method={"type": "lora"}), directory="model")
    compile(usage, "usage", "exec")
    assert 'from_pretrained("mini-lm"' in usage


TEACHING = {
    **FIELDS,
    "task": {"type": "causal-lm", "max_length": 256},
    "evaluation": {"metric": "medqa_accuracy", "benchmarks": ["medqa"]},
}


def asked(version: int, *, right: float, unparseable: float) -> operator_pb2.EvaluationView:
    shares = {"questions": 200.0, "accuracy": right, "unparseable": unparseable, "option_accuracy": 0.75}
    metrics = {"loss": 1.25, **{f"medqa_{name}": value for name, value in shares.items()}}
    return operator_pb2.EvaluationView(version=version, site="house", split="validation", examples=9, metrics=metrics)


def taught() -> str:
    spec = jobspec.parse(TEACHING)
    model = model_of(spec)
    del model.evaluations[:]
    model.evaluations.extend([asked(4, right=0.5, unparseable=0.0), asked(5, right=0.25, unparseable=0.5)])
    return model_card.card(model, spec=spec, files=FILES)


def test_the_card_of_a_language_model_speaks_of_prompts_and_not_of_labels():
    text = taught()
    _, front, _ = text.split("---\n", 2)
    assert yaml.safe_load(front)["pipeline_tag"] == "text-generation"
    assert "trained on prompts in one form, `alpaca`" in text
    assert "abels" not in text
    assert "task's head" not in text


def test_the_card_has_the_answers_to_questions_in_a_table_of_their_own():
    text = taught()
    assert "| split | at | rows | loss |" in text
    assert "| validation | house | medqa | 200 | 50.00 | 0.00 |  | 75.00 |" in text


def test_the_card_explains_why_later_rounds_were_worse():
    text = taught()
    assert "medqa, version 4: 50.00 % of 200 answers are right (95 % interval 43.14 to 56.86 %)." in text
    assert "medqa, version 5: 25.00 %, 25.00 points fewer. Format makes 25.00 of them" in text


def test_the_usage_of_a_language_model_generates():
    spec = jobspec.parse(TEACHING)
    adapter = jobspec.parse({**TEACHING, "method": {"type": "lora"}})
    for usage in (model_card.usage(spec, directory="m"), model_card.usage(adapter, directory="m")):
        compile(usage, "usage", "exec")
        assert 'pipeline("text-generation"' in usage
    assert 'from_pretrained("mini-lm")' in model_card.usage(adapter, directory="m")
