"""Which tensors a version has, and which of them travel up in a round, from which site, in which shape.

Trainer and coordinator must agree on it to the byte, so it is one function of the recipe and the version. With r the
recipe's rank, a layer of a version [m out, n in] has

    <layer>.lora_A.weight  [r, n]      <layer>.lora_B.weight  [m, r]      the pair; its update is factor x B A
    <layer>.lora_R.weight  [r, r]      fed-sb: what is trained between A and B, so that the update is factor x B R A
    <layer>.fold_A.weight  [p, n]      <layer>.fold_B.weight  [m, p]      flora, fedex: what was added to the frozen
                                       weights so far, factor x fold_B fold_A; p grows with the rounds

and every other tensor (a head) is trained whole. What no round trains (A with ffa-lora, A and B with fed-sb) is in a
version as it was in version 0, and not in the rounded difference from it that sites fetch. A site whose rank is lower
trains the first columns of B, rows of A, and leading block of R.

With rule scaffold, of any method, a version has beside each tensor control.<its name>: the mean gradient of all sites,
which starts at 0. It travels down alone; the coordinator makes the next one from what was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from protos.encodings import Named
from protos.jobspec import JobSpec, Lora
from protos.tensors import Layout

Factor = Literal["lora_A", "lora_B", "lora_R", "fold_A", "fold_B", ""]
FACTORS: tuple[Factor, ...] = ("lora_A", "lora_B", "lora_R", "fold_A", "fold_B")
CONTROL = "control."


def split_name(name: str) -> tuple[str, Factor]:
    """(layer, factor) of a tensor; the factor is empty for a tensor that belongs to no adapter."""
    if name.startswith(CONTROL):
        return name, ""
    layer, _, last = name.removesuffix(".weight").rpartition(".")
    return (layer, last) if last in FACTORS and name.endswith(".weight") else (name, "")  # type: ignore[return-value]


def trained_factors(spec: JobSpec, *, round_number: int) -> frozenset[Factor]:
    """The factors that round 1, 2, ... trains; what is no factor is trained in every round."""
    match spec.aggregation.rule:
        case "ffa-lora":
            return frozenset({"lora_B"})
        case "rolora":
            return frozenset({"lora_B" if round_number % 2 else "lora_A"})
        case "fed-sb":
            return frozenset({"lora_R"})
    return frozenset({"lora_A", "lora_B"})


def with_controls(spec: JobSpec, tensors: Sequence[Named]) -> list[Named]:
    """All tensors of a version in which these are trained, in canonical order."""
    controls = [(CONTROL + name, dtype, shape) for name, dtype, shape in tensors]
    return sorted([*tensors, *(controls if spec.aggregation.rule == "scaffold" else ())])


def moving(spec: JobSpec, version: Sequence[Named]) -> list[Named]:
    """The tensors of a version that some round trains; the others stay as in version 0. Of a job without folds."""
    if not isinstance(spec.method, Lora):
        return list(version)
    # Rounds repeat in pairs.
    trained = trained_factors(spec, round_number=1) | trained_factors(spec, round_number=2)
    return [tensor for tensor in version if split_name(tensor[0])[1] in ("", *trained)]


def cut_shape(shape: tuple[int, ...], *, factor: Factor, rank: int) -> tuple[int, ...]:
    """The shape of the part of a factor that a site of this rank trains: always the leading part."""
    match factor:
        case "lora_A":
            return (min(rank, shape[0]), shape[1])
        case "lora_B":
            return (shape[0], min(rank, shape[1]))
        case "lora_R":
            return (min(rank, shape[0]), min(rank, shape[1]))
    return shape


def update_tensors(spec: JobSpec, version: Layout, *, round_number: int, site: str) -> list[Named]:
    """(name, dtype, shape) of what a site's update of this round holds, decoded, in canonical order."""
    tensors = version.tensors
    if spec.aggregation.rule == "scaffold":
        tensors = tuple(tensor for tensor in tensors if not tensor.name.startswith(CONTROL))
    if not isinstance(spec.method, Lora):
        return [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
    trained, rank = trained_factors(spec, round_number=round_number), spec.rank_at(site)
    found = []
    for tensor in tensors:
        _, factor = split_name(tensor.name)
        if not factor or factor in trained:
            found.append((tensor.name, tensor.dtype, cut_shape(tensor.shape, factor=factor, rank=rank)))
    return found
