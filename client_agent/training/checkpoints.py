"""Checkpoints of a training: its whole state, so that a killed or paused one goes on bit for bit as if undisturbed.

What a step changes: the trainable tensors, the optimizer's state, torch's random numbers, and the micro-batch size that
fitted. The order of the rows follows from the seed and needs no state. Everything lies in plain tensors and JSON.

Of several processes the first one decides when, and writes what it gathers; all of them read it.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from client_agent.taskdir import (
    CHECKPOINT_TENSORS,
    Checkpoint,
    Paused,
    read_checkpoint,
    tidy_checkpoints,
    write_checkpoint,
)
from client_agent.training.files import write_tensors
from client_agent.training.model import Model
from client_agent.training.parallel import shard_like


@dataclass
class Reached:
    """How far a training is."""

    micro_batch_size: int
    losses: deque[float]  # of the last epoch's steps
    step: int = 0


@dataclass
class Checkpoints:
    """Those of one training, in its task directory. `every_seconds` None: only when it is paused.

    `work` is the digest of all that the training follows from; a checkpoint of anything else is not looked at.
    """

    directory: Path
    work: str
    every_seconds: float | None
    pausing: Callable[[], bool]
    warn: Callable[[str], None]
    _saved: float = field(default_factory=time.monotonic, init=False)

    def restore(self, reached: Reached, *, model: Model, optimizer: torch.optim.Optimizer) -> None:
        """Puts the newest checkpoint into all of these, and into the random numbers, when there is one to believe."""
        found = read_checkpoint(self.directory, work=self.work)
        if found is None:
            return
        with safe_open(self.directory / found.file, framework="pt") as file:
            for name, tensor in _trainable(model).items():
                tensor.copy_(shard_like(tensor, file.get_tensor(f"parameter.{name}")))
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state: dict[int, dict[str, Tensor]] = {}
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                kind, _, place = name.partition(".")
                if kind == "optimizer":
                    index, _, key = place.partition(".")
                    values = shard_like(parameters[int(index)], file.get_tensor(name))
                    state.setdefault(int(index), {})[key] = values
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        _set_random_state(found.state["random"][model.group.rank], device=model.device)
        reached.step, reached.micro_batch_size = found.step, found.state["micro_batch_size"]
        reached.losses.extend(found.state["losses"])

    def after_step(self, reached: Reached, *, model: Model, optimizer: torch.optim.Optimizer) -> None:
        """Saves when it is time. Paused, after saving, when the daemon asked for it."""
        due = self.every_seconds is not None and time.monotonic() - self._saved >= self.every_seconds
        told = model.group.told(2 if self.pausing() else int(due))
        if told:
            try:
                self._save(reached, model=model, optimizer=optimizer)
            except OSError as error:
                # The training itself needs no disk; the older checkpoint, where there is one, still counts.
                traceback.print_exc()
                tidy_checkpoints(self.directory)
                self.warn(f"A checkpoint could not be saved: {error.strerror or type(error).__name__}.")
            self._saved = time.monotonic()
        if told == 2:
            raise Paused

    def _save(self, reached: Reached, *, model: Model, optimizer: torch.optim.Optimizer) -> None:
        tensors = {f"parameter.{name}": tensor for name, tensor in _trainable(model).items()}
        for index, state in optimizer.state_dict()["state"].items():
            kept = {key: value for key, value in state.items() if isinstance(value, Tensor)}
            tensors |= {f"optimizer.{index}.{key}": value for key, value in kept.items()}
        tensors, random = model.group.whole(tensors), model.group.gathered(_random_state(model.device))
        if not model.group.leads:
            return
        file = CHECKPOINT_TENSORS.format(step=reached.step)
        write_tensors(tensors, path=self.directory / file)
        state = {
            "losses": list(reached.losses),
            "micro_batch_size": reached.micro_batch_size,
            "random": random,
        }
        write_checkpoint(self.directory, Checkpoint(self.work, reached.step, state, file))


def _trainable(model: Model) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.network.named_parameters() if tensor.requires_grad}


def _random_state(device: torch.device) -> dict[str, str]:
    """torch's generators of the CPU and of the device, as hexadecimal digits."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: state.numpy().tobytes().hex() for name, state in states.items()}


def _set_random_state(states: Mapping[str, str], *, device: torch.device) -> None:
    tensors = {name: torch.tensor(list(bytes.fromhex(state)), dtype=torch.uint8) for name, state in states.items()}
    torch.set_rng_state(tensors["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"], device)
