"""A small random Llama answers questions: as transformers would, alone or in a batch, and kept for later versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from client_agent.settings import DataSet
from client_agent.taskdir import UPDATE, TaskResult
from client_agent.training import benchmarks
from client_agent.training.benchmarks import Reply, measure, read_replies, reply, write_replies
from client_agent.training.model import Model
from client_agent.training.questions import Question
from client_agent.training.small_llama import Pretraining, Sizes, make
from client_agent.training.warm import Warm
from protos.errors import InvalidInput, SiteConfigInvalid
from protos.jobspec import Local
from protos.metrics import METRICS, check_numbers
from tests.unit.client_agent.training.conftest import Site, causal_recipe

LOCAL = Local(steps=1)
WORDS = ["the", "patient", "has", "been", "given", "some", "more", "of", "it", "since", "monday", "yes", "no"]
QUESTIONS = [
    Question(" ".join(WORDS[start : start + length]) + "\n", options, options[start % len(options)])
    for start, length, options in [
        (0, 3, ("A", "B", "C", "D")),
        (2, 12, ("A", "B", "C", "D")),
        (5, 5, ("yes", "no", "maybe")),
        (1, 9, ("yes", "no", "maybe")),
        (7, 2, ("A", "B")),
    ]
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory = tmp_path_factory.mktemp("llama")
    sizes = Sizes(vocabulary=300, hidden=32, layers=2, positions=64)
    make(directory, texts=[" ".join(WORDS)] * 4, sizes=sizes, pretraining=Pretraining(), seed=3)
    network = AutoModelForCausalLM.from_pretrained(directory)
    # Random weights of the usual size repeat the last token whatever came before.
    with torch.no_grad():
        for parameter in network.model.layers.parameters():
            parameter.mul_(12 if parameter.ndim > 1 else 1)
    return Model(network, AutoTokenizer.from_pretrained(directory), torch.device("cpu"), {}, {})


def answers(model: Model, questions: list[Question], *, max_new_tokens: int | None = 6) -> list[Reply]:
    return reply(model, questions, local=LOCAL, max_new_tokens=max_new_tokens, on_rows=lambda done, total: None)


def test_generation_is_that_of_transformers_one_by_one(model: Model) -> None:
    written = []
    for question in QUESTIONS:
        ids = model.tokenizer(question.prompt, return_tensors="pt")["input_ids"]
        made = model.network.generate(ids, max_new_tokens=6, do_sample=False)  # type: ignore[operator]
        written.append(model.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    assert len(set(written)) > 2, "a model that always says the same proves nothing"
    assert [each.output for each in answers(model, QUESTIONS)] == written


def test_a_batch_answers_as_its_questions_alone(model: Model) -> None:
    assert answers(model, QUESTIONS) == [answers(model, [question])[0] for question in QUESTIONS]


def test_the_likeliest_option_is_that_of_a_computation_by_hand(model: Model) -> None:
    expected = []
    lengths = set()
    for question in QUESTIONS:
        before = model.tokenizer(question.prompt)["input_ids"]
        sums = {}
        for option in question.options:
            ids = torch.tensor([model.tokenizer(question.prompt + option)["input_ids"]])
            lengths.add(ids.shape[1] - len(before))
            with torch.no_grad():
                chances = model.network(ids).logits[0].double().log_softmax(dim=-1)
            places = range(len(before), ids.shape[1])
            sums[option] = sum(float(chances[place - 1, ids[0, place]]) for place in places)
        expected.append(max(sums, key=sums.__getitem__))
    assert len(lengths) > 1, "options of one token and of several are both to be tried"
    assert [each.likeliest for each in answers(model, QUESTIONS)] == expected


def test_of_a_prompt_that_is_too_long_the_end_is_kept(model: Model) -> None:
    long = Question("well " * 100 + QUESTIONS[1].prompt, ("A", "B"), "A")
    end = model.tokenizer(long.prompt)["input_ids"][-58:]
    made = model.network.generate(torch.tensor([end]), max_new_tokens=6, do_sample=False)  # type: ignore[operator]
    assert answers(model, [long])[0].output == model.tokenizer.decode(made[0, 58:], skip_special_tokens=True)


def test_an_answer_that_fills_the_model_leaves_no_room_for_a_question(model: Model) -> None:
    with pytest.raises(InvalidInput, match="An answer of 64 tokens does not fit into the model's 64 positions"):
        answers(model, QUESTIONS, max_new_tokens=64)


def test_an_answer_may_be_as_long_as_the_longest_option_where_the_recipe_does_not_say(model: Model) -> None:
    def length(text: str) -> int:
        return len(model.tokenizer(text)["input_ids"])

    asked = [(question.prompt, option) for question in QUESTIONS for option in question.options]
    longest = max(length(prompt + option) - length(prompt) for prompt, option in asked)
    assert 1 < longest < 6
    found = answers(model, QUESTIONS, max_new_tokens=None)
    assert found == answers(model, QUESTIONS, max_new_tokens=longest) != answers(model, QUESTIONS)


def test_prompts_are_tokenised_once_for_all_versions(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [Question("the patient has\n", ("A", "B"), "B")]
    first = answers(model, questions)
    # Now nothing can be tokenised any more.
    monkeypatch.delattr(benchmarks, "boundary_ids")
    assert answers(model, questions) == first


def test_progress_is_told_and_may_stop_the_asking(model: Model) -> None:
    told: list[tuple[int, int]] = []
    reply(model, QUESTIONS, local=LOCAL, max_new_tokens=1, on_rows=lambda done, total: told.append((done, total)))
    assert told == [(0, 5), (5, 5)]

    def stop(done: int, total: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        reply(model, QUESTIONS, local=LOCAL, max_new_tokens=1, on_rows=stop)


def test_the_metrics_are_counted_from_the_replies() -> None:
    first = [Reply("A", "A", "A"), Reply("B", "A", "B"), Reply("C", "The", "C"), Reply("D", "D.", "A")]
    later = [Reply("A", "B", "A"), Reply("B", "B", "B"), Reply("C", "C", "C"), Reply("D", "D", "A")]
    found = measure("medqa", later, first=first)
    assert found == {
        "medqa_questions": 4.0,
        "medqa_accuracy": 0.75,
        "medqa_unparseable": 0.0,
        "medqa_parseable_accuracy": 0.75,
        "medqa_exact_format": 1.0,
        "medqa_option_accuracy": 0.75,
        "medqa_gained": 2.0,
        "medqa_lost": 1.0,
    }
    assert measure("medqa", first, first=first)["medqa_gained"] == 0.0


def test_other_questions_than_those_to_version_0_are_not_compared() -> None:
    first, later = [Reply("A", "A", "A")], [Reply("B", "A", "B")]
    assert "medqa_gained" not in measure("medqa", later, first=first)
    assert "medqa_gained" not in measure("medqa", later, first=None)


def test_replies_are_kept_as_they_are(tmp_path: Path) -> None:
    replies = [Reply("yes", "Yes\nit\u2028is\u00e9", "no"), Reply("no", "", "no")]
    write_replies(replies, path=tmp_path / "replies.jsonl")
    assert read_replies(tmp_path / "replies.jsonl") == replies
    assert [path.name for path in tmp_path.iterdir()] == ["replies.jsonl"]
    assert read_replies(tmp_path / "none.jsonl") is None


def asking(**evaluation: Any) -> dict[str, Any]:
    benchmarks = {"benchmarks": ["medqa", "pubmedqa"], "max_new_tokens": 2, "where": ["house"], "metric": "loss"}
    return teaching(evaluation={**benchmarks, **evaluation})


def teaching(**changes: Any) -> dict[str, Any]:
    return causal_recipe(task={"type": "causal-lm", "max_length": 160}, **changes)


@pytest.fixture
def tables(tmp_path: Path) -> dict[str, Any]:
    """What the daemon gives the trainer: both benchmarks' tables."""
    found = {}
    for name, options in (("medqa", ["a cough", "a fever", "pain"]), ("pubmedqa", ["yes", "no", "maybe"])):
        rows = [{"question": f"What has {word}?", "options": options, "answer": len(word) % 3} for word in WORDS]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found[name] = DataSet(path=str(path), question="question").model_dump(mode="json")
    return found


