from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from client_agent.policy import Answer, Approvals, decide, in_words, parse_spec
from client_agent.settings import Policy
from protos import jobspec
from protos.digests import digest_of
from protos.errors import InvalidInput, NotFound
from tests.unit.client_agent import work_to_do

DIGEST = digest_of(b"the model")
OPEN = Policy(base_models=("minilm",), data_sets=("answers",), methods=("full",), max_epochs=2)


def recipe(**changes: Any) -> jobspec.JobSpec:
    fields: dict[str, Any] = {
        "name": "questions",
        "task": {"type": "classification", "labels": ["a", "b"]},
        "data": {"name": "answers"},
        "base_model": {"name": "minilm"},
        "local": {"epochs": 1},
        "rounds": 2,
    }
    return jobspec.parse({**fields, **changes})


def test_no_policy_means_that_nothing_runs() -> None:
    verdict = decide(None, recipe(), base_digest=DIGEST, data_rows=100)
    assert verdict.answer is Answer.DENY
    assert "no [policy]" in verdict.reason


def test_an_empty_policy_means_that_nothing_runs() -> None:
    assert decide(Policy(), recipe(), base_digest=DIGEST, data_rows=100).answer is Answer.DENY


def test_what_the_policy_names_is_allowed() -> None:
    assert decide(OPEN, recipe(), base_digest=DIGEST, data_rows=100).answer is Answer.ALLOW


@pytest.mark.parametrize(
    ("policy", "changes", "reason"),
    [
        ({"tasks": ()}, {}, "tasks does not name 'classification'"),
        ({"methods": ("lora",)}, {}, "methods does not name 'full'"),
        ({"base_models": ("other",)}, {}, "base_models names neither 'minilm' nor its digest"),
        ({"data_sets": ("other",)}, {}, "data_sets does not name 'answers'"),
        ({}, {"local": {"epochs": 2.5}}, "2.5 epochs a round are more than max_epochs = 2"),
        ({"min_rows": 101}, {}, "fewer rows than min_rows = 101"),
        ({}, {"local": {"steps": 10, "batch_size": 32}}, "10 steps are 3.2 epochs here, more than max_epochs = 2"),
    ],
)
def test_each_rule_refuses_with_its_reason(policy: dict[str, Any], changes: dict[str, Any], reason: str) -> None:
    verdict = decide(OPEN.model_copy(update=policy), recipe(**changes), base_digest=DIGEST, data_rows=100)
    assert verdict.answer is Answer.DENY
    assert reason in verdict.reason


def test_a_base_model_may_be_allowed_by_its_digest_whatever_it_is_called() -> None:
    policy = OPEN.model_copy(update={"base_models": (DIGEST,)})
    assert decide(policy, recipe(), base_digest=DIGEST, data_rows=100).answer is Answer.ALLOW
    assert decide(policy, recipe(), base_digest="f" * 64, data_rows=100).answer is Answer.DENY


def test_a_star_allows_everything_of_its_kind() -> None:
    policy = Policy(base_models=("*",), data_sets=("*",), methods=("*",), tasks=("*",))
    assert decide(policy, recipe(), base_digest="", data_rows=100).answer is Answer.ALLOW
    assert decide(policy, work_to_do.spec(), base_digest="", data_rows=None).answer is Answer.ALLOW


def test_a_synthetic_task_must_be_named_although_it_reads_nothing() -> None:
    assert decide(OPEN, work_to_do.spec(), base_digest="", data_rows=None).answer is Answer.DENY


def test_the_rows_do_not_matter_to_a_task_that_reads_none() -> None:
    policy = OPEN.model_copy(update={"min_rows": 1000})
    assert decide(policy, recipe(), base_digest=DIGEST, data_rows=None).answer is Answer.ALLOW


