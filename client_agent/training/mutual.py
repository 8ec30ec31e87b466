"""Two models that teach each other: the losses of mutual distillation, as functions of what both models say.

A batch's loss is the task loss of both, and what each should learn from the other:

    CE_s + CE_t + (tau^2 KL(p_t || p_s) + tau^2 KL(p_s || p_t) + attention + hidden) / scale

Each KL moves one model only: the other one's side is a target, and detached. The maps are compared in one squared
error, whose gradient reaches both. `scale` is what adaptive weighting divides by, so that models that are still wrong
listen to each other less; it is a number, not something to be made large. FedKD (Wu et al. 2022, arXiv:2108.13323)
takes the sum of both task losses, FedLoRA-KD that sum + 1, so that it cannot run away when both losses are small.

Logits are [rows, classes]; attention maps [rows, heads, tokens, tokens] and hidden states [rows, tokens, units], both
by layer from the bottom; `mask` [rows, tokens] is 1 for tokens and 0 for padding. Everything is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional

from client_agent.training.classification import mixed_precision
from protos.errors import InvalidInput


@dataclass(frozen=True)
class Seen:
    """What a model says of a batch."""

    logits: Tensor
    attentions: tuple[Tensor, ...] = ()
    # One more than there are layers: the first are the embeddings.
    hidden_states: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class MutualLoss:
    """The parts of a batch's loss; each is a scalar with its gradient."""

    student_task: Tensor
    teacher_task: Tensor
    # Of both models, or of what is compared in them; before `scale`.
    student_kl: Tensor
    teacher_kl: Tensor
    transfer: Tensor
    scale: Tensor

    @property
    def total(self) -> Tensor:
        shared = self.student_kl + self.teacher_kl + self.transfer
        return self.student_task + self.teacher_task + shared / self.scale


@contextmanager
def eager_attention(network: nn.Module) -> Iterator[None]:
    """Inside, the network computes its attention maps, which no faster way of computing attention ever forms.

    Switched in place, so that a model that is warm is not loaded again for it.
    """
    plain: Any = network.get_base_model() if isinstance(network, PeftModel) else network
    before = plain.config._attn_implementation
    plain.set_attn_implementation("eager")
    try:
        yield
    finally:
        plain.set_attn_implementation(before)


def observe(network: Any, inputs: dict[str, Tensor], *, attentions: bool = False, hidden: bool = False) -> Seen:
    """What the network says of these inputs, in the precision of the surrounding autocast.

    InvalidInput: it gives no attention maps, which only eager attention (`eager_attention`) computes.
    """
    with mixed_precision(network, device=inputs["input_ids"].device):
        found = network(**inputs, output_attentions=attentions, output_hidden_states=hidden)
    maps = tuple(found.attentions or ()) if attentions else ()
    if attentions and (not maps or any(one is None for one in maps)):
        raise InvalidInput(
            f"The model {type(network).__name__} gives no attention maps.",
            hint="Set attention = false: its architecture has no attention that can be compared.",
        )
    return Seen(found.logits, maps, tuple(found.hidden_states or ()) if hidden else ())


def kl(learner: Tensor, target: Tensor, *, temperature: float = 1.0) -> Tensor:
    """tau^2 KL(target || learner) of logits, the mean over rows; only `learner` gets a gradient.

    tau^2 keeps the gradient's size as tau grows (Hinton et al. 2015, arXiv:1503.02531).
    """
    log_learner = functional.log_softmax(learner.float() / temperature, dim=-1)
    log_target = functional.log_softmax(target.float() / temperature, dim=-1).detach()
    divergence = functional.kl_div(log_learner, log_target, log_target=True, reduction="batchmean")
    return temperature**2 * divergence


def layer_map(student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Which layers are compared, counted from 0 at the bottom: the student's last with the teacher's last, and so on
    down in steps of teacher_layers // student_layers. InvalidInput: the student is the deeper one, or has no layers.
    """
    if not 0 < student_layers <= teacher_layers:
        raise InvalidInput(
            f"A student of {student_layers} layers cannot compare its attention with a teacher of {teacher_layers}.",
            hint="Set attention = false, or choose a teacher with at least as many layers.",
        )
    ratio = teacher_layers // student_layers
    return [(student_layers - 1 - i, teacher_layers - 1 - i * ratio) for i in range(student_layers)]


def attention_transfer(student: Sequence[Tensor], teacher: Sequence[Tensor], *, mask: Tensor) -> Tensor:
    """The mean squared difference of attention maps of `layer_map`'s pairs, averaged over rows and summed over pairs.

    Padding does not count. Heads are averaged where both models have different numbers of them. InvalidInput as
    `layer_map`, or where both cut the texts into different tokens.
    """
    pairs = mask[:, :, None] * mask[:, None, :]
    return _compared(student, teacher, mask=pairs[:, None].float(), prepare=_same_heads)


def hidden_transfer(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, mask: Tensor, projection: nn.Module | None = None
) -> Tensor:
    """The mean squared difference of the hidden states behind `layer_map`'s pairs, averaged over rows and summed over
    pairs; both sequences begin with the embeddings, which are not compared.

    `projection` makes the student's units as many as the teacher's, and is learnt with both. Errors as
    `attention_transfer`.
    """

    def projected(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return (projection(one) if projection is not None else one), other

    return _compared(student[1:], teacher[1:], mask=mask[:, :, None].float(), prepare=projected)


def adaptive_scale(student_task: Tensor, teacher_task: Tensor, *, floor: float = 1.0) -> Tensor:
    """What the shared losses are divided by: both task losses and `floor` (FedKD: 0), without a gradient."""
    return (student_task + teacher_task + floor).detach()


def mutual_loss(
    student: Seen, teacher: Seen, *, labels: Tensor, temperature: float, transfer: Tensor | None = None,
    adaptive: bool = True, floor: float = 1.0,
) -> MutualLoss:  # fmt: skip
    """All parts for a batch with `labels` [rows]; `transfer` is the sum of what is compared inside the models.

    Not adaptive: the plain sum. With floor = 0, temperature = 1 and hidden states in `transfer` it is FedKD's.
    """
    student_task = functional.cross_entropy(student.logits.float(), labels)
    teacher_task = functional.cross_entropy(teacher.logits.float(), labels)
    return MutualLoss(
        student_task,
        teacher_task,
        kl(student.logits, teacher.logits, temperature=temperature),
        kl(teacher.logits, student.logits, temperature=temperature),
        transfer if transfer is not None else torch.zeros_like(student_task),
        adaptive_scale(student_task, teacher_task, floor=floor) if adaptive else torch.ones_like(student_task),
    )


def _same_heads(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape[1] == teacher.shape[1]:
        return student, teacher
    return student.mean(dim=1, keepdim=True), teacher.mean(dim=1, keepdim=True)


def _compared(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    mask: Tensor,
    prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """The squared differences where `mask` is 1. Each row weighs the same, so parts of a batch add up to the batch."""
    total = mask.new_zeros(())
    for low, high in layer_map(len(student), len(teacher)):
        one, other = prepare(student[low].float(), teacher[high].float())
        if one.shape != other.shape:
            raise InvalidInput(
                f"Student and teacher do not see the same: {list(one.shape)} stands against {list(other.shape)}.",
                hint="Choose a teacher with the student's tokenizer, or set attention = false.",
            )
        wanted = mask.expand_as(one)
        error = ((one - other) ** 2 * wanted).flatten(1).sum(dim=1) / wanted.flatten(1).sum(dim=1)
        total = total + error.mean()
    return total
