"""Tensor files to encoded files and back, in constant memory (svd: a matrix at a time). Trainer and coordinator do it
with the same code.

With error feedback (Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847) what rounding lost is kept in a file
of its own, the residual, and added to what is encoded the next time:

    e = x - base + residual;   written = encode(e);   next residual = e - decode(written)

A residual also keeps the tensors that this file does not hold: with rolora A and B travel in turns.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import numpy as np

from protos.digests import new_hasher
from protos.encodings import NO_RANKS, Named, Ranks, encoded_bytes, encoded_header, ranks_of
from protos.errors import CorruptData, InvalidInput
from protos.low_rank import cut, product
from protos.rounding import Noise, Values, decode, encode
from protos.tensors import Layout, check_same_tensors, header_length, make_header, parse_header

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
    energy: float = 1.0,
) -> None:
    """Writes `values` minus `base` to `output`, encoded, and what rounding lost to `residual`; both are on disk then.

    `tensors` say what there is, in canonical order; `before` is the residual of the last time, and `energy` what svd
    keeps. Each file appears whole or not at all, the residual first. UpdateRejected: a value is not finite. OSError:
    what it began is removed.
    """
    wanted = {name: (name, "F32", shape) for name, _, shape in tensors}
    with ExitStack() as stack:
        old = stack.enter_context(TensorFile(base))
        lost = stack.enter_context(TensorFile(before)) if before else None
        kept = {t.name: (t.name, t.dtype, t.shape) for t in lost.layout.tensors} | wanted if lost else wanted
        out = stack.enter_context(_Fresh(output))
        ranks: dict[str, int] = {}
        waiting = None
        if encoding == "svd":
            # Its header says how large the factors became, so the data waits for it.
            waiting = stack.enter_context(tempfile.TemporaryFile(dir=output.parent))
        else:
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

            def difference_of(
                start: int, count: int, now: Part = now, then: Part = then, earlier: Part | None = earlier
            ) -> Values:
                difference = now(start, count) - then(start, count)
                return difference + earlier(start, count) if earlier else difference

            if waiting is not None:
                whole = difference_of(0, math.prod(shape))
                factors = cut(whole.reshape(shape), energy=energy, name=name)
                if factors is not None:
                    ranks[name] = len(factors)
                waiting.write(np.ascontiguousarray(whole if factors is None else factors).data)
                if keep:
                    for start, count in _chunks(len(whole)):
                        part = whole[start : start + count]
                        got = part if factors is None else values_of(factors, shape)(start, count)
                        keep.write(part - got)
                continue
            for start, count in _chunks(math.prod(shape)):
                difference = difference_of(start, count)
                written = encode(difference, encoding=encoding, block=block, noise=noise, start=start)
                out.write(written)
                if keep:
                    keep.write(difference - decode(written, count, encoding=encoding, block=block))
        if waiting is not None:
            out.write(encoded_header(tensors, encoding=encoding, block=block, ranks=ranks)[0])
            waiting.seek(0)
            while piece := waiting.read(CHUNK_VALUES * VALUE_BYTES):
                out.write(piece)
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
        ranks = check_encoded(new.layout, moved, encoding=encoding, block=block)
        with _Fresh(output) as out:
            out.write(make_header(named)[0])
            for tensor in old.layout.tensors:
                name, values = tensor.name, None
                if name in new:
                    values = decoded(new, name, tensor.shape, encoding=encoding, block=block, rank=ranks.get(name))
                then = old.leading(name, tensor.shape)
                for start, count in _chunks(tensor.elements):
                    out.write(then(start, count) + values(start, count) if values else then(start, count))
            return out.finish()


def check_encoded(file: Layout, tensors: Sequence[Named], *, encoding: str, block: int) -> Ranks:
    """The ranks of an encoded file (svd; else none) that holds these tensors, in canonical order.

    UpdateRejected with the first difference: a tensor that is missing, surplus, or not written in this encoding, or
    factors that are larger than their matrix.
    """
    ranks = ranks_of(file, tensors) if encoding == "svd" else NO_RANKS
    check_same_tensors(file, encoded_header(tensors, encoding=encoding, block=block, ranks=ranks)[1])
    return ranks


def decoded(
    file: TensorFile, name: str, shape: tuple[int, ...], *, encoding: str, block: int, rank: int | None = None
) -> Part:  # fmt: skip
    """The decoded values of a tensor of this shape in an encoded file. A start is a multiple of the block.

    `rank` is what `check_encoded` found for it. The factors of a matrix are in memory as long as what is returned.
    """
    if encoding == "svd":
        if rank is None:
            return file.leading(name, shape)
        return values_of(np.frombuffer(file.read(name, 0, rank * sum(shape) * VALUE_BYTES), dtype=np.float32), shape)

    def read(start: int, count: int) -> Values:
        where = encoded_bytes(start, encoding, block), encoded_bytes(count, encoding, block)
        return decode(np.frombuffer(file.read(name, *where), dtype=np.uint8), count, encoding=encoding, block=block)

    return read


def values_of(factors: Values, shape: tuple[int, ...]) -> Part:
    """The matrix of this shape that the factors stand for, a piece at a time."""
    factors = factors.reshape(-1, sum(shape))
    return lambda start, count: product(factors, rows=shape[0], first=start, last=start + count)


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
