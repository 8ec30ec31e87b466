"""Tensor files to encoded files and back, in constant memory. Trainer and coordinator do it with the same code.

With error feedback (Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847) what rounding lost is kept in a file
of its own, the residual, and added to what is encoded the next time:

    e = x - base + residual;   written = encode(e);   next residual = e - decode(written)

A residual also keeps the tensors that this file does not hold: with rolora A and B travel in turns.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import numpy as np

from protos.digests import new_hasher
from protos.encodings import Named, encoded_bytes, encoded_header
from protos.errors import CorruptData, InvalidInput
from protos.rounding import Noise, Values, decode, encode
from protos.tensors import TensorSpec, check_same_tensors, header_length, make_header, parse_header

# 1 MiB of float32; whole blocks of every size.
CHUNK_VALUES = 1 << 18
VALUE_BYTES = 4

# The values start .. start + count of a tensor, row-major.
Part = Callable[[int, int], Values]
# The values of a named tensor.
Source = Callable[[str], Part]


class TensorFile:
    """A tensor file that is read wherever it is asked for. Close it, or use it as a context manager."""

    def __init__(self, path: Path, *, encoded: bool = False) -> None:
        """UpdateRejected: it is no tensor file."""
        with path.open("rb") as file:
            first = file.read(8)
            header = first + file.read(header_length(first) - 8)
        self.layout = parse_header(header, file_bytes=path.stat().st_size, encoded=encoded)
        self._specs = {tensor.name: tensor for tensor in self.layout.tensors}
        self._handle = os.open(path, os.O_RDONLY)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    def __contains__(self, name: str) -> bool:
        return name in self._specs

    def shape(self, name: str) -> tuple[int, ...]:
        return self._specs[name].shape

    def read(self, name: str, start_byte: int, count_bytes: int) -> bytes:
        """CorruptData when the file has become shorter than its header says."""
        found = os.pread(self._handle, count_bytes, self.layout.data_start + self._specs[name].offset + start_byte)
        if len(found) != count_bytes:
            raise CorruptData("A tensor file ended early.")
        return found

    def leading(self, name: str, shape: tuple[int, ...]) -> Part:
        """The leading part of a float32 tensor that has this shape, such as the first columns of a matrix."""
        spec = self._specs[name]
        if spec.dtype != "F32":
            raise InvalidInput(f"Tensor {name!r} is {spec.dtype}; only float32 tensors can be encoded.")

        def read(start: int, count: int) -> Values:
            return np.frombuffer(self.read(name, start * VALUE_BYTES, count * VALUE_BYTES), dtype=np.float32)

        if spec.shape[1:] == shape[1:]:
            return read
        # Only the factors of an adapter are cut so, and they are small.
        whole = read(0, spec.elements).reshape(spec.shape)
        values = np.ascontiguousarray(whole[tuple(slice(length) for length in shape)]).reshape(-1)
        return lambda start, count: values[start : start + count]


def write_encoded(
    values: Source,
    *,
    tensors: Sequence[Named],
    base: Path,
    encoding: str,
    block: int,
    seed: int,
    output: Path,
    before: Path | None = None,
    residual: Path | None = None,
) -> None:
    """Writes `values` minus `base` to `output`, encoded, and what rounding lost to `residual`; both are on disk then.

    `tensors` say what there is, in canonical order; `before` is the residual of the last time. Each file appears whole
    or not at all, the residual first. UpdateRejected: a value is not finite. OSError: what it began is removed.
    """
    wanted = {name: (name, "F32", shape) for name, _, shape in tensors}
    with ExitStack() as stack:
        old = stack.enter_context(TensorFile(base))
        lost = stack.enter_context(TensorFile(before)) if before else None
        kept = {t.name: (t.name, t.dtype, t.shape) for t in lost.layout.tensors} | wanted if lost else wanted
        out = stack.enter_context(_Fresh(output))
        out.write(encoded_header(tensors, encoding=encoding, block=block)[0])
        keep = stack.enter_context(_Fresh(residual)) if residual else None
        if keep:
            keep.write(make_header(kept.values())[0])
        for name, _, shape in sorted(kept.values()):
            earlier = lost.leading(name, shape) if lost and name in lost else None
            if name not in wanted:
                for start, count in _chunks(math.prod(shape)):
                    if keep and earlier:
                        keep.write(earlier(start, count))
                continue
            now, then, noise = values(name), old.leading(name, shape), Noise(seed, name=name)
            for start, count in _chunks(math.prod(shape)):
                difference = now(start, count) - then(start, count)
                if earlier:
                    difference += earlier(start, count)
                written = encode(difference, encoding=encoding, block=block, noise=noise, start=start)
                out.write(written)
                if keep:
                    keep.write(difference - decode(written, count, encoding=encoding, block=block))
        if keep:
            keep.finish()
        out.finish()


def rebuild(
    encoded: Path, *, base: Path, encoding: str, block: int, output: Path, tensors: Sequence[Named] | None = None
) -> str:  # fmt: skip
    """Writes `base` plus the decoded difference to `output`, which is on disk then; the digest of what was written.

    The difference holds `tensors`, all of `base` by default; the others stay as they are. UpdateRejected: it holds
    something else, or in another encoding.
    """
    with TensorFile(base) as old, TensorFile(encoded, encoded=True) as new:
        named = old.layout.named
        moved = named if tensors is None else tensors
        check_same_tensors(new.layout, encoded_header(moved, encoding=encoding, block=block)[1])
        with _Fresh(output) as out:
            out.write(make_header(named)[0])
            for tensor in old.layout.tensors:
                values = decoded(new, tensor, encoding=encoding, block=block) if tensor.name in new else None
                then = old.leading(tensor.name, tensor.shape)
                for start, count in _chunks(tensor.elements):
                    out.write(then(start, count) + values(start, count) if values else then(start, count))
            return out.finish()


def decoded(file: TensorFile, tensor: TensorSpec, *, encoding: str, block: int) -> Part:
    """The decoded values of one tensor of an encoded file. A start is a multiple of the block."""

    def read(start: int, count: int) -> Values:
        where = encoded_bytes(start, encoding, block), encoded_bytes(count, encoding, block)
        return decode(
            np.frombuffer(file.read(tensor.name, *where), dtype=np.uint8), count, encoding=encoding, block=block
        )

    return read


class _Fresh:
    """A file that is written under another name and takes its own when it is whole."""

    def __init__(self, path: Path) -> None:
        self._path, self._temporary = path, path.with_suffix(".new")
        self._file = self._temporary.open("wb", buffering=0)
        self._hasher = new_hasher()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def write(self, content: bytes | np.ndarray) -> None:
        data = memoryview(content).cast("B")  # type: ignore[arg-type]
        self._hasher.update(data)
        while data:
            data = data[self._file.write(data) :]

    def finish(self) -> str:
        """The digest of what is on disk when this returns."""
        os.fsync(self._file.fileno())
        self._temporary.rename(self._path)
        return self._hasher.hexdigest()


def _chunks(elements: int) -> Iterator[tuple[int, int]]:
    return ((start, min(CHUNK_VALUES, elements - start)) for start in range(0, elements, CHUNK_VALUES))
