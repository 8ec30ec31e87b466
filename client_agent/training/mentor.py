"""FedKD at a site (Wu et al. 2022, Nature Communications 13:2032, arXiv:2108.13323): a mentor that never leaves it, and
the model of the federation as its mentee, learn from the same batches and from one another.

For each batch, with p the answers, H the hidden states and A the attention maps of mentor t and mentee s:

    L_s = CE_s + KL(p_t || p_s) / Z + L_h        Z   = CE_s + CE_t, a number
    L_t = CE_t + KL(p_s || p_t) / Z + L_h        L_h = (MSE(H_t, W_h H_s) + MSE(A_t, A_s)) / Z

and each model takes a step along its own loss. The losses are those of mutual.py: the other one's answers are a target,
and one backward pass through their sum gives both models, and W_h, just these gradients. W_h makes the mentee's units
as many as the mentor's; it begins as the identity, and stays at the site with the mentor.

What is kept is written from the state of the last round whose update counted, as residuals are (encoding.py), so a
training that is repeated learns nothing twice. Both optimizers begin anew in each round.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from client_agent.settings import DataSet
from client_agent.taskdir import Paused, TaskSpec, sync_directory, until_written
from client_agent.training.data import without_content
from client_agent.training.evaluate import evaluate
from client_agent.training.files import write_tensors
from client_agent.training.kinds import Encoded, Kind
from client_agent.training.loading import check_tensors
from client_agent.training.model import Model, build
from client_agent.training.mutual import (
    MutualLoss,
    attention_transfer,
    eager_attention,
    hidden_transfer,
    mutual_loss,
    observe,
)
from client_agent.training.tables import Split
from client_agent.training.train import (
    OnStep,
    Report,
    autocast,
    batches,
    diverged,
    make_optimizer,
    out_of_memory,
    set_gradient_checkpointing,
)
from protos import jobspec
from protos.errors import CorruptData, InvalidInput, SiteConfigInvalid

STATE = "mentor-{round}.safetensors"
PROJECTION = "projection.weight"
# Two models that are sure of every row divide by next to nothing, and not by nothing.
LEAST_SCALE = 1e-6


@dataclass
class Mentor:
    """A site's own model, and W_h."""

    model: Model
    projection: nn.Linear

    @property
    def state(self) -> dict[str, Tensor]:
        """All that is kept of it; each shares memory with what is trained."""
        return {**self.model.federated, PROJECTION: self.projection.weight.detach()}

    @property
    def learnt(self) -> list[nn.Parameter]:
        return [*self.model.trainable, *self.projection.parameters()]

    def load(self, path: Path) -> None:
        """InvalidInput, CorruptData: that file is no state of this mentor. Then nothing has changed."""
        check_tensors(path, expected={name: tuple(tensor.shape) for name, tensor in self.state.items()})
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for name, tensor in self.state.items():
                tensor.copy_(file.get_tensor(name))


def train_with_mentor(
    mentee: Model, tokens: Encoded, *, task: TaskSpec, spec: jobspec.JobSpec, kind: Kind,
    mentors: OrderedDict[Hashable, Mentor], tokens_of: Callable[[Split], Encoded], steps: int, seed: int,
    on_step: OnStep, report: Report,
    pausing: Callable[[], bool], waits: Callable[[], None], warn: Callable[[str], None],
) -> tuple[float, dict[str, float]]:  # fmt: skip
    """A round's training of both, and the mentor's state on disk; the mentee's loss, and metrics of the mentor.

    `mentors` are what stays in memory, `tokens_of` reads a split of the site's rows, and `waits` says that the disk is
    full and takes a moment. Paused when `pausing` says so, and then nothing is kept. Errors as `mentor_of` and
    `train_together`.
    """
    if mentee.group.size > 1:
        raise InvalidInput(
            "A mentor and its mentee train in one process.",
            hint="Set processes = 1 under [device] in site.toml.",
        )
    mentor = mentor_of(task, spec=spec, kind=kind, beside=mentee, kept=mentors, warn=warn)

    def on_step_or_pause(done: int, total: int, metrics: dict[str, float]) -> None:
        if pausing():
            raise Paused
        on_step(done, total, metrics)

    loss, mentor_loss = train_together(
        mentee, mentor, tokens=tokens, local=spec.local, steps=steps, seed=seed, on_step=on_step_or_pause,
        learning_rate_at=lambda step: spec.learning_rate_at(task.round, part=step / steps),
    )  # fmt: skip
    until_written(
        lambda: write_state(mentor, task=task), waits=waits,
        partial=_path(task, task.round).with_suffix(".new"),
    )  # fmt: skip
    metrics = {"mentor_loss": mentor_loss}
    if DataSet.model_validate(task.data_set).validation:
        try:
            held_out = tokens_of("validation")
        except SiteConfigInvalid as error:
            # A share of few rows may be none. What was trained counts all the same.
            warn(f"The mentor was not measured: {without_content(error)}")
            return loss, metrics
        found = evaluate(
            mentor.model, tokens=held_out, task=kind, local=spec.local,
            on_rows=lambda done, total: report("training", steps, steps, "steps", {}),
        )  # fmt: skip
        metrics["mentor_accuracy"] = found["accuracy"]
    return loss, metrics


