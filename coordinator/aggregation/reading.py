"""One update file, read once from beginning to end and hashed as it is read: numbers, whatever way it is written.

An encoded update is the difference from the version that its round began with; what comes out of its reader are the
site's values, as out of a raw one's. So aggregation need not know how an update has travelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from protos import tensors
from protos.digests import new_hasher
from protos.encoded_files import VALUE_BYTES, Part, TensorFile, check_encoded, values_of
from protos.encodings import Named, encoded_bytes
from protos.rounding import decode

# 512 KiB of float64: two such buffers and one block of input stay in the second-level cache.
BLOCK_ELEMENTS = 1 << 16
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class Reader:
    """A file of raw values."""

    def __init__(self, path: Path, buffer: bytearray) -> None:
        """`buffer` is shared by all readers: it holds what was read last by any of them.

        OSError; UpdateRejected when this is no tensor file.
        """
        self._file: BinaryIO = path.open("rb", buffering=0)
        self._hasher = new_hasher()
        first = self._file.read(8)
        self._header = first + self._file.read(tensors.header_length(first) - 8)
        self._hasher.update(self._header)
        self._buffer = buffer

    def values(self, count: int, dtype: np.dtype) -> NDArray:
        """The next `count` values, of one tensor; valid until the next call to any reader."""
        return np.frombuffer(self._bytes(count * dtype.itemsize), dtype=dtype)

    def _bytes(self, count: int) -> memoryview:
        """The next bytes; zeros where the file ends early, which its digest will tell."""
        view = memoryview(self._buffer if count <= len(self._buffer) else bytearray(count))[:count]
        filled = 0
        while filled < count:
            got = self._file.readinto(view[filled:])  # type: ignore[attr-defined]
            if not got:
                break
            filled += got
        self._hasher.update(view[:filled])
        view[filled:] = b"\0" * (count - filled)
        return view

    def close(self) -> str:
        """The digest of the whole file."""
        while got := self._file.readinto(self._buffer):  # type: ignore[attr-defined]
            self._hasher.update(memoryview(self._buffer)[:got])
        self._file.close()
        return self._hasher.hexdigest()


class EncodedReader(Reader):
    """A file of encoded differences from `base`; its tensors are those of protos.adapters.update_tensors.

    Of a tensor that is asked for in pieces, each but the last is a multiple of 256 values: whole blocks. The factors of
    one matrix (svd) are in memory at a time.
    """

    def __init__(
        self, path: Path, buffer: bytearray, *, held: Sequence[Named], base: TensorFile, encoding: str, block: int
    ) -> None:
        """OSError; UpdateRejected when this is no tensor file, or one of other tensors."""
        super().__init__(path, buffer)
        layout = tensors.parse_header(self._header, file_bytes=path.stat().st_size, encoded=True)
        self._ranks = check_encoded(layout, held, encoding=encoding, block=block)
        self._base, self._encoding, self._block = base, encoding, block
        self._left = [tensor for tensor in held if 0 not in tensor[2]]
        self._then: Part | None = None
        self._matrix: Part | None = None
        self._at = self._elements = 0

    def values(self, count: int, dtype: np.dtype) -> NDArray:
        if self._at == self._elements:
            name, _, shape = self._left.pop(0)
            self._then, self._at, self._elements = self._base.leading(name, shape), 0, int(np.prod(shape))
            self._matrix = self._factors(self._ranks[name], shape) if name in self._ranks else None
        assert self._then is not None
        values = self._matrix(self._at, count) if self._matrix else self._decoded(count)
        values = values + self._then(self._at, count)
        self._at += count
        return values.astype(dtype, copy=False)

    def _factors(self, rank: int, shape: tuple[int, ...]) -> Part:
        written = self._bytes(rank * sum(shape) * VALUE_BYTES)
        # A copy: the buffer serves the next reader too.
        return values_of(np.frombuffer(bytes(written), dtype=np.float32), shape)

    def _decoded(self, count: int) -> NDArray:
        if self._encoding == "svd":
            return super().values(count, np.dtype(np.float32))
        written = np.frombuffer(self._bytes(encoded_bytes(count, self._encoding, self._block)), dtype=np.uint8)
        return decode(written, count, encoding=self._encoding, block=self._block)


def digest_of_file(path: Path) -> str:
    """Read in pieces: a mapped file would count its whole size as memory."""
    hasher = new_hasher()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(1 << 20):
            hasher.update(piece)
    return hasher.hexdigest()
