"""Instruction tuning: which tokens are learnt, that packing and accumulation change nothing, and that it learns."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertForMaskedLM,
)

from client_agent.settings import DataSet
from client_agent.taskdir import UPDATE
from client_agent.training.baseline import train_alone
from client_agent.training.causal import CausalLanguageModel, CausalTokens
from client_agent.training.data import Instruction, Instructions, read_instructions
from client_agent.training.kinds import loss_sum
from client_agent.training.model import Model, build
from client_agent.training.train import prepare, train
from client_agent.training.warm import Warm
from protos import jobspec
from protos.errors import InvalidInput, SiteConfigInvalid
from tests.unit.client_agent.training.conftest import Site, causal_recipe, make_instructions

CPU = torch.device("cpu")
METHODS = {
    "full": ({"type": "full"}, {}),
    "frozen embeddings": ({"type": "full", "freeze_embeddings": True}, {}),
    "lora": ({}, {}),
    "lora on bfloat16": ({}, {"dtype": "bfloat16"}),
    "nf4": ({}, {"quantization": "nf4", "double_quantization": True}),
    "fp4": ({}, {"quantization": "fp4"}),
    "int8": ({}, {"quantization": "int8"}),
}


def recipe_of(name: str, **changes: Any) -> dict[str, Any]:
    recipe = causal_recipe(**changes)
    method, base = METHODS[name]
    return {**recipe, "method": method or recipe["method"], "base_model": {"name": "tiny-llama", **base}}


def rows_of(count: int) -> Instructions:
    return Instructions([Instruction(**row) for row in make_instructions(rows=count)], 0)


def prepared(
    site: Site, *, rows: int = 20, packing: bool = False, attention: str = "auto", method: str = "full", **local: Any
) -> tuple[jobspec.JobSpec, CausalLanguageModel, Model, CausalTokens]:
    task = {"type": "causal-lm", "max_length": 160, "packing": packing}
    fields = {"steps": 3, "batch_size": 8, "optimizer": "sgd", "learning_rate": 0.1, **local}
    recipe = recipe_of(method, task=task, local=fields)
    recipe["base_model"]["attention"] = attention
    spec = jobspec.parse(recipe)
    assert isinstance(spec.task, jobspec.CausalLm)
    kind = CausalLanguageModel(spec.task)
    prepare(device=CPU, threads=1)
    model = build(spec, task=kind, base_model_path=site.base_model, device=CPU)
    return spec, kind, model, kind.encode(rows_of(rows), tokenizer=model.tokenizer, on_rows=lambda *_: None)


def gradients(kind: CausalLanguageModel, model: Model, tokens: CausalTokens) -> tuple[float, Tensor]:
    """The loss of all sequences in one batch, and its gradient."""
    rows = torch.arange(len(tokens))
    logits, classes = kind.predict(model.network, *tokens.batch(rows, device=CPU))
    loss = loss_sum(logits, classes) / tokens.target_count(rows)
    model.network.zero_grad()
    loss.backward()
    return loss.item(), torch.cat([p.grad.reshape(-1) for p in model.trainable if p.grad is not None])


def weights(model: Model) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in model.federated.values()])


def trained(site: Site, **local: Any) -> tuple[Tensor, float]:
    spec, kind, model, tokens = prepared(site, **local)
    loss = train(
        model, tokens=tokens, task=kind, local=spec.local, steps=3,
        learning_rate_at=lambda step: spec.local.learning_rate, seed=5, on_step=lambda *_: None,
    )  # fmt: skip
    return weights(model), loss


def test_the_loss_is_that_of_transformers_on_the_completions_alone(teaching_site: Site) -> None:
    """With the whole logits, an attention mask, and -100 wherever nothing is learnt."""
    _, kind, model, tokens = prepared(teaching_site)
    rows = torch.arange(len(tokens))
    inputs, _ = tokens.batch(rows, device=CPU)
    columns = torch.arange(inputs["input_ids"].shape[1])
    labels = torch.full_like(inputs["input_ids"], -100)
    for row in rows.tolist():
        start, end = tokens.starts[row : row + 2].tolist()
        learnt = tokens.learnt[start:end].nonzero().squeeze(1)
        labels[row, learnt] = tokens.ids[start:end][learnt].long()
    mask = (columns < tokens.lengths[:, None]).long()
    with torch.no_grad():
        theirs = model.network(input_ids=inputs["input_ids"], attention_mask=mask, labels=labels).loss
    ours, _ = gradients(kind, model, tokens)
    assert ours == pytest.approx(float(theirs), rel=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_have_the_loss_and_the_gradients_of_rows_apart(teaching_site: Site, attention: str) -> None:
    _, kind, model, apart = prepared(teaching_site, attention=attention)
    _, packing, _, packed = prepared(teaching_site, attention=attention, packing=True)
    assert len(packed) < len(apart)
    assert (packed.examples, int(packed.learnt.sum())) == (20, int(apart.learnt.sum()))
    assert max(packed.lengths) <= 160
    loss, gradient = gradients(kind, model, apart)
    packed_loss, packed_gradient = gradients(packing, model, packed)
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(packed_gradient, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_accumulated_gradients_are_those_of_the_mean_over_all_tokens(
    teaching_site: Site, micro_batch_size: int
) -> None:
    """Rows differ in their completions' lengths, and the last batch of the twenty rows is short."""
    whole, whole_loss = trained(teaching_site)
    parts, parts_loss = trained(teaching_site, micro_batch_size=micro_batch_size)
    assert parts_loss == pytest.approx(whole_loss, rel=1e-5)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_changes_nothing_but_memory(teaching_site: Site) -> None:
    plain, plain_loss = trained(teaching_site, method="lora")
    again, again_loss = trained(teaching_site, method="lora", gradient_checkpointing=True)
    assert again_loss == pytest.approx(plain_loss, rel=1e-6)
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-7)