def test_asking_comes_after_refusing() -> None:
    policy = OPEN.model_copy(update={"approval": "ask"})
    assert decide(policy, recipe(), base_digest=DIGEST, data_rows=100).answer is Answer.ASK
    assert decide(policy, recipe(local={"epochs": 9}), base_digest=DIGEST, data_rows=100).answer is Answer.DENY


def test_the_policy_is_told_in_words() -> None:
    assert "nothing will run here" in in_words(None)
    assert "names no base models" in in_words(Policy(methods=("*",), data_sets=("*",)))
    assert "base models: minilm; data sets: answers; at most 2 epochs a round" in in_words(OPEN)


def test_a_verdict_is_found_by_the_first_digits_of_the_hash(tmp_path: Path) -> None:
    approvals = Approvals(tmp_path)
    hashes = ["abcdef" + "0" * 58, "abcdef" + "1" * 58]
    for age, spec_hash in enumerate(hashes):
        approvals.ask("{}", spec_hash=spec_hash, job_name="questions", now_unix_seconds=age)
    assert [approval.verdict for approval in approvals.all()] == ["waiting", "waiting"]
    assert approvals.settle("abcdef1", approved=True).spec_hash == hashes[1]
    assert approvals.settle("abcdef0", approved=False).verdict == "denied"
    assert [approvals.verdict(spec_hash) for spec_hash in hashes] == ["denied", "approved"]
    with pytest.raises(InvalidInput, match="2 job specs begin with"):
        approvals.settle("abcdef", approved=True)
    with pytest.raises(NotFound):
        approvals.settle("123456", approved=True)


def test_a_spec_with_another_hash_than_its_own_is_refused() -> None:
    text = recipe().canonical_json
    assert parse_spec(text, spec_hash=digest_of(text.encode())) == recipe()
    with pytest.raises(InvalidInput, match="hash"):
        parse_spec(text, spec_hash=DIGEST)


def test_a_mentor_is_a_base_model_that_the_policy_has_to_name() -> None:
    spec = recipe(local={"epochs": 1, "mentor": {"base_model": {"name": "large"}}})

    def asked(policy: Policy, kind: str) -> str:
        found = decide(
            policy, spec, base_digest=DIGEST, data_rows=100, teacher=spec.beside(kind), teacher_digest="ab" * 32
        )
        return found.reason if found.answer is Answer.DENY else ""

    assert "base_models names neither 'large' nor its digest" in asked(OPEN, "train")
    assert not asked(OPEN, "evaluate"), "who evaluates needs no mentor"
    for name in ("large", "ab" * 32):
        assert not asked(OPEN.model_copy(update={"base_models": ("minilm", name)}), "train")


def test_distilling_has_to_be_named_and_has_data_and_epochs_of_its_own() -> None:
    how = {"teacher": {"name": "large"}, "data": "public", "teacher_epochs": 1.5}
    spec = recipe(distillation=how, local={"epochs": 9})
    allowed: dict[str, Any] = {
        "tasks": ("classification", "distill"), "base_models": ("minilm", "large"), "data_sets": ("public",),
        "max_epochs": 2.5,
    }  # fmt: skip

    def asked(**changes: Any) -> str:
        policy = OPEN.model_copy(update={**allowed, **changes})
        found = decide(
            policy, spec, base_digest=DIGEST, data_rows=100,
            distills=True, teacher=spec.beside("distill"), teacher_digest="ab" * 32,
        )  # fmt: skip
        return found.reason if found.answer is Answer.DENY else ""

    assert not asked(), "what sites train with does not matter to who distils"
    assert "tasks does not name 'distill'" in asked(tasks=("classification",))
    assert "data_sets does not name 'public'" in asked(data_sets=("answers",))
    assert "base_models names neither 'large' nor its digest" in asked(base_models=("minilm",))
    assert "2.5 epochs of distillation a round are more than max_epochs = 2.4" in asked(max_epochs=2.4)
    assert "data set 'public' has fewer rows than min_rows = 101" in asked(min_rows=101)
