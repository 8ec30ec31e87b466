"""The local loop: batches, accumulation, optimizers, and what happens when memory or numbers give out."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from client_agent.training.classification import TextClassification, Tokens
from client_agent.training.data import Rows
from client_agent.training.model import Model, build
from client_agent.training.train import batches, make_optimizer, prepare, train
from protos import jobspec
from protos.errors import InvalidInput, OutOfSpace
from tests.unit.client_agent.training.conftest import LABELS, Site, make_texts

CPU = torch.device("cpu")


def build_model(site: Site, **local: Any) -> tuple[jobspec.JobSpec, TextClassification, Model, Tokens]:
    recipe = site.recipe(local={"steps": 3, "batch_size": 8, **local})
    spec = jobspec.parse(recipe)
    assert isinstance(spec.task, jobspec.Classification)
    task = TextClassification.of(spec.task)
    prepare(device=CPU, threads=1)
    model = build(spec, task=task, base_model_path=Path(site.base_model), device=CPU)
    texts = [text for label in LABELS for text in make_texts(label, rows=7)]
    rows = Rows(texts, [number // 7 for number in range(21)], LABELS, 0)
    return spec, task, model, task.encode(rows, tokenizer=model.tokenizer, on_rows=lambda done, total: None)


def without_dropout(model: Model) -> Model:
    for module in model.network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.network.config.attention_probs_dropout_prob = 0.0  # type: ignore[union-attr]
    for module in model.network.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0  # type: ignore[assignment]
    return model


def run(site: Site, *, steps: int = 3, dropout: bool = True, prepared: Any = None, **local: Any) -> tuple[Model, float]:
    spec, task, model, tokens = prepared or build_model(site, **local)
    if not dropout:
        without_dropout(model)
    loss = train(
        model, tokens=tokens, task=task, local=spec.local, steps=steps,
        learning_rate_at=lambda step: spec.local.learning_rate, seed=5, on_step=lambda *_: None,
    )  # fmt: skip
    return model, loss


def weights(model: Model) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in model.federated.values()])


def test_an_epoch_visits_every_row_once_and_the_next_one_in_another_order() -> None:
    found = list(itertools.islice(batches(10, batch_size=4, seed=1), 6))
    assert [len(batch) for batch in found] == [4, 4, 2, 4, 4, 2]
    first, second = torch.cat(found[:3]), torch.cat(found[3:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert first.tolist() != second.tolist()
    again = list(itertools.islice(batches(10, batch_size=4, seed=1), 6))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize(
    ("local", "rows", "steps"),
    [({"steps": 7}, 3, 7), ({"epochs": 1}, 21, 3), ({"epochs": 2.5}, 16, 5), ({"epochs": 0.1}, 8, 1)],
)
def test_epochs_become_steps(local: dict[str, Any], rows: int, steps: int) -> None:
    assert jobspec.Local(batch_size=8, **local).step_count(rows) == steps


def test_a_padded_batch_has_each_row_s_tokens_and_a_mask(site: Site) -> None:
    _, _, model, tokens = build_model(site)
    rows = torch.tensor([20, 0, 10])
    inputs, labels = tokens.batch(rows, device=CPU)
    assert labels.tolist() == [2, 0, 1]
    assert inputs["input_ids"].shape[1] == max(tokens.lengths[rows])
    for ids, mask, row in zip(inputs["input_ids"], inputs["attention_mask"], rows.tolist(), strict=True):
        start, end = tokens.starts[row : row + 2]
        assert torch.equal(ids[mask.bool()], tokens.ids[start:end].long())
        assert set(ids[~mask.bool()].tolist()) <= {model.tokenizer.pad_token_id}


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_accumulated_gradients_equal_those_of_the_whole_batch(site: Site, micro_batch_size: int) -> None:
    fields = {"optimizer": "sgd", "learning_rate": 0.1}
    whole, whole_loss = run(site, dropout=False, **fields)
    parts, parts_loss = run(site, dropout=False, micro_batch_size=micro_batch_size, **fields)
    assert parts_loss == pytest.approx(whole_loss, rel=1e-5)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-4, atol=1e-6)


def test_training_is_what_plain_pytorch_does(site: Site) -> None:
    """FedAvg of one site in one round is local training bit for bit, so there must be nothing else in the loop."""
    fields = {"optimizer": "adamw", "learning_rate": 1e-2, "weight_decay": 0.1, "max_gradient_norm": 0.5}
    ours, _ = run(site, **fields)
    spec, _, model, tokens = build_model(site, **fields)
    network = model.network.train()
    torch.manual_seed(5)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(5)).split(8)
    decayed = [p for p in network.parameters() if p.ndim >= 2]
    others = [p for p in network.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=spec.local.learning_rate, fused=True)
    for rows in order:
        inputs, labels = tokens.batch(rows, device=CPU)
        optimizer.zero_grad()
        (nn.functional.cross_entropy(network(**inputs).logits, labels, reduction="sum") / len(rows)).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
    assert torch.equal(weights(ours), weights(model))


def test_biases_and_norms_do_not_decay(site: Site) -> None:
    _, _, model, _ = build_model(site)
    optimizer = make_optimizer(model, local=jobspec.Local(steps=1, weight_decay=0.1), learning_rate=1e-3)
    decaying = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, parameter in model.network.named_parameters() if id(parameter) in decaying}
    assert names
    assert not any("bias" in name or "LayerNorm" in name for name in names)


def test_sgd_has_momentum(site: Site) -> None:
    plain, _ = run(site, optimizer="sgd", learning_rate=0.1)
    heavy, _ = run(site, optimizer="sgd", learning_rate=0.1, momentum=0.9)
    assert not torch.equal(weights(plain), weights(heavy))


def test_the_loss_is_the_mean_over_the_last_epoch(site: Site) -> None:
    spec, task, model, tokens = build_model(site)
    losses: list[float] = []
    mean = train(
        model, tokens=tokens, task=task, local=spec.local, steps=5, learning_rate_at=lambda step: 1e-3, seed=5,
        on_step=lambda done, total, metrics: losses.extend(metrics[name] for name in metrics if name == "loss"),
    )  # fmt: skip
    assert len(losses) == 5
    assert mean == pytest.approx(sum(losses[-3:]) / 3)


def test_the_micro_batch_is_halved_until_it_fits_into_memory(site: Site) -> None:
    prepared = build_model(site, optimizer="sgd", learning_rate=0.1)
    sizes: list[int] = []

    def memory_for_three_rows(module: nn.Module, args: object, kwargs: dict[str, Tensor]) -> None:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("out of memory")

    without_dropout(prepared[2]).network.register_forward_pre_hook(memory_for_three_rows, with_kwargs=True)
    small, _ = run(site, prepared=prepared)
    whole, _ = run(site, dropout=False, optimizer="sgd", learning_rate=0.1)
    assert sizes == [8, 4, *[2] * 4, *[2] * 4, 2, 2, 1]
    torch.testing.assert_close(weights(small), weights(whole), rtol=1e-4, atol=1e-6)


def test_a_row_that_does_not_fit_into_memory_ends_the_task_in_a_sentence(site: Site) -> None:
    prepared = build_model(site)

    def no_memory(module: nn.Module, args: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    prepared[2].network.register_forward_pre_hook(no_memory)
    with pytest.raises(OutOfSpace, match="too small even for 1 row at a time"):
        run(site, prepared=prepared)


def test_a_diverging_training_says_so(site: Site) -> None:
    with pytest.raises(InvalidInput, match=r"diverged: the loss became (nan|inf) in step \d+ of 30") as caught:
        run(site, steps=30, optimizer="sgd", learning_rate=1000, weight_decay=1)
    assert "learning_rate" in caught.value.hint


def test_the_learning_rate_may_change_from_step_to_step(site: Site) -> None:
    spec, task, model, tokens = build_model(site)
    before = weights(model).clone()
    seen: list[float] = []
    train(
        model, tokens=tokens, task=task, local=spec.local, steps=2, learning_rate_at=lambda step: 0.0 * step, seed=5,
        on_step=lambda done, total, metrics: seen.append(metrics.get("learning_rate", -1.0)),
    )  # fmt: skip
    assert seen == [-1.0, 0.0, 0.0]
    assert torch.equal(before, weights(model))