def test_a_compiled_model_keeps_its_names(teaching_site: Site) -> None:
    plain, compiled = (prepared(teaching_site, compile=wanted)[2].network for wanted in (False, True))
    assert list(plain.state_dict()) == list(compiled.state_dict())
    layers = [name for name, module in compiled.named_modules() if module._compiled_call_impl is not None]
    assert layers == ["model.layers.0", "model.layers.1"]


def test_a_site_that_cannot_compile_says_so(teaching_site: Site) -> None:
    nowhere = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True})
    with nowhere, pytest.raises(InvalidInput, match="cannot be compiled at this site") as caught:
        trained(teaching_site, method="lora", compile=True)
    assert "compile = false" in caught.value.hint


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_through_init_train_and_evaluate(teaching_site: Site, method: str) -> None:
    local = {"steps": 12, "batch_size": 8, "learning_rate": 1e-2}
    if method not in ("full", "frozen embeddings"):
        lora = {"type": "lora", "rank": 8, "alpha": 32, "targets": ["all-linear"]}
        recipe = {**recipe_of(method, local=local), "method": lora}
    else:
        recipe = recipe_of(method, local=local)
    init, _ = teaching_site.run("init", teaching_site.task("init", recipe=recipe))
    update, result = teaching_site.run("train", teaching_site.task("train", recipe=recipe, model=init / UPDATE))
    measured = [
        teaching_site.run(f"evaluate-{n}", teaching_site.task("evaluate", recipe=recipe, model=path / UPDATE))[
            1
        ].metrics
        for n, path in enumerate((init, update))
    ]
    assert measured[1]["loss"] < measured[0]["loss"] - 0.5
    assert measured[1]["perplexity"] == pytest.approx(torch.tensor(measured[1]["loss"]).exp().item(), rel=1e-4)
    assert result.metrics["tokens_per_second"] > 0
    assert result.examples < 40


@pytest.mark.parametrize("method", ["nf4", "int8", "lora on bfloat16"])
def test_warm_output_equals_cold_output_bit_for_bit(teaching_site: Site, method: str) -> None:
    site, recipe = teaching_site, recipe_of(method)
    init, _ = site.run("init", site.task("init", recipe=recipe))
    task = site.task("train", recipe=recipe, model=init / UPDATE)
    first, _ = site.run("first", task)
    ((key, model),) = site.warm.models.items()
    between, _ = site.run("between", replace(task, seed=6, round=2, model_path=str(first / UPDATE)))
    site.run("evaluation", site.task("evaluate", recipe=recipe, model=between / UPDATE))
    warm, _ = site.run("warm", task)
    assert site.warm.models == {key: model}
    cold, _ = site.run("cold", task, warm=Warm())
    contents = [(directory / UPDATE).read_bytes() for directory in (first, warm, cold)]
    assert contents[0] == contents[1] == contents[2] != (between / UPDATE).read_bytes()