def mentor_of(
    task: TaskSpec, *, spec: jobspec.JobSpec, kind: Kind, beside: Model, kept: OrderedDict[Hashable, Mentor],
    warn: Callable[[str], None],
) -> Mentor:  # fmt: skip
    """This site's mentor as the last round that counted has left it, or as it begins: with a new head, as every site's.

    `kept` is the one that stays in memory between tasks. InvalidInput: it cannot be a mentor of `beside`, or as
    `build`.
    """
    before, own = _path(task, task.counted_round), spec_of_mentor(spec)
    assert own.base_model is not None
    what = (own.base_model.model_dump_json(), own.method.model_dump_json(), kind)
    key = (task.teacher_digest, task.teacher_model_path, *what, str(beside.device))

    def anew() -> Mentor:
        # First the other one goes: two would not fit on many a GPU.
        kept.clear()
        kept[key] = _new(task, spec=spec, kind=kind, beside=beside)
        return kept[key]

    if before.exists():
        try:
            (kept[key] if key in kept else anew()).load(before)
            return kept[key]
        except (CorruptData, InvalidInput) as error:
            warn(f"The mentor begins anew, because its state cannot be used: {error.message}")
    elif task.counted_round:
        warn("The mentor begins anew, because its state is no longer here.")
    return anew()


def spec_of_mentor(spec: jobspec.JobSpec) -> jobspec.JobSpec:
    """The job's spec as if the mentor were its base model and (nearly) all of it were trained."""
    assert spec.local.mentor is not None
    frozen = spec.method.freeze_embeddings if isinstance(spec.method, jobspec.Full) else True
    return spec.model_copy(
        update={
            "base_model": spec.local.mentor.base_model,
            "method": jobspec.Full(type="full", freeze_embeddings=frozen),
            "aggregation": jobspec.Aggregation(),
        }
    )


def train_together(
    mentee: Model,
    mentor: Mentor,
    *,
    tokens: Encoded,
    local: jobspec.Local,
    steps: int,
    learning_rate_at: Callable[[int], float],
    seed: int,
    on_step: OnStep,
) -> tuple[float, float]:
    """Trains both in place for `steps` steps; the mean task losses of mentee and mentor over the last epoch.

    Errors as `train`, and InvalidInput where the two cannot be compared. `on_step` may raise, to stop.
    """
    how = local.mentor
    assert how is not None
    torch.manual_seed(seed)
    factor = (how.learning_rate or local.learning_rate) / local.learning_rate
    first = learning_rate_at(0)
    optimizers = [(make_optimizer(mentee, local=local, learning_rate=first), 1.0)]
    optimizers.append((make_optimizer(mentor.model, local=local, learning_rate=first * factor), factor))
    # A map between two models has no zero to decay to.
    optimizers[1][0].add_param_group({"params": [mentor.projection.weight], "weight_decay": 0.0})
    losses = deque[tuple[float, float]](maxlen=math.ceil(len(tokens) / local.batch_size))
    order = batches(len(tokens), batch_size=local.batch_size, seed=seed)
    on_step(0, steps, {})
    began, seen = time.monotonic(), 0
    with _both_trained(mentee, mentor, maps=how.attention):
        for done, rows in enumerate(islice(order, steps)):
            rate = learning_rate_at(done)
            for optimizer, share in optimizers:
                optimizer.zero_grad(set_to_none=True)
                for group in optimizer.param_groups:
                    group["lr"] = rate * share
            try:
                found = loss_of(mentee, mentor, rows=rows, tokens=tokens, local=local)
                found.total.backward()
            except torch.OutOfMemoryError:
                raise out_of_memory(len(rows)) from None
            ours, theirs = float(found.student_task.detach()), float(found.teacher_task.detach())
            if not math.isfinite(ours + theirs):
                raise diverged(f"the losses became {ours} and the mentor's {theirs} in step {done + 1} of {steps}")
            for (optimizer, _), learnt in zip(optimizers, (mentee.trainable, mentor.learnt), strict=True):
                if local.max_gradient_norm:
                    nn.utils.clip_grad_norm_(learnt, local.max_gradient_norm)
                optimizer.step()
            losses.append((ours, theirs))
            seen += int(tokens.lengths[rows].sum())
            told = {"loss": ours, "mentor_loss": theirs, "learning_rate": rate}
            on_step(done + 1, steps, {**told, "tokens_per_second": seen / (time.monotonic() - began)})
    for optimizer, _ in optimizers:
        optimizer.zero_grad(set_to_none=True)
    means = torch.tensor(losses, dtype=torch.float64).mean(dim=0)
    return float(means[0]), float(means[1])