def version_0(site: Site) -> Path:
    directory, _ = site.run("init", site.task("init", recipe=asking()))
    return directory / UPDATE


def evaluated(site: Site, *, recipe: dict[str, Any], model: Path, version: int = 0, **changes: Any) -> TaskResult:
    _, result = site.run("evaluate", site.task("evaluate", recipe=recipe, model=model, round=version, **changes))
    return result


def test_a_version_is_measured_on_rows_and_on_questions(teaching_site: Site, tables: dict[str, Any]) -> None:
    state = teaching_site.directory / "jobs" / "job-1"
    model = version_0(teaching_site)
    result = evaluated(teaching_site, recipe=asking(), model=model, benchmarks=tables, state_directory=str(state))
    assert {"loss", "perplexity", "medqa_accuracy", "pubmedqa_option_accuracy"} <= result.metrics.keys()
    assert result.metrics["medqa_questions"] == result.metrics["pubmedqa_questions"] == len(WORDS)
    assert result.metrics["medqa_gained"] == result.metrics["medqa_lost"] == 0
    assert result.examples > 0
    check_numbers(result.metrics, allowed=METRICS)
    assert sorted(path.name for path in state.iterdir()) == [
        "medqa-validation-version-0.jsonl",
        "pubmedqa-validation-version-0.jsonl",
    ]
    kept = [json.loads(line) for line in (state / "medqa-validation-version-0.jsonl").read_text().splitlines()]
    assert [row["gold"] for row in kept] == ["ABC"[len(word) % 3] for word in WORDS]


