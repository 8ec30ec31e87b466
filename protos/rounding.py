"""From float32 numbers to blocks of few bits and back, rounded at random without bias; see protos/encodings.py.

A value x of a block with scale s becomes q = floor(x / s + u) with u uniform in (0, 1), so that the mean of s q is x
(stochastic rounding, as in QSGD, Alistarh et al. 2017, arXiv:1610.02132). s is the block's largest magnitude over 127
(int8) or 7 (int4), rounded up to bfloat16 so that the largest magnitude still fits. u comes from Philox (Salmon et al.
2011), a generator with random access: what a value is rounded with follows from the seed, the tensor's name and the
value's place alone, so encoding repeats bit for bit on every machine, in pieces of whatever size.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from protos.encodings import BITS, SCALE_BYTES, block_bytes
from protos.errors import UpdateRejected

Values = NDArray[np.float32]

# A magnitude beyond it is no weight of a model but a training that diverged; below it nothing here overflows.
LARGEST = np.float32(1e36)
# Values for which Philox makes one step of its counter: four words of 64 bits, 16 bits each.
STEP_VALUES = 16


class Noise:
    """The random bits of one tensor: 16 for each of its values."""

    def __init__(self, seed: int, *, name: str) -> None:
        self.name = name
        self._key = int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:16], "little")

    def bits(self, start: int, count: int) -> NDArray[np.uint16]:
        """Of the values start .. start + count; `start` is a multiple of STEP_VALUES."""
        words = np.random.Philox(key=self._key, counter=start // STEP_VALUES).random_raw(-(-count // 4))
        return words.astype("<u8", copy=False).view("<u2")[:count]


def encode(values: Values, *, encoding: str, block: int, noise: Noise, start: int) -> NDArray[np.uint8]:
    """The bytes of values start .. of a tensor. `start`, and all but a tensor's last length, are whole blocks.

    UpdateRejected: a value is not finite, or absurdly large.
    """
    if encoding == "bf16":
        check_sane(np.abs(values).max(initial=0), name=noise.name)
        # Adding 16 random bits to the 16 that are cut off carries into the rest as often as it should.
        rounded = (values.view(np.uint32) + noise.bits(start, len(values))) >> np.uint32(16)
        return rounded.astype("<u2").view(np.uint8)
    blocks = -(-len(values) // block)
    if len(values) < blocks * block:
        values = np.concatenate([values, np.zeros(blocks * block - len(values), dtype=np.float32)])
    rows = values.reshape(blocks, block)
    largest = np.maximum(rows.max(axis=1), -rows.min(axis=1))
    check_sane(largest.max(initial=0), name=noise.name)
    top = (1 << (BITS[encoding] - 1)) - 1
    scales = _scales(largest, top=top)
    wide = _widened(scales)
    wide[wide == 0] = 1
    # In the middle of its 2^-16, so that what is next to nothing is never rounded away from 0; all of it is exact.
    whole = noise.bits(start, rows.size).astype(np.float32).reshape(rows.shape)
    whole *= np.float32(2**-16)
    whole += np.float32(2**-17)
    whole += rows / wide[:, None]
    whole = np.floor(whole, out=whole).astype(np.int8)
    written = np.empty((blocks, block_bytes(encoding, block)), dtype=np.uint8)
    written[:, :SCALE_BYTES] = scales.astype("<u2").view(np.uint8).reshape(blocks, SCALE_BYTES)
    if encoding == "int8":
        written[:, SCALE_BYTES:] = whole.view(np.uint8)
    else:
        half = whole.view(np.uint8)
        written[:, SCALE_BYTES:] = (half[:, : block // 2] & 0x0F) | (half[:, block // 2 :] << 4)
    return written.reshape(-1)


def decode(written: NDArray[np.uint8], count: int, *, encoding: str, block: int) -> Values:
    """`count` values from the bytes that `encode` made of them. What was damaged may decode to anything."""
    if encoding == "bf16":
        return _widened(written.view("<u2"))
    rows = written.reshape(-1, block_bytes(encoding, block))
    wide = _widened(np.ascontiguousarray(rows[:, :SCALE_BYTES]).view("<u2")[:, 0])[:, None]
    codes = rows[:, SCALE_BYTES:]
    values = np.empty((len(rows), block), dtype=np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        if encoding == "int8":
            np.multiply(codes.view(np.int8), wide, out=values)
        else:
            # Shifts of signed bytes keep the sign.
            np.multiply((codes << 4).view(np.int8) >> 4, wide, out=values[:, : block // 2])
            np.multiply(codes.view(np.int8) >> 4, wide, out=values[:, block // 2 :])
    return values.reshape(-1)[:count]


def _widened(halves: NDArray[np.uint16]) -> Values:
    """The float32 values of bfloat16 bits."""
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _scales(largest: Values, *, top: int) -> NDArray[np.uint16]:
    """bfloat16 bits of largest / top, rounded up."""
    exact = largest.astype(np.float64) / top
    near = exact.astype(np.float32)
    near = np.where(near < exact, np.nextafter(near, np.float32(np.inf)), near)
    return ((near.view(np.uint32) + np.uint32(0xFFFF)) >> np.uint32(16)).astype(np.uint16)


def check_sane(largest: np.float32, *, name: str) -> None:
    """UpdateRejected when the largest magnitude of what a tensor changed by is not finite, or absurdly large."""
    if not largest <= LARGEST:
        raise UpdateRejected(
            f"Tensor {name!r} has changed to values that are not finite, or absurdly large.",
            hint="The training diverged: a lower learning rate or gradient clipping may help.",
        )
