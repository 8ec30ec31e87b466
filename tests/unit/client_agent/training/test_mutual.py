"""What two models learn from each other, against computations by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from client_agent.training.mutual import (
    Seen,
    adaptive_scale,
    attention_transfer,
    eager_attention,
    hidden_transfer,
    kl,
    layer_map,
    mutual_loss,
    observe,
)
from protos.errors import InvalidInput

STUDENT = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 3.0]])
TEACHER = torch.tensor([[1.0, 0.0, -2.0], [0.5, 0.5, 0.0]])


def probabilities(logits: Tensor, temperature: float) -> list[list[float]]:
    rows = []
    for row in logits.tolist():
        powers = [math.exp(value / temperature) for value in row]
        rows.append([power / sum(powers) for power in powers])
    return rows


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_divergence_is_that_of_the_softened_probabilities_averaged_over_rows(temperature: float) -> None:
    expected = 0.0
    for learner, target in zip(probabilities(STUDENT, temperature), probabilities(TEACHER, temperature), strict=True):
        expected += sum(t * math.log(t / s) for s, t in zip(learner, target, strict=True)) / len(STUDENT)
    assert float(kl(STUDENT, TEACHER, temperature=temperature)) == pytest.approx(temperature**2 * expected, rel=1e-5)
    assert float(kl(STUDENT, STUDENT)) == pytest.approx(0, abs=1e-7)
    # Of logits what they all have in common does not matter; the published code, which took them for
    # log-probabilities, gave another number.
    assert float(kl(STUDENT + 7, TEACHER)) == pytest.approx(float(kl(STUDENT, TEACHER)), rel=1e-4)


def test_only_the_learner_of_a_divergence_gets_a_gradient() -> None:
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    kl(student, teacher, temperature=2.0).backward()
    assert teacher.grad is None
    # By hand: tau (p_s - p_t) / rows.
    wanted = torch.tensor(probabilities(STUDENT, 2.0)) - torch.tensor(probabilities(TEACHER, 2.0))
    assert student.grad is not None
    torch.testing.assert_close(student.grad, 2.0 * wanted / len(STUDENT), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("layers", "pairs"),
    [
        ((6, 12), [(5, 11), (4, 9), (3, 7), (2, 5), (1, 3), (0, 1)]),
        ((4, 12), [(3, 11), (2, 8), (1, 5), (0, 2)]),
        ((3, 3), [(2, 2), (1, 1), (0, 0)]),
        ((2, 5), [(1, 4), (0, 2)]),
    ],
)
def test_layers_are_paired_from_the_last_one_down(layers: tuple[int, int], pairs: list[tuple[int, int]]) -> None:
    assert layer_map(*layers) == pairs
    last_first = [(-i - 1, -i * (layers[1] // layers[0]) - 1) for i in range(layers[0])]
    assert [(low % layers[0], high % layers[1]) for low, high in last_first] == pairs


@pytest.mark.parametrize("layers", [(4, 3), (0, 3)])
def test_a_student_deeper_than_its_teacher_is_refused(layers: tuple[int, int]) -> None:
    with pytest.raises(InvalidInput, match=f"{layers[0]} layers"):
        layer_map(*layers)


def maps(layers: int, heads: int, *, rows: int = 2, tokens: int = 5, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.rand(rows, heads, tokens, tokens, generator=draw).softmax(-1) for _ in range(layers)]


def test_attention_is_compared_layer_by_layer_as_plain_squared_errors() -> None:
    student, teacher = maps(2, 4), maps(4, 4, seed=1)
    mask = torch.ones(2, 5, dtype=torch.long)
    expected = nn.functional.mse_loss(student[1], teacher[3]) + nn.functional.mse_loss(student[0], teacher[1])
    torch.testing.assert_close(attention_transfer(student, teacher, mask=mask), expected)


def test_heads_are_averaged_where_the_models_have_different_numbers_of_them() -> None:
    student, teacher = maps(1, 2), maps(1, 3, seed=1)
    expected = nn.functional.mse_loss(student[0].mean(1), teacher[0].mean(1))
    found = attention_transfer(student, teacher, mask=torch.ones(2, 5, dtype=torch.long))
    torch.testing.assert_close(found, expected)


def test_padding_changes_nothing_and_each_row_weighs_the_same() -> None:
    student, teacher = maps(2, 4), maps(2, 4, seed=1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    one = [attention_transfer(
        [layer[row:row + 1, :, :n, :n] for layer in student], [layer[row:row + 1, :, :n, :n] for layer in teacher],
        mask=torch.ones(1, n, dtype=torch.long),
    ) for row, n in ((0, 5), (1, 3))]  # fmt: skip
    torch.testing.assert_close(attention_transfer(student, teacher, mask=mask), (one[0] + one[1]) / 2)
    hidden = [layer.mean(1) for layer in student], [layer.mean(1) for layer in teacher]
    noise = [layer + 100 * (1 - mask[:, :, None]) for layer in hidden[0]]
    torch.testing.assert_close(
        hidden_transfer(noise, hidden[1], mask=mask), hidden_transfer(*hidden, mask=mask), atol=1e-5, rtol=1e-5
    )


def test_hidden_states_are_compared_through_a_projection_that_learns_too_and_embeddings_are_not() -> None:
    draw = torch.Generator().manual_seed(0)
    student = [torch.rand(2, 5, 8, generator=draw) for _ in range(3)]
    teacher = [torch.rand(2, 5, 12, generator=draw) for _ in range(5)]
    projection = nn.Linear(8, 12, bias=False)
    found = hidden_transfer(student, teacher, mask=torch.ones(2, 5), projection=projection)
    below, above = projection(student[1]), projection(student[2])
    expected = nn.functional.mse_loss(below, teacher[2]) + nn.functional.mse_loss(above, teacher[4])
    torch.testing.assert_close(found, expected)
    found.backward()
    assert projection.weight.grad is not None


def test_models_that_cut_texts_into_different_tokens_cannot_be_compared() -> None:
    with pytest.raises(InvalidInput, match="do not see the same"):
        attention_transfer(maps(1, 4, tokens=5), maps(1, 4, tokens=6), mask=torch.ones(2, 5))


@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_the_whole_loss_is_the_sum_that_the_papers_give(floor: float) -> None:
    """With a floor of 0 and at temperature 1 FedKD's, with 1 and any temperature the class project's, mended."""
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    labels, transfer = torch.tensor([0, 2]), torch.tensor(0.25, requires_grad=True)
    parts = mutual_loss(Seen(student), Seen(teacher), labels=labels, temperature=2.0, transfer=transfer, floor=floor)
    tasks = [nn.functional.cross_entropy(logits, labels) for logits in (STUDENT, TEACHER)]
    shared = kl(STUDENT, TEACHER, temperature=2.0) + kl(TEACHER, STUDENT, temperature=2.0) + 0.25
    scale = tasks[0] + tasks[1] + floor
    torch.testing.assert_close(parts.total.detach(), tasks[0] + tasks[1] + shared / scale)
    assert not parts.scale.requires_grad
    parts.total.backward()
    # The student's gradient is that of its own task and its own divergence, as if the teacher were a table.
    alone = STUDENT.clone().requires_grad_()
    own = nn.functional.cross_entropy(alone, labels) + kl(alone, TEACHER, temperature=2.0) / scale
    own.backward()
    assert student.grad is not None and transfer.grad is not None
    torch.testing.assert_close(student.grad, alone.grad)
    torch.testing.assert_close(transfer.grad, 1 / scale)


def test_without_weighting_the_losses_are_just_added() -> None:
    parts = mutual_loss(Seen(STUDENT), Seen(TEACHER), labels=torch.tensor([0, 2]), temperature=1.0, adaptive=False)
    torch.testing.assert_close(
        parts.total, parts.student_task + parts.teacher_task + parts.student_kl + parts.teacher_kl
    )
    large = adaptive_scale(torch.tensor(3.0), torch.tensor(4.0))
    assert float(large) == 8


@pytest.mark.parametrize("architecture", ["bert", "albert", "distilbert", "roberta"])
@pytest.mark.parametrize("lora", [False, True])
def test_attention_maps_come_from_a_warm_model_that_is_then_as_it_was(
    base_model: Callable[[str], Path], architecture: str, lora: bool
) -> None:
    path = base_model(architecture)
    network = AutoModelForSequenceClassification.from_pretrained(path, config=AutoConfig.from_pretrained(path)).eval()
    query = "q_lin" if architecture == "distilbert" else "query"
    if lora:
        network = get_peft_model(network, LoraConfig(r=2, target_modules=[query], task_type="SEQ_CLS")).eval()
    inputs = {"input_ids": torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]]), "attention_mask": torch.ones(2, 4).long()}
    inputs["attention_mask"][1, 3] = 0
    before = observe(network, inputs)
    with pytest.raises(InvalidInput, match="no attention maps"):
        observe(network, inputs, attentions=True)
    with eager_attention(network):
        seen = observe(network, inputs, attentions=True, hidden=True)
    assert [tuple(one.shape) for one in seen.attentions] == [(2, 4, 4, 4)] * 3
    assert len(seen.hidden_states) == 4
    torch.testing.assert_close(seen.attentions[0].sum(-1), torch.ones(2, 4, 4))
    assert seen.attentions[0][1, :, :, 3].abs().max() == 0
    torch.testing.assert_close(seen.logits, before.logits, atol=1e-5, rtol=1e-4)
    assert torch.equal(observe(network, inputs).logits, before.logits)
