"""Whether an update may count: its header and its numbers, before it is accepted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from coordinator.aggregation.combine import BLOCK_ELEMENTS, DTYPES
from protos import tensors
from protos.encoded_files import TensorFile, check_encoded, decoded
from protos.encodings import NO_RANKS, Named
from protos.errors import UpdateRejected

# No weight of a model comes near it, and nothing that is made of such values overflows: no product of factors, and no
# version that is rounded for the way down (LARGEST in protos/rounding.py).
LARGEST_ADMITTED = 1e18


def read_layout(path: Path) -> tensors.Layout:
    """The layout of a tensor file. UpdateRejected when its header is not one."""
    with TensorFile(path) as file:
        return file.layout


def check_update(
    path: Path, *, expected: Sequence[Named] | None, encoding: str = "raw", block: int = 0
) -> tensors.Layout:
    """The layout of an update that may count.

    `expected` are the tensors that this site trained (protos.adapters.update_tensors); None for version 0. They are
    written in this encoding. UpdateRejected names the first tensor that is missing, surplus, of another shape or dtype,
    not finite or absurdly large. Memory: one block; of svd one matrix.
    """
    with TensorFile(path, encoded=encoding != "raw") as file:
        layout = file.layout
        if not layout.tensors:
            raise UpdateRejected("The update has no tensors.")
        ranks = NO_RANKS
        if expected is not None:
            ranks = check_encoded(layout, expected, encoding=encoding, block=block)
        # Both are in the same order.
        for tensor, (_, _, shape) in zip(layout.tensors, sorted(expected or []) or layout.named, strict=True):
            part: Callable[[int, int], np.ndarray]
            if encoding == "raw":
                part = _raw(file, tensor)
            else:
                rank = ranks.get(tensor.name)
                part = decoded(file, tensor.name, shape, encoding=encoding, block=block, rank=rank)
            elements = math.prod(shape)
            for start in range(0, elements, BLOCK_ELEMENTS):
                if not _is_sane(part(start, min(BLOCK_ELEMENTS, elements - start))):
                    raise UpdateRejected(
                        f"Tensor {tensor.name!r} has values that are not finite, or absurdly large.",
                        hint="The training diverged: a lower learning rate or gradient clipping may help.",
                    )
    return layout


def _raw(file: TensorFile, tensor: tensors.TensorSpec) -> Callable[[int, int], np.ndarray]:
    dtype = DTYPES[tensor.dtype]

    def read(start: int, count: int) -> np.ndarray:
        return np.frombuffer(file.read(tensor.name, start * dtype.itemsize, count * dtype.itemsize), dtype=dtype)

    return read


def _is_sane(values: np.ndarray) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        # The dot product is twice as fast as looking at each value, and no value is larger than its root.
        if values.dtype == np.float32 and float(np.dot(values, values)) <= LARGEST_ADMITTED**2:
            return True
        # A NaN is no smaller than anything.
        return float(np.abs(values).max(initial=0)) <= LARGEST_ADMITTED
