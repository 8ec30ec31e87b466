"""What updates have to do with each other, in one reading of all of them and in constant memory.

A block of every update is in memory at once, so a larger cohort has smaller blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from coordinator.aggregation.reading import BLOCK_ELEMENTS, DTYPES, Reader
from coordinator.aggregation.robust import Matrix
from protos.tensors import Layout

# Of all updates together: 2 MiB of float64, beside which a sort or a difference needs as much again.
STACK_ELEMENTS = 1 << 18
# What an encoded update is read in multiples of.
ENCODED_ELEMENTS = 256


def block_elements(sites: int) -> int:
    """How many values of each of so many updates are taken at a time."""
    share = STACK_ELEMENTS // max(sites, 1) // ENCODED_ELEMENTS * ENCODED_ELEMENTS
    return min(BLOCK_ELEMENTS, max(ENCODED_ELEMENTS, share))


def stacked(readers: Sequence[Reader], count: int, dtype: np.dtype) -> Matrix:
    """The next `count` values of each, [sites, count], in float64."""
    values = np.empty((len(readers), count))
    for row, reader in zip(values, readers, strict=True):
        row[:] = reader.values(count, dtype)
    return values


def gram_matrix(
    readers: Sequence[Reader], *, before: Reader, layout: Layout, travelling: Collection[str]
) -> Matrix:  # fmt: skip
    """[sites, sites]: G_ij = Delta_i . Delta_j, where Delta_i is what a reader has less what `before` has.

    `layout` is that of `before`; the readers hold its `travelling` tensors, whole.
    """
    found = np.zeros((len(readers), len(readers)))
    step = block_elements(len(readers))
    for tensor in layout.tensors:
        dtype = DTYPES[tensor.dtype]
        for start in range(0, tensor.elements, step):
            count = min(step, tensor.elements - start)
            # It is read to its end all the same: its digest is taken from all of it.
            old = before.values(count, dtype).astype(np.float64)
            if tensor.name in travelling:
                values = stacked(readers, count, dtype)
                values -= old
                found += values @ values.T
    # What is not finite was damaged since it was admitted, as the digest will tell.
    return np.nan_to_num(found, copy=False, posinf=0.0, neginf=0.0)
