"""Distillation at the house agent: what the aggregate of a round learns before it becomes a version.

With labels, a teacher and the aggregated student learn from the house agent's rows: first the teacher alone, then both
from the labels and from one another (mutual.py). This is FedLoRA-KD, a mutual distillation at the server in the manner
of FedKD (Wu et al. 2022, arXiv:2108.13323), with what its published form lacks: divergences of probabilities and not of
raw logits, targets that are detached, and a teacher that keeps its best state.

Without labels, the updates of the round are the teachers: the student, which starts from their mean, learns the mean of
their logits on text (FedDF, Lin et al. 2020, arXiv:2006.07242). They are loaded one after another into the student's
own network, so that n sites take the memory of one.

Student and teacher are in memory together. The student is the model that the trainer keeps warm, the same as for a
training, and its attention is switched in place, so that no base model is loaded again for the next task; the teacher
is loaded for this task alone.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from client_agent.taskdir import TaskSpec, sync
from client_agent.training.evaluate import evaluate, predictions
from client_agent.training.files import write_tensors
from client_agent.training.kinds import Encoded, Kind, loss_sum
from client_agent.training.loading import load_version, update_norm
from client_agent.training.model import Model
from client_agent.training.mutual import Seen, attention_transfer, eager_attention, kl, mutual_loss, observe
from client_agent.training.teacher import Teacher
from client_agent.training.train import (
    OnStep,
    autocast,
    batches,
    make_optimizer,
    set_gradient_checkpointing,
    train,
)
from protos import jobspec
from protos.errors import InvalidInput

HINT = "Lower learning_rate and teacher_learning_rate under [distillation]."


@dataclass(frozen=True)
class Lesson:
    """What is learnt from, and how."""

    spec: jobspec.JobSpec
    task: TaskSpec
    kind: Kind
    # The server's slice, and the validation rows that decide what is kept.
    rows: Encoded
    held_out: Encoded
    on_step: OnStep
    on_rows: Callable[[int, int], None]

    @property
    def how(self) -> jobspec.Distillation:
        assert self.spec.distillation is not None
        return self.spec.distillation

    def local(self, *, epochs: float, learning_rate: float) -> jobspec.Local:
        """As a training at a site would be told; with AdamW."""
        return jobspec.Local(
            epochs=epochs, batch_size=self.how.batch_size, learning_rate=learning_rate,
            precision=self.spec.local.precision,
        )  # fmt: skip

    def ends_epoch(self, done: int, *, steps: int) -> bool:
        return done == steps or (done > 0 and done % math.ceil(len(self.rows) / self.how.batch_size) == 0)

    def measure(self, model: Model, rows: Encoded | None = None) -> dict[str, float]:
        """Of the validation rows, or of these."""
        tokens = self.held_out if rows is None else rows
        return evaluate(model, tokens=tokens, task=self.kind, local=self.spec.local, on_rows=self.on_rows)


@dataclass(frozen=True)
class Taught:
    steps: int
    metrics: dict[str, float]


def distill(student: Model, *, aggregate: Path, make_teacher: Callable[[], Teacher], lesson: Lesson) -> Taught:
    """The student, which holds the aggregate, learns in place; with what was measured, and whether to take it.

    InvalidInput: teacher and student cannot be compared, or the loss is no longer finite. Others as `train`, `build`.
    """
    before = lesson.measure(student)
    if lesson.how.labels:
        taught = _teach(student, make_teacher(), lesson=lesson)
    else:
        taught = _teach_by_members(student, aggregate=aggregate, lesson=lesson)
    after, norm = lesson.measure(student), update_norm(student, path=aggregate)
    if not math.isfinite(after["loss"]) or not math.isfinite(norm):
        raise _diverged("weights are no longer finite numbers")
    kept = not lesson.how.gate or after["loss"] <= before["loss"]
    metrics = {
        **taught.metrics,
        "aggregate_loss": before["loss"],
        "aggregate_accuracy": before["accuracy"],
        "student_loss": after["loss"],
        "student_accuracy": after["accuracy"],
        "distillation_kept": float(kept),
        "update_norm": norm,
        "skipped_rows": float(lesson.rows.skipped),
    }
    return Taught(taught.steps, metrics)


def write_result(model: Model, *, taught: Taught, aggregate: Path, path: Path) -> None:
    """The aggregate with what the model has learnt in place of its own; where that is not taken, its own bytes."""
    if not taught.metrics["distillation_kept"]:
        temporary = path.with_suffix(".new")
        copyfile(aggregate, temporary)
        sync(temporary)
        temporary.rename(path)
        return
    with safe_open(aggregate, framework="pt") as file:
        rest = {name: file.get_tensor(name) for name in file.keys() if name not in model.federated}  # noqa: SIM118
    write_tensors({**rest, **model.federated}, path=path)


def _teach(student: Model, teacher: Teacher, *, lesson: Lesson) -> Taught:
    """The teacher learns alone, then both learn together."""
    model = teacher.model
    if model.tokenizer.get_vocab() != student.tokenizer.get_vocab():
        raise InvalidInput(
            "Teacher and student do not have the same tokens.",
            hint="Choose a teacher under [distillation] whose tokenizer is that of the base model.",
        )
    before, slice_before = teacher.begin(), lesson.measure(model, lesson.rows)
    alone = _teach_alone(teacher, lesson=lesson)
    together, loss = _teach_each_other(student, teacher, lesson=lesson)
    metrics = {
        "distillation_loss": loss,
        "teacher_loss_before": before["loss"],
        "teacher_loss": teacher.best["loss"],
        "teacher_accuracy": teacher.best["accuracy"],
        "teacher_slice_loss_before": slice_before["loss"],
        "teacher_slice_loss": lesson.measure(model, lesson.rows)["loss"],
    }
    return Taught(alone + together, metrics)


def _teach_by_members(student: Model, *, aggregate: Path, lesson: Lesson) -> Taught:
    """FedDF: the student learns the mean of the members' logits, from the aggregate on."""
    rows, held_out = _ensemble(student, tables=(lesson.rows, lesson.held_out), lesson=lesson)
    _load(student, aggregate, lesson=lesson)

    def loss(batch: Tensor) -> Tensor:
        inputs, _ = lesson.rows.batch(batch, device=student.device)
        with autocast(lesson.spec.local, device=student.device):
            ours = observe(student.network, inputs)
        return kl(ours.logits, rows[batch].to(student.device), temperature=lesson.how.temperature)

    steps, mean = _descend([(student, lesson.how.learning_rate)], loss=loss, lesson=lesson)
    _, labels = lesson.held_out.batch(torch.arange(len(lesson.held_out)), device="cpu")
    scores = lesson.kind.new_scores()
    scores.add(held_out, labels, loss_sum=float(loss_sum(held_out, labels)))
    of_teachers = scores.metrics()
    metrics = {
        "distillation_loss": mean,
        "teacher_loss": of_teachers["loss"],
        "teacher_accuracy": of_teachers["accuracy"],
    }
    return Taught(steps, metrics)


