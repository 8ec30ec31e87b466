"""A version in the model: checked, put in place, and measured against what was trained from it.

A version may hold more than a site trains: the other factors and columns of a LoRA job, and what its rule has added to
the frozen weights (see adapters.py). `Model.federated` is what the task at hand trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from client_agent.training.adapters import arrange
from client_agent.training.model import Model
from client_agent.training.parallel import shard_like
from protos import jobspec
from protos.adapters import FACTORS, split_name, with_controls
from protos.errors import CorruptData, InvalidInput

HINT = "This site's base model or its software differs from the one that built version 0."


def load_version(model: Model, *, path: Path, spec: jobspec.JobSpec, round_number: int, site: str | None) -> None:
    """Puts a version into the model, in place and tensor by tensor; nothing changes unless all of it fits.

    For `site` to train in this round; None: to be looked at only, whole. Errors as `check_tensors`.
    """
    named = [(name, "F32", shape) for name, shape in model.shapes.items()]
    check_tensors(path, expected={name: shape for name, _, shape in with_controls(spec, named)})
    federated = dict(model.federated)
    with safe_open(path, framework="pt") as file:
        if isinstance(model.network, PeftModel) and isinstance(spec.method, jobspec.Lora):
            rank = spec.method.rank if site is None else spec.rank_at(site)
            adapters = {name: file.get_tensor(name) for name in file.keys() if split_name(name)[1]}  # noqa: SIM118
            federated = arrange(model.network, adapters, spec=spec, round_number=round_number, rank=rank)
        for name, tensor in federated.items():
            if not split_name(name)[1]:
                tensor.copy_(shard_like(tensor, file.get_tensor(name)))
    model.federated.clear()
    model.federated.update(federated)
    if isinstance(spec.method, jobspec.Full):
        warm = spec.local.warm_head
        hold_body(model, held=warm is not None and site is not None and round_number <= warm.rounds)


def hold_body(model: Model, *, held: bool) -> None:
    """Whether the head alone is trained. An update has all of the tensors in either case."""
    network: Any = model.network
    body = set(network.base_model.parameters())
    for name, parameter in network.named_parameters():
        if name in model.shapes:
            parameter.requires_grad_(not held or parameter not in body)


def check_tensors(path: Path, *, expected: Mapping[str, tuple[int, ...]]) -> None:
    """InvalidInput unless the file holds these names and shapes in float32, and folds that fit beside them.

    CorruptData: it is no tensor file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            shapes = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in found.items()}
    except SafetensorError as error:
        raise CorruptData("The received model is not a tensor file.") from error
    expected = {**expected, **_folds(shapes, expected=expected)}
    for name in sorted(expected.keys() ^ shapes.keys()):
        lacks = "lacks a tensor that this site's has" if name in expected else "has a tensor that this site's lacks"
        raise InvalidInput(f"The received model {lacks}: {name!r}.", hint=HINT)
    for name, shape in expected.items():
        if shapes[name] != ("F32", shape):
            dtype, other = shapes[name]
            raise InvalidInput(
                f"Tensor {name!r} of the received model is {dtype} {list(other)}, not F32 {list(shape)}.", hint=HINT
            )


def update_norm(model: Model, *, path: Path) -> float:
    """The Euclidean distance of what was trained from the version at `path`; not finite when the training diverged."""
    total = 0.0
    with safe_open(path, framework="pt") as file:
        for name, tensor in model.federated.items():
            difference = tensor.cpu() - leading(file.get_tensor(name), shape=tuple(tensor.shape))
            total += float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
    return total**0.5


def leading(tensor: Tensor, *, shape: tuple[int, ...]) -> Tensor:
    """The part of a version's tensor that a site of lower rank trains."""
    return tensor[tuple(slice(size) for size in shape)]


def _folds(
    shapes: Mapping[str, tuple[str, tuple[int, ...]]], *, expected: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The shapes that the folds of a version must have: those of the layers' pairs, with as many columns as fold_A."""
    folds: dict[str, tuple[int, ...]] = {}
    for name, (_, shape) in shapes.items():
        layer, factor = split_name(name)
        pair = [expected.get(f"{layer}.{one}.weight") for one in FACTORS[:2]]
        if factor == "fold_A" and pair[0] and pair[1] and shape:
            folds[name] = (shape[0], pair[0][1])
            folds[f"{layer}.fold_B.weight"] = (pair[1][0], shape[0])
    return folds