def test_a_later_version_is_compared_with_version_0(teaching_site: Site, tables: dict[str, Any]) -> None:
    state = teaching_site.directory / "jobs" / "job-1"
    model = version_0(teaching_site)
    told = {"benchmarks": tables, "state_directory": str(state)}
    evaluated(teaching_site, recipe=asking(), model=model, **told)
    golds = [json.loads(line)["gold"] for line in (state / "medqa-validation-version-0.jsonl").read_text().splitlines()]
    # As if version 0 had known it all.
    write_replies([Reply(gold, gold, gold) for gold in golds], path=state / "medqa-validation-version-0.jsonl")
    result = evaluated(teaching_site, recipe=asking(), model=model, version=1, **told)
    wrong = (1 - result.metrics["medqa_accuracy"]) * len(WORDS)
    assert result.metrics["medqa_lost"] == pytest.approx(wrong)
    assert result.metrics["medqa_gained"] == 0


def test_a_job_that_asks_nothing_needs_no_questions(teaching_site: Site) -> None:
    result = evaluated(teaching_site, recipe=teaching(), model=version_0(teaching_site))
    assert not [name for name in result.metrics if "qa" in name]


def test_the_only_one_who_evaluates_must_have_every_benchmark(teaching_site: Site, tables: dict[str, Any]) -> None:
    del tables["medqa"]
    with pytest.raises(SiteConfigInvalid, match="no data set named 'medqa'"):
        evaluated(teaching_site, recipe=asking(), model=version_0(teaching_site), benchmarks=tables)


def test_one_of_several_measures_what_it_has(teaching_site: Site) -> None:
    recipe = asking(where=["sites", "house"])
    result = evaluated(teaching_site, recipe=recipe, model=version_0(teaching_site))
    assert "loss" in result.metrics
    assert "medqa_accuracy" not in result.metrics


def test_an_agent_without_rows_of_the_job_asks_only(teaching_site: Site, tables: dict[str, Any]) -> None:
    model = version_0(teaching_site)
    result = evaluated(teaching_site, recipe=asking(), model=model, benchmarks=tables, data_set=None)
    assert "loss" not in result.metrics
    assert result.examples == 2 * len(WORDS)


def test_an_agent_with_neither_rows_nor_questions_says_so(teaching_site: Site) -> None:
    recipe = asking(where=["sites", "house"])
    with pytest.raises(SiteConfigInvalid, match="nothing to measure the model on for validation"):
        evaluated(teaching_site, recipe=recipe, model=version_0(teaching_site), data_set=None)


def test_a_test_asks_only_what_was_not_asked_before(teaching_site: Site, tables: dict[str, Any]) -> None:
    tables["medqa"]["test"] = tables["medqa"]["path"]
    result = evaluated(teaching_site, recipe=asking(), model=version_0(teaching_site), benchmarks=tables, split="test")
    assert "medqa_accuracy" in result.metrics
    assert "pubmedqa_accuracy" not in result.metrics


def test_a_warm_trainer_answers_as_a_new_one(teaching_site: Site, tables: dict[str, Any]) -> None:
    model = version_0(teaching_site)
    task = teaching_site.task("evaluate", recipe=asking(), model=model, benchmarks=tables)
    _, warm = teaching_site.run("warm", task)
    _, cold = teaching_site.run("cold", task, warm=Warm())
    assert warm.metrics == cold.metrics
