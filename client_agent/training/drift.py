"""What keeps a site's training near that of the others: terms that are added to the gradient of each step.

    FedProx    g + proximal (x - x_t)     (Li et al. 2020, arXiv:1812.06127)
    SCAFFOLD   g + c - c_k                (Karimireddy et al. 2020, arXiv:1910.06378, option II)

x_t is the version that the round began with; c comes with it, as control.<name of the tensor>. c_k lies in the site's
home, and is 0 until its first update counted. After tau plain steps of the round's learning rate it becomes

    c_k - c + (x_t - x_k) / (tau learning_rate)

in a file of its own, and the one before stays until the coordinator has said that a later one counted
(Task.counted_round), as with residuals (encoding.py): a training that is repeated, or whose result was never taken,
changes nothing. x_t, c and c_k follow from files that a training does not change, so no checkpoint holds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from client_agent.taskdir import TaskSpec, sync_directory
from client_agent.training.files import write_tensors
from client_agent.training.model import Model
from protos.adapters import CONTROL
from protos.errors import InvalidInput
from protos.jobspec import JobSpec

STATE = "control-{round}.safetensors"


class Drift:
    """The terms of one training. Make it before the first step, while the model holds the version."""

    def __init__(self, model: Model, *, proximal: float, corrections: Mapping[str, Tensor] | None) -> None:
        """`corrections` are c - c_k by the names of `model.federated`."""
        self._proximal = proximal
        trained = model.trainable
        self._starts = [(parameter, parameter.detach().clone()) for parameter in trained if proximal]
        names = {tensor.data_ptr(): name for name, tensor in model.federated.items()}
        self._corrections = [
            (parameter, corrections[names[parameter.data_ptr()]]) for parameter in trained if corrections
        ]

    @torch.no_grad()
    def add_to_gradients(self) -> None:
        """What took no part in the loss has no gradient, and stays where it is."""
        for parameter, start in self._starts:
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start, alpha=self._proximal)
        for parameter, correction in self._corrections:
            if parameter.grad is not None:
                parameter.grad.add_(correction)


def with_controls(tensors: Mapping[str, Tensor], *, spec: JobSpec) -> dict[str, Tensor]:
    """The tensors of version 0: c is 0."""
    if spec.aggregation.rule != "scaffold":
        return dict(tensors)
    return {**tensors, **{CONTROL + name: torch.zeros_like(tensor) for name, tensor in tensors.items()}}


def read_corrections(task: TaskSpec, *, model: Model, version: Path) -> dict[str, Tensor]:
    """c - c_k of each tensor that the round trains, on the model's device.

    InvalidInput: several processes train here, and each has but a part of them.
    """
    if model.group.size > 1:
        raise InvalidInput(
            "This site trains with several processes, which have no SCAFFOLD.",
            hint="Choose another rule under [aggregation] in the recipe, or processes = 1 in site.toml.",
        )
    path, found = _path(task, round_number=task.counted_round), {}
    with ExitStack() as stack:
        common = stack.enter_context(safe_open(version, framework="pt"))
        own = stack.enter_context(safe_open(path, framework="pt")) if path.exists() else None
        for name in model.federated:
            correction = common.get_tensor(CONTROL + name)
            if own:
                correction -= own.get_tensor(name)
            elif task.counted_round:
                # It was lost with the home; until this update counts the site is taken to be like the others.
                correction.zero_()
            found[name] = correction.to(model.device)
    return found


def write_state(
    task: TaskSpec, *, model: Model, corrections: Mapping[str, Tensor], version: Path, steps: int, learning_rate: float
) -> None:
    """Writes what c_k has become; it is on disk then, and all others are gone but that of the round that counted."""
    with safe_open(version, framework="pt") as file:
        new = {}
        for name, tensor in model.federated.items():
            moved = file.get_tensor(name).double() - tensor.cpu().double()
            new[name] = (moved / (steps * learning_rate) - corrections[name].cpu().double()).float()
    path = _path(task, round_number=task.round)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(new, path=path)
    sync_directory(path.parent)
    for other in path.parent.glob(STATE.format(round="*")):
        if other not in (path, _path(task, round_number=task.counted_round)):
            other.unlink()


def _path(task: TaskSpec, *, round_number: int) -> Path:
    return Path(task.state_directory, STATE.format(round=round_number))
