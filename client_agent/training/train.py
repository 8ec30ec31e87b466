"""Local training: from a version of the global model to an update, in one sitting or from checkpoint to checkpoint.

Everything random follows from one seed: the order of the rows from a generator of its own, dropout from torch's. The
optimizer is new each time. So the same version, rows and seed give the same update bit for bit, in a process that
has worked for weeks as in one that has just begun; and what is written is exactly what was trained, in float32.
"""

from __future__ import annotations

import math
import os
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from client_agent.training import parallel
from client_agent.training.checkpoints import Checkpoints, Reached
from client_agent.training.drift import Drift
from client_agent.training.kinds import Encoded, Kind, loss_sum
from client_agent.training.model import Model
from protos.errors import InvalidInput, OutOfSpace
from protos.jobspec import Local

# done, total, metrics; called after each step, and once before the first with done = 0 or what a checkpoint had
# reached. It may raise, to stop.
OnStep = Callable[[int, int, dict[str, float]], None]
# stage, done, total, unit, metrics. It may raise, to stop.
Report = Callable[[str, int, int, str, dict[str, float]], None]


def prepare(*, device: torch.device, threads: int, processes: int = 1) -> None:
    """The process-wide switches that decide how numbers are computed; `threads` 0 means a share of all cores."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, available // processes))
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Costs time to guard against reading memory that was never written, which no layer here does.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def train(
    model: Model,
    *,
    tokens: Encoded,
    task: Kind,
    local: Local,
    steps: int,
    learning_rate_at: Callable[[int], float],
    seed: int,
    on_step: OnStep,
    checkpoints: Checkpoints | None = None,
    corrections: Mapping[str, Tensor] | None = None,
) -> float:
    """Trains `model` in place for `steps` steps; returns the mean loss over the last epoch (or all, when shorter).

    `learning_rate_at` takes the step, from 0. `corrections` are SCAFFOLD's (see drift.py). InvalidInput when the loss
    is no longer finite; OutOfSpace when not even one row fits into the device's memory; Paused by the checkpoints,
    which hold what was done.
    """
    # Each process has other rows, and so another dropout.
    torch.manual_seed(seed + model.group.rank)
    model.network.train()
    set_gradient_checkpointing(model, wanted=local.gradient_checkpointing)
    optimizer = make_optimizer(model, local=local, learning_rate=learning_rate_at(0))
    # Before a checkpoint moves the model from where the round began.
    drift = Drift(model, proximal=local.proximal, corrections=corrections)
    order = batches(len(tokens), batch_size=local.batch_size, seed=seed)
    last_epoch = deque[float](maxlen=math.ceil(len(tokens) / local.batch_size))
    done = Reached(local.micro_batch_size or local.batch_size, losses=last_epoch)
    if checkpoints:
        checkpoints.restore(done, model=model, optimizer=optimizer)
    on_step(done.step, steps, {})
    began, seen = time.monotonic(), 0
    for rows in islice(order, done.step, steps):
        learning_rate = learning_rate_at(done.step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        loss, done.micro_batch_size = _gradients(
            model, rows=rows, tokens=tokens, task=task, local=local, micro_batch_size=done.micro_batch_size
        )
        if not math.isfinite(loss):
            raise diverged(f"the loss became {loss} in step {done.step + 1} of {steps}")
        drift.add_to_gradients()
        if local.max_gradient_norm:
            nn.utils.clip_grad_norm_(model.trainable, local.max_gradient_norm)
        optimizer.step()
        done.step += 1
        last_epoch.append(loss)
        seen += int(tokens.lengths[rows].sum())
        speed = seen / (time.monotonic() - began)
        on_step(done.step, steps, {"loss": loss, "learning_rate": learning_rate, "tokens_per_second": speed})
        if checkpoints and done.step < steps:
            checkpoints.after_step(done, model=model, optimizer=optimizer)
    model.network.zero_grad(set_to_none=True)
    return sum(last_epoch) / len(last_epoch)


def batches(rows: int, *, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Row numbers of one batch after the other, without end: each epoch is a new permutation of all rows."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(rows, generator=generator).split(batch_size)


def make_optimizer(model: Model, *, local: Local, learning_rate: float) -> torch.optim.Optimizer:
    """SGD or AdamW over what is trainable; biases and norms (fewer than two axes) do not decay."""
    groups = [
        {"params": [p for p in model.trainable if p.ndim >= 2], "weight_decay": local.weight_decay},
        {"params": [p for p in model.trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = model.device.type in {"cpu", "cuda"}
    if local.optimizer == "sgd":
        fused = fused and model.group.size == 1  # It has not been written for sharded tensors.
        return torch.optim.SGD(groups, lr=learning_rate, momentum=local.momentum, fused=fused)
    return torch.optim.AdamW(groups, lr=learning_rate, fused=fused)


def autocast(local: Local, *, device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU unless the recipe says float32; parameters stay float32 everywhere."""
    enabled = device.type == "cuda" and local.precision != "float32"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def diverged(what: str) -> InvalidInput:
    return InvalidInput(
        f"The training diverged: {what}.", hint="Lower learning_rate, or set max_gradient_norm, under [local]."
    )


