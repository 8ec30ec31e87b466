"""Whether an update may count: its header and its numbers, before it is accepted."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from coordinator.aggregation.combine import BLOCK_ELEMENTS, DTYPES, read_header
from protos import tensors
from protos.errors import UpdateRejected


def read_layout(path: Path) -> tensors.Layout:
    """The layout of a tensor file. UpdateRejected when its header is not one."""
    return read_header(path)[1]


def check_update(path: Path, *, expected: tensors.Layout | None) -> tensors.Layout:
    """The layout of an update that may count.

    `expected` is the layout of the version that the round started from; None for version 0. UpdateRejected names the
    first tensor that is missing, surplus, of another shape or dtype, or not finite. Memory: one block.
    """
    layout = read_layout(path)
    if not layout.tensors:
        raise UpdateRejected("The update has no tensors.")
    if expected is not None:
        tensors.check_same_tensors(layout, expected)
    with path.open("rb", buffering=0) as file:
        file.seek(layout.data_start)
        for tensor in layout.tensors:
            dtype = DTYPES[tensor.dtype]
            for start in range(0, tensor.elements, BLOCK_ELEMENTS):
                count = min(BLOCK_ELEMENTS, tensor.elements - start)
                values = np.frombuffer(file.read(count * dtype.itemsize), dtype=dtype)
                if not _all_finite(values):
                    raise UpdateRejected(
                        f"Tensor {tensor.name!r} has values that are not finite (NaN or infinite).",
                        hint="The training diverged: a lower learning rate or gradient clipping may help.",
                    )
    return layout


def _all_finite(values: np.ndarray) -> bool:
    # The dot product is finite for all but absurd values and twice as fast as looking at each of them.
    with np.errstate(over="ignore", invalid="ignore"):
        if values.dtype == np.float32 and math.isfinite(float(np.dot(values, values))):
            return True
    return bool(np.isfinite(values).all())
