"""The weighted mean of tensor files, block by block in site order, in constant memory.

For each tensor in canonical order and each block of BLOCK_ELEMENTS: read the block from every update, add weight times
value in float64, apply the server optimizer, write. All updates are read through one buffer, so neither the number of
sites nor the size of the model is in the memory, and the sum is the same bit for bit on every run and for every order
of arrival. BLAKE3 of each input is taken from the bytes that are summed, not from an earlier reading.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from coordinator.aggregation.server_optimizer import OptimizerState, apply
from protos import tensors
from protos.digests import new_hasher
from protos.errors import CorruptData, SilotuneError
from protos.jobspec import NoServerOptimizer, ServerOptimizer

# 512 KiB of float64: two such buffers and one block of input stay in the second-level cache.
BLOCK_ELEMENTS = 1 << 16
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class CorruptUpdate(Exception):
    """A stored update does not match its digest; `site` says whose."""

    def __init__(self, site: str) -> None:
        super().__init__(f"the stored update of {site} does not match its digest")
        self.site = site


@dataclass(frozen=True)
class Input:
    site: str
    path: Path
    digest: str
    weight: float


@dataclass(frozen=True)
class Combined:
    """What came out: `digest` and `size` of the new version, and where the seconds went."""

    digest: str
    size: int
    optimizer_digest: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


def read_header(path: Path) -> tuple[bytes, tensors.Layout]:
    """The bytes before the data section of a tensor file, and its layout. UpdateRejected when it is not one."""
    with path.open("rb") as file:
        first = file.read(8)
        header = first + file.read(tensors.header_length(first) - 8)
    return header, tensors.parse_header(header, file_bytes=path.stat().st_size)


class _Reader:
    """Reads a tensor file once from beginning to end, hashing what it reads."""

    def __init__(self, path: Path, buffer: bytearray) -> None:
        """`buffer` is shared by all readers: it holds what was read last by any of them."""
        self._file: BinaryIO = path.open("rb", buffering=0)
        self._hasher = new_hasher()
        first = self._file.read(8)
        self._hasher.update(first)
        self._hasher.update(self._file.read(tensors.header_length(first) - 8))
        self._buffer = buffer

    def values(self, count: int, dtype: np.dtype) -> NDArray:
        """The next `count` values; valid until the next call to any reader."""
        view = memoryview(self._buffer)[: count * dtype.itemsize]
        filled = 0
        while filled < len(view):
            got = self._file.readinto(view[filled:])  # type: ignore[attr-defined]
            if not got:
                break
            filled += got
        self._hasher.update(view[:filled])
        view[filled:] = b"\0" * (len(view) - filled)
        return np.frombuffer(view, dtype=dtype)

    def close(self) -> str:
        """The digest of the whole file."""
        while got := self._file.readinto(self._buffer):  # type: ignore[attr-defined]
            self._hasher.update(memoryview(self._buffer)[:got])
        self._file.close()
        return self._hasher.hexdigest()


def _open(part: Input, buffer: bytearray) -> _Reader:
    try:
        return _Reader(part.path, buffer)
    except (OSError, SilotuneError) as error:
        raise CorruptUpdate(part.site) from error


def combine(
    inputs: Sequence[Input],
    *,
    output: Path,
    previous: Path | None = None,
    previous_digest: str = "",
    optimizer: ServerOptimizer | None = None,
    state: Path | None = None,
    state_digest: str = "",
    state_output: Path | None = None,
) -> Combined:
    """Writes sum(weight_k x_k), through the server optimizer where there is one, to `output`; fsyncs it.

    `inputs` are in site order and their weights sum to 1. `previous` is the version that they started from and `state`
    the server optimizer's after it (None: zero); both are needed only with an optimizer. CorruptUpdate: an input does
    not match its digest; CorruptData: `previous` or `state` does not. Nothing may be used of the output then.
    """
    optimizer = optimizer or NoServerOptimizer(type="none")
    began = time.perf_counter()
    buffer = bytearray(BLOCK_ELEMENTS * 8)
    readers = [_open(part, buffer) for part in inputs]
    try:
        header, layout = read_header(inputs[0].path)
    except SilotuneError as error:
        # It was admitted with a good header, so it is the disk's.
        raise CorruptUpdate(inputs[0].site) from error
    identity = isinstance(optimizer, NoServerOptimizer)
    before = None if identity or previous is None else _Reader(previous, buffer)
    memory = (
        None
        if identity or state_output is None
        else OptimizerState.begin(optimizer, layout, state, state_output, digest=state_digest)
    )
    hasher = new_hasher()
    total, term = np.empty(BLOCK_ELEMENTS), np.empty(BLOCK_ELEMENTS)
    with output.open("wb") as out:
        out.write(header)
        hasher.update(header)
        for tensor in layout.tensors:
            dtype = DTYPES[tensor.dtype]
            for start in range(0, tensor.elements, BLOCK_ELEMENTS):
                count = min(BLOCK_ELEMENTS, tensor.elements - start)
                mean, scaled = total[:count], term[:count]
                for place, (reader, part) in enumerate(zip(readers, inputs, strict=True)):
                    values = reader.values(count, dtype)
                    np.multiply(values, part.weight, out=scaled if place else mean, dtype=np.float64)
                    if place:
                        np.add(mean, scaled, out=mean)
                if before is not None and memory is not None:
                    old = before.values(count, dtype).astype(np.float64)
                    mean = apply(optimizer, old=old, mean=mean, state=memory.block(tensor, start, count))
                    memory.save()
                block = mean.astype(dtype).tobytes()
                out.write(block)
                hasher.update(block)
        combined = time.perf_counter()
        out.flush()
        os.fsync(out.fileno())
    for reader, part in zip(readers, inputs, strict=True):
        if reader.close() != part.digest:
            raise CorruptUpdate(part.site)
    if before is not None and before.close() != previous_digest:
        raise CorruptData("The version that the round started from no longer matches its digest.")
    optimizer_digest = memory.finish() if memory is not None else ""
    ended = time.perf_counter()
    return Combined(
        digest=hasher.hexdigest(),
        size=output.stat().st_size,
        optimizer_digest=optimizer_digest,
        seconds={"combine": combined - began, "sync": ended - combined},
    )