def out_of_memory(batch_rows: int) -> OutOfSpace:
    return OutOfSpace(
        f"The device's memory is too small even for {batch_rows} row{'s' * (batch_rows > 1)} at a time.",
        hint="Lower max_length, choose a smaller base model or LoRA, or free the GPU of other work.",
    )


def cannot_be_compiled(error: TorchDynamoException) -> InvalidInput:
    traceback.print_exception(error)
    return InvalidInput(
        f"The base model cannot be compiled at this site ({type(error).__name__}).",
        hint="Set compile = false under [local] in the recipe; the trainer's log has the details.",
    )


def set_gradient_checkpointing(model: Model, *, wanted: bool) -> None:
    """As this task wants it: a model that is warm may have served another one."""
    network: Any = model.network
    if wanted == network.is_activation_checkpointing:
        return
    if not wanted:
        network.activation_checkpointing_disable()
        return
    try:
        network.activation_checkpointing_enable()
    except ValueError as error:
        raise InvalidInput(
            "The base model's architecture has no gradient checkpointing.",
            hint="Set gradient_checkpointing = false under [local] in the recipe.",
        ) from error


def _gradients(
    model: Model, *, rows: Tensor, tokens: Encoded, task: Kind, local: Local, micro_batch_size: int
) -> tuple[float, int]:
    """The batch's mean loss, its gradients left in the parameters, and the micro-batch size that fitted."""
    while True:
        model.network.zero_grad(set_to_none=True)
        try:
            loss = _accumulate(
                model, rows=rows, tokens=tokens, task=task, local=local, micro_batch_size=micro_batch_size
            )
            return loss, micro_batch_size
        except torch.OutOfMemoryError:
            if model.group.size > 1:
                raise parallel.out_of_memory(min(micro_batch_size, len(rows))) from None
            if micro_batch_size == 1:
                raise out_of_memory(1) from None
        except TorchDynamoException as error:
            raise cannot_be_compiled(error) from error
        # Here, where the failed attempt's frames no longer hold its tensors.
        micro_batch_size = min(micro_batch_size, len(rows)) // 2 or 1
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


def _accumulate(
    model: Model, *, rows: Tensor, tokens: Encoded, task: Kind, local: Local, micro_batch_size: int
) -> float:
    count = tokens.target_count(rows)
    total = torch.zeros((), device=model.device)
    for part, weight in model.group.parts(rows, micro_batch_size=micro_batch_size):
        inputs, targets = tokens.batch(part, device=model.device)
        with autocast(local, device=model.device):
            logits, classes = task.predict(model.network, inputs, targets)
        # Each part weighs by its targets, so the sum of the gradients is that of the whole batch's mean.
        loss = loss_sum(logits, classes) / count
        (loss * (weight * model.group.size)).backward()
        total += loss.detach() * weight
    model.group.mean_gradients(model.trainable)
    return float(model.group.sum(total))