def loss_of(mentee: Model, mentor: Mentor, *, rows: Tensor, tokens: Encoded, local: jobspec.Local) -> MutualLoss:
    """The losses of both for these rows: the gradients of `total` are those of L_s in the mentee, L_t in the mentor,
    and L_h in W_h."""
    how = local.mentor
    assert how is not None
    inputs, labels = tokens.batch(rows, device=mentee.device)
    looks: dict[str, Any] = {"attentions": how.attention, "hidden": how.hidden}
    with autocast(local, device=mentee.device):
        ours, theirs = (observe(one.network, inputs, **looks) for one in (mentee, mentor.model))
    mask, transfer = inputs["attention_mask"], None
    if how.attention:
        transfer = attention_transfer(ours.attentions, theirs.attentions, mask=mask)
    if how.hidden:
        states = hidden_transfer(
            ours.hidden_states, theirs.hidden_states, mask=mask, projection=mentor.projection
        )  # fmt: skip
        transfer = states if transfer is None else transfer + states
    return mutual_loss(
        ours, theirs, labels=labels, temperature=how.temperature, transfer=transfer, floor=LEAST_SCALE
    )  # fmt: skip


def write_state(mentor: Mentor, *, task: TaskSpec) -> None:
    """Keeps the mentor as this round leaves it, beside what the round began with; it is on disk then. OSError."""
    begun, now = _path(task, task.counted_round), _path(task, task.round)
    now.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(mentor.state, path=now)
    sync_directory(now.parent)
    for path in now.parent.glob(STATE.format(round="*")):
        if path not in (begun, now):
            path.unlink()


def _path(task: TaskSpec, round_number: int) -> Path:
    return Path(task.state_directory, STATE.format(round=round_number))


@contextmanager
def _both_trained(mentee: Model, mentor: Mentor, *, maps: bool) -> Iterator[None]:
    with ExitStack() as stack:
        for model in (mentee, mentor.model):
            model.network.train()
            set_gradient_checkpointing(model, wanted=False)
            if maps:
                stack.enter_context(eager_attention(model.network))
        yield


def _new(task: TaskSpec, *, spec: jobspec.JobSpec, kind: Kind, beside: Model) -> Mentor:
    assert spec.local.mentor is not None
    if task.teacher_model_path is None:
        raise InvalidInput("The task names no base model for the mentor.")
    path = Path(task.teacher_model_path)
    model = build(spec_of_mentor(spec), task=kind, base_model_path=path, device=beside.device)
    if model.tokenizer.get_vocab() != beside.tokenizer.get_vocab():
        raise InvalidInput(
            f"The mentor {spec.local.mentor.base_model.name!r} cuts texts into other tokens than the base model.",
            hint="Choose a mentor with the same tokenizer under [local.mentor] in the recipe.",
        )
    networks: list[Any] = [beside.network, model.network]
    mentees, mentors = (network.config.hidden_size for network in networks)
    projection = nn.Linear(mentees, mentors, bias=False, device=beside.device)
    with torch.no_grad():
        projection.weight.copy_(torch.eye(mentors, mentees))
    return Mentor(model, projection)