def _teach_alone(teacher: Teacher, *, lesson: Lesson) -> int:
    how = lesson.how
    if not how.teacher_epochs:
        return 0
    local = lesson.local(epochs=how.teacher_epochs, learning_rate=how.teacher_learning_rate)
    steps = local.step_count(len(lesson.rows))

    def on_step(done: int, total: int, metrics: dict[str, float]) -> None:
        lesson.on_step(done, total, metrics)
        if lesson.ends_epoch(done, steps=total):
            teacher.look()

    try:
        train(
            teacher.model, tokens=lesson.rows, task=lesson.kind, local=local, steps=steps,
            learning_rate_at=lambda step: how.teacher_learning_rate * (1 - step / steps),
            seed=lesson.task.seed, on_step=on_step,
        )  # fmt: skip
    except InvalidInput as error:
        # The hint is of a training at a site, whose keys are others.
        raise InvalidInput(f"Of the teacher: {error.message}", hint=HINT) from error
    teacher.settle()
    return steps


def _teach_each_other(student: Model, teacher: Teacher, *, lesson: Lesson) -> tuple[int, float]:
    how, model = lesson.how, teacher.model

    def seen(network: Any, inputs: dict[str, Tensor]) -> Seen:
        with autocast(lesson.spec.local, device=student.device):
            return observe(network, inputs, attentions=how.attention)

    def loss(batch: Tensor) -> Tensor:
        inputs, labels = lesson.rows.batch(batch, device=student.device)
        ours, theirs = seen(student.network, inputs), seen(model.network, inputs)
        transfer = None
        if how.attention:
            transfer = attention_transfer(ours.attentions, theirs.attentions, mask=inputs["attention_mask"])
        adaptive = how.weighting == "adaptive"
        return mutual_loss(
            ours, theirs, labels=labels, temperature=how.temperature, transfer=transfer, adaptive=adaptive
        ).total

    with ExitStack() as stack:
        if how.attention:
            stack.enter_context(eager_attention(student.network))
            stack.enter_context(eager_attention(model.network))
        rates = [(student, how.learning_rate), (model, how.teacher_learning_rate)]
        steps, mean = _descend(rates, loss=loss, lesson=lesson, after_epoch=teacher.look)
    teacher.settle()
    return steps, mean