def test_a_base_model_is_loaded_anew_only_when_what_is_frozen_changes(teaching_site: Site) -> None:
    site = teaching_site
    keys = []
    for method in ("lora", "lora on bfloat16", "nf4", "int8"):
        recipe = recipe_of(method)
        init, _ = site.run(f"init-{method}", site.task("init", recipe=recipe))
        keys += list(site.warm.models)
        more = {**recipe, "local": {**recipe["local"], "steps": 1}, "rounds": 9}
        site.run(f"train-{method}", site.task("train", recipe=more, model=init / UPDATE))
        assert list(site.warm.models) == keys[-1:]
    assert len(set(keys)) == 4


def test_the_log_tells_a_warm_start_from_a_fresh_load(teaching_site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site, recipe = teaching_site, causal_recipe()
    init, _ = site.run("init", site.task("init", recipe=recipe))
    site.warm = Warm()
    task = site.task("train", recipe=recipe, model=init / UPDATE)
    capsys.readouterr()
    _, first = site.run("first", task)
    _, second = site.run("second", replace(task, round=2))
    said = re.findall(
        r"Round (\d): ready to train (\S+) s after the task came; loading afresh took (\S+) s\.",
        capsys.readouterr().err,
    )
    (one, ready, fresh), (two, warm, still) = said
    assert (one, two) == ("1", "2") and ready == fresh == still
    # All that comes before the first step is in it, and not the step itself.
    for result, seconds in ((first, ready), (second, warm)):
        assert round(result.seconds["load"], 3) <= float(seconds) <= round(result.seconds["first_step"], 3)


def test_the_same_order_in_every_round_is_that_of_the_first(teaching_site: Site) -> None:
    site = teaching_site
    for order, alike in {"same": True, "new": False}.items():
        recipe = causal_recipe(local={"steps": 1, "batch_size": 4, "learning_rate": 1e-2, "data_order": order})
        init, _ = site.run(f"init-{order}", site.task("init", recipe=recipe))
        task = site.task("train", recipe=recipe, model=init / UPDATE, site="north")
        one, _ = site.run(f"one-{order}", task)
        other, _ = site.run(f"other-{order}", replace(task, round=2, seed=6))
        assert ((one / UPDATE).read_bytes() == (other / UPDATE).read_bytes()) == alike


def test_the_learning_rate_may_fall_with_every_step(teaching_site: Site) -> None:
    site, rates = teaching_site, []
    schedule = {"type": "linear", "over": "steps", "final": 0.0}
    recipe = causal_recipe(local={"steps": 2, "batch_size": 4, "learning_rate": 1.0, "schedule": schedule})
    init, _ = site.run("init", site.task("init", recipe=recipe))
    report = site._report

    def noting(stage: str, done: int, total: int, unit: str, metrics: dict[str, float]) -> None:
        rates.extend(value for name, value in metrics.items() if name == "learning_rate")
        report(stage, done, total, unit, metrics)

    site._report = noting  # type: ignore[method-assign]
    site.run("train", site.task("train", recipe=recipe, model=init / UPDATE, round=2))
    assert rates == pytest.approx([0.75, 0.625])


def test_a_row_without_room_for_its_answer_is_skipped_and_a_long_answer_is_cut(teaching_site: Site) -> None:
    _, _, model, _ = prepared(teaching_site)
    kind = CausalLanguageModel(jobspec.CausalLm(type="causal-lm", max_length=60))
    short, long = Instruction("What is aspirin", "", "It is. " * 50), Instruction("What is it " * 40, "", "yes")
    tokens = kind.encode(Instructions([short, long], 3), tokenizer=model.tokenizer, on_rows=lambda *_: None)
    assert (len(tokens), tokens.skipped, tokens.lengths.tolist()) == (1, 4, [60])
    with pytest.raises(SiteConfigInvalid, match="All 1 prompts leave no room"):
        kind.encode(Instructions([long], 0), tokenizer=model.tokenizer, on_rows=lambda *_: None)


def test_a_tokenizer_without_a_padding_token_pads_with_its_end_which_is_learnt_all_the_same(
    teaching_site: Site,
) -> None:
    _, kind, model, tokens = prepared(teaching_site, rows=6)
    model.tokenizer.pad_token = None
    without = kind.encode(rows_of(6), tokenizer=model.tokenizer, on_rows=lambda *_: None)
    assert without.pad_id == model.tokenizer.eos_token_id != tokens.pad_id
    ends = without.starts[1:] - 1
    assert without.ids[ends].tolist() == [model.tokenizer.eos_token_id] * 6
    assert without.learnt[ends].all()
    assert gradients(kind, model, without)[0] == pytest.approx(gradients(kind, model, tokens)[0], rel=1e-6)
    model.tokenizer.eos_token = None
    with pytest.raises(InvalidInput, match="no token that ends a text"):
        kind.encode(rows_of(6), tokenizer=model.tokenizer, on_rows=lambda *_: None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": {"type": "causal-lm", "max_length": 257}}, "the base model has 256 positions"),
        ({"base_model": {"name": "tiny-llama", "attention": "flash"}}, "cannot be used with attention = 'flash'"),
    ],
)
def test_a_recipe_that_does_not_fit_is_explained(teaching_site: Site, changes: Any, says: str) -> None:
    with pytest.raises(InvalidInput, match=says) as caught:
        teaching_site.run("init", teaching_site.task("init", recipe=causal_recipe(**changes)))
    assert caught.value.hint


