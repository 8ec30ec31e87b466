"""What a training needs of a site: memory of its device, memory of its machine, disk. Estimates, from shapes alone.

Bytes by what holds them, with P parameters in all, L of them in linear layers, T trained, t = micro batch x max_length
tokens, w = 2 bytes a value under bfloat16 and 4 otherwise:

    weights       frozen: 2 or 4 by dtype; nf4, fp4: 0.5 L and a float32 scale for 64 values, 4/64 L (QLoRA, Dettmers et
                  al. 2023, arXiv:2305.14314), with double quantization 1/64 L and 4/(64 x 256) L; int8: L. Embeddings,
                  norms and the output layer are never quantised. float32 weights that are multiplied in bfloat16 are
                  kept for the way back in both, and a quantised matrix is written out for each use: 2 x the largest.
    trained       4 for each value of a version, and T x (4 gradient + 8 AdamW; SGD 0, with momentum 4): float32
                  everywhere (Rajbhandari et al. 2020, arXiv:1910.02054, count so).
    activations   of a layer w t (inputs + outputs of its linear layers). Of the textbook layer of width h that is 36
                  t h bytes in 16 bits, where Korthikanti et al. 2022 (arXiv:2205.05198) count 34 t h. Attention that is
                  written out ("eager") keeps 5 w/2 x heads x t x max_length more, with heads of 64. With gradient
                  checkpointing w t h for each layer, and one layer whole.
    logits        of the completions, taken to be half of the tokens: t/2 x vocabulary x (w + w for their gradient);
                  their float32 values are made for some of the rows at a time. Of a classifier: nothing.
    runtime       CUDA's context and libraries, or torch's own memory on a CPU.

Several GPUs share weights that are not quantised evenly (FSDP2). Allocators fragment, and a driver has needs of its
own: what comes close to the limit may fail all the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from coordinator.traffic import Shapes, version_tensors
from protos.adapters import update_tensors
from protos.jobspec import CausalLm, Full, JobSpec
from protos.tensors import make_header

CUDA_BYTES = 800 << 20
TORCH_BYTES = 600 << 20
# Of a trainer on a GPU in the machine's memory: CUDA's libraries, torch, buffers on the way to the device.
GPU_HOST_BYTES = 3 << 30
QUANTISED = {"nf4": 0.5, "fp4": 0.5, "int8": 1.0}
SCALE_BLOCK, SCALES_BLOCK = 64, 256
HEAD_SIZE = 64
COMPLETION_PART = 0.5
TOKEN_BYTES = 4
# Versions of the global model that an agent keeps beside the one in use, and its checkpoint's parts: values, moments.
KEPT_VERSIONS = 3


@dataclass(frozen=True)
class Footprint:
    """In bytes. `device` is the GPU's memory, or on a CPU a part of the machine's."""

    weights: int
    trained: int
    activations: int
    logits: int
    runtime: int
    host: int
    disk: int

    @property
    def device(self) -> int:
        return self.weights + self.trained + self.activations + self.logits + self.runtime


def footprint(
    spec: JobSpec, shapes: Shapes, *, on_gpu: bool, gpus: int = 1, site: str, micro_batch: int, rows: int, fold: int = 0
) -> Footprint:
    """Of a site of this name that trains `micro_batch` rows at a time, and has so many rows in all; `device` is of each
    of its `gpus`. `fold` is the rank of what flora or fedex will have added to the frozen weights."""
    base = spec.base_model
    assert base is not None
    max_length = getattr(spec.task, "max_length", 0)
    tokens = micro_batch * max_length
    half = spec.local.precision != "float32" if on_gpu else (base.dtype, base.quantization) == ("bfloat16", "none")
    shards = gpus if on_gpu and base.quantization == "none" else 1
    width = 2 if half else 4
    version = make_header(version_tensors(spec, shapes, fold=fold))[1]
    # rolora trains one half in odd rounds, and the other in even ones.
    trained = max(
        sum(math.prod(shape) for _, _, shape in update_tensors(spec, version, round_number=number, site=site))
        for number in (1, 2)
    )
    # What the proximal term pulls to is one more copy. scaffold's corrections are as large as a version's controls.
    state = version.data_bytes + trained * (4 + _optimizer_bytes(spec) + (4 if spec.local.proximal else 0))
    keeps_residual = spec.encoding.up != "raw" and spec.encoding.error_feedback
    kept = trained * 4 if keeps_residual or spec.aggregation.rule == "scaffold" else 0
    checkpoint = trained * (4 + _optimizer_bytes(spec)) if spec.local.checkpoint_seconds else 0
    return Footprint(
        weights=_weights(spec, shapes, width=width, trained=trained) // shards,
        trained=state // (shards if isinstance(spec.method, Full) else 1),
        activations=_activations(spec, shapes, tokens=tokens, width=width),
        logits=round(COMPLETION_PART * tokens) * shapes.vocabulary * 2 * width
        if isinstance(spec.task, CausalLm)
        else 0,
        runtime=CUDA_BYTES if on_gpu else TORCH_BYTES,
        host=(GPU_HOST_BYTES if on_gpu else 0) + rows * max_length * TOKEN_BYTES,
        disk=version.file_bytes * (1 + KEPT_VERSIONS) + trained * 4 + kept + checkpoint,
    )


def _optimizer_bytes(spec: JobSpec) -> int:
    if spec.local.optimizer == "adamw":
        return 8
    return 4 if spec.local.momentum else 0


def _weights(spec: JobSpec, shapes: Shapes, *, width: int, trained: int) -> int:
    base = spec.base_model
    assert base is not None
    frozen = max(0, shapes.parameters - trained) if isinstance(spec.method, Full) else shapes.parameters
    value = 2 if base.dtype == "bfloat16" else 4
    inner = [linear for linear in shapes.linear if "*" in linear.name]
    matrices = sum(linear.parameters for linear in inner)
    largest = max((linear.out_features * linear.in_features for linear in inner), default=0)
    if base.quantization in QUANTISED:
        scales = 4 / SCALE_BLOCK
        if base.double_quantization:
            scales = (1 + 4 / SCALES_BLOCK) / SCALE_BLOCK
        if base.quantization == "int8":
            scales = 0.0
        return round(matrices * (QUANTISED[base.quantization] + scales)) + (frozen - matrices) * value + largest * width
    # Written out in bfloat16 for the way back: all of them, or those of one layer.
    copies = 0
    if value > width:
        copies = width * (matrices // max(1, shapes.layers) if spec.local.gradient_checkpointing else matrices)
    return frozen * value + copies


def _activations(spec: JobSpec, shapes: Shapes, *, tokens: int, width: int) -> int:
    base = spec.base_model
    inner = [linear for linear in shapes.linear if "*" in linear.name]
    # A matrix that layers share is multiplied with in each of them.
    uses = [(max(linear.count, shapes.layers), linear) for linear in inner]
    values = sum(count * (linear.in_features + linear.out_features) for count, linear in uses)
    everything = tokens * width * values
    if base is not None and base.attention == "eager":
        heads = max(1, shapes.hidden_size // HEAD_SIZE)
        length = getattr(spec.task, "max_length", 0)
        everything += shapes.layers * 5 * width // 2 * heads * tokens * length
    if spec.local.gradient_checkpointing:
        layers = max(1, shapes.layers)
        return layers * tokens * width * shapes.hidden_size + everything // layers
    return everything