def _descend(
    rates: Sequence[tuple[Model, float]],
    *,
    loss: Callable[[Tensor], Tensor],
    lesson: Lesson,
    after_epoch: Callable[[], None] = lambda: None,
) -> tuple[int, float]:
    """AdamW on the loss of batches of rows, for each model with its own learning rate, which falls to 0.

    The steps, and the mean loss over the last epoch. InvalidInput when it is no longer finite.
    """
    how, seed = lesson.how, lesson.task.seed + 1
    steps = lesson.local(epochs=how.epochs, learning_rate=how.learning_rate).step_count(len(lesson.rows))
    torch.manual_seed(seed)
    optimizers = []
    for model, rate in rates:
        model.network.train()
        set_gradient_checkpointing(model, wanted=False)
        local = lesson.local(epochs=how.epochs, learning_rate=rate)
        optimizers.append(make_optimizer(model, local=local, learning_rate=rate))
    losses = deque[float](maxlen=math.ceil(len(lesson.rows) / how.batch_size))
    lesson.on_step(0, steps, {})
    order = batches(len(lesson.rows), batch_size=how.batch_size, seed=seed)
    for done, batch in enumerate(islice(order, steps), start=1):
        for optimizer, (_, rate) in zip(optimizers, rates, strict=True):
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - (done - 1) / steps)
        value = loss(batch)
        losses.append(float(value.detach()))
        if not math.isfinite(losses[-1]):
            raise _diverged(f"the loss became {losses[-1]} in step {done} of {steps}")
        value.backward()
        for optimizer in optimizers:
            optimizer.step()
        lesson.on_step(done, steps, {"loss": losses[-1]})
        if lesson.ends_epoch(done, steps=steps):
            after_epoch()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return steps, sum(losses) / len(losses)


def _ensemble(student: Model, *, tables: Sequence[Encoded], lesson: Lesson) -> list[Tensor]:
    """The weighted mean of the members' logits [rows, classes] on each table, float32 in the CPU's memory."""
    members = lesson.task.members
    if not members:
        raise InvalidInput("The task names no updates to learn from.")
    total = sum(member["weight"] for member in members)
    means: list[Any] = [0.0] * len(tables)
    for member in members:
        _load(student, Path(member["path"]), lesson=lesson)
        for number, tokens in enumerate(tables):
            means[number] = means[number] + _logits(student, tokens, lesson=lesson) * (member["weight"] / total)
    return means


def _logits(model: Model, tokens: Encoded, *, lesson: Lesson) -> Tensor:
    found = predictions(model, tokens=tokens, task=lesson.kind, local=lesson.spec.local, on_rows=lesson.on_rows)
    parts = [(seen.rows, seen.logits.float().cpu()) for seen in found]
    rows = torch.cat([rows for rows, _ in parts])
    return torch.cat([logits for _, logits in parts])[rows.argsort()]


def _load(student: Model, path: Path, *, lesson: Lesson) -> None:
    load_version(student, path=path, spec=lesson.spec, round_number=lesson.task.round, site=None)


def _diverged(what: str) -> InvalidInput:
    return InvalidInput(f"The distillation diverged: {what}.", hint=HINT)