def test_an_encoder_is_no_language_model(teaching_site: Site, site: Site) -> None:
    with pytest.raises(InvalidInput, match="is no causal language model: it lacks cls"):
        recipe = causal_recipe(task={"type": "causal-lm", "max_length": 40})
        site.run("init", teaching_site.task("init", recipe=recipe, base_model_path=str(site.base_model)))


def test_an_encoder_that_fills_gaps_is_no_language_model_either(teaching_site: Site, site: Site) -> None:
    """It has an output layer, and sees the answer that it is to give."""
    directory = site.directory / "fills-gaps"
    shutil.copytree(site.base_model, directory)
    BertForMaskedLM(AutoConfig.from_pretrained(site.base_model)).save_pretrained(directory)
    with pytest.raises(InvalidInput, match="it lacks attention that looks back only"):
        recipe = causal_recipe(task={"type": "causal-lm", "max_length": 40})
        site.run("init", teaching_site.task("init", recipe=recipe, base_model_path=str(directory)))


def test_a_table_of_labels_does_not_do_for_instructions(teaching_site: Site, site: Site) -> None:
    init, _ = teaching_site.run("init", teaching_site.task("init", recipe=causal_recipe()))
    task = teaching_site.task(
        "train", recipe=causal_recipe(), model=init / UPDATE, data_set=site.data_set.model_dump(mode="json")
    )
    with pytest.raises(SiteConfigInvalid, match="no table of instructions, which this job needs"):
        teaching_site.run("train", task)


def test_one_round_alone_equals_one_round_of_a_federation_of_one(teaching_site: Site) -> None:
    site, recipe = teaching_site, causal_recipe(rounds=1)
    init, _ = site.run("init", site.task("init", recipe=recipe))
    update, _ = site.run("train", site.task("train", recipe=recipe, model=init / UPDATE))
    _, federated = site.run("test", site.task("evaluate", recipe=recipe, model=update / UPDATE, split="test"))
    data_set: DataSet = site.data_set
    metrics = train_alone(
        jobspec.parse(recipe), base_model_path=site.base_model, base_digest="ab" * 32,
        train=read_instructions(data_set, name="notes", split="train"),
        test=read_instructions(data_set, name="notes", split="test"),
        steps=3, seed=5, threads=1, on_progress=lambda *_: None,
    )  # fmt: skip
    assert metrics == {name: federated.metrics[name] for name in metrics}


def test_the_files_of_version_0_open_as_a_language_model(teaching_site: Site) -> None:
    site, recipe = teaching_site, recipe_of("full")
    init, _ = site.run("init", site.task("init", recipe=recipe))
    out: Path = init / "files"
    (init / UPDATE).rename(out / "model.safetensors")
    network, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"]
    (model,) = site.warm.models.values()
    ids = torch.tensor([[5, 9, 7]])
    with torch.no_grad():
        assert torch.equal(network(ids).logits, model.network.eval()(ids).logits)
