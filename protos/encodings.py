"""How an encoded update or version is written, and how many bytes it has. The numbers: protos/rounding.py.

An encoded file is a safetensors file with the names of what it stands for, in canonical order. Shapes come from what
the reader expects, not from the file. What a tensor becomes:

    raw     the values themselves
    bf16    a BF16 tensor of the same shape
    int8    a U8 tensor of one axis: blocks of  [scale: bf16 | q: `block` signed bytes]
    int4    the same with  [scale: bf16 | q: `block` / 2 bytes]; byte i holds q[i] in its low half, q[i + block / 2] in
            its high half, both signed
    svd     of a matrix [P, Q] an F32 tensor [K, P + Q] of factors (protos/low_rank.py), where that is smaller; the
            values themselves of everything else. K is the file's own: K = 0 stands for zeros

A value of int8 and int4 is scale x q. A last block that is not full is padded with zeros. All of it is little-endian.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from protos.tensors import BLOCKS_DTYPE, DTYPE_BYTES, Layout, make_header

SCALE_BYTES = 2
BITS = {"int8": 8, "int4": 4}

Named = tuple[str, str, tuple[int, ...]]
# The ranks of the matrices that are written as factors, by name.
Ranks = Mapping[str, int]
NO_RANKS: Ranks = {}


def block_bytes(encoding: str, block: int) -> int:
    """The bytes of one block of int8 or int4, its scale included."""
    return SCALE_BYTES + block * BITS[encoding] // 8


def encoded_bytes(elements: int, encoding: str, block: int) -> int:
    """The bytes of one float32 tensor of so many values in the data section."""
    if encoding in BITS:
        return -(-elements // block) * block_bytes(encoding, block)
    return elements * DTYPE_BYTES["BF16" if encoding == "bf16" else "F32"]


def may_be_cut(shape: tuple[int, ...], *, rank: int) -> bool:
    """Whether factors of this rank are smaller than the tensor."""
    return len(shape) == 2 and rank * sum(shape) < shape[0] * shape[1]


def ranks_of(file: Layout, tensors: Iterable[Named]) -> dict[str, int]:
    """The ranks in an svd file that stands for these tensors, of what can be factors of them and is small enough."""
    shapes = {name: shape for name, _, shape in tensors}
    found = {}
    for tensor in file.tensors:
        shape = shapes.get(tensor.name, ())
        # Factors of a matrix are wider than it.
        is_cut = len(tensor.shape) == 2 and tensor.shape[1] == sum(shape)
        if is_cut and may_be_cut(shape, rank=tensor.shape[0]):
            found[tensor.name] = tensor.shape[0]
    return found


def encoded_header(
    tensors: Iterable[Named], *, encoding: str, block: int, ranks: Ranks = NO_RANKS
) -> tuple[bytes, Layout]:  # fmt: skip
    """`make_header` of the file that stands for these (name, dtype, shape); the layout's `file_bytes` are exact.

    Of svd only where `ranks` are given; without them it is the largest file that there can be.
    """

    def written(tensor: Named) -> Named:
        name, _, shape = tensor
        if name in ranks:
            return name, "F32", (ranks[name], sum(shape))
        if encoding == "bf16":
            return name, "BF16", shape
        if encoding in BITS:
            return name, BLOCKS_DTYPE, (encoded_bytes(math.prod(shape), encoding, block),)
        return tensor

    return make_header(written(tensor) for tensor in tensors)


def block_of(encoding: str, block: int) -> int:
    """What a manifest says of the block: 0 where an encoding has no scales."""
    return block if encoding in BITS else 0
