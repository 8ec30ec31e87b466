"""Named tensors as bytes: the safetensors layout, read and written without holding a tensor in memory.

An 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data. Hugging Face
opens such a file directly. Written here in canonical order (names sorted), so that two sites with the same tensors
produce the same header byte for byte, and aggregation walks all updates with one set of offsets.

The safetensors library accepts duplicate names, names with path separators and headers of gigabytes; what comes from
another machine is therefore parsed here, with the header capped before it is read.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from protos.errors import UpdateRejected

MAX_HEADER_BYTES = 4 << 20
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# What no value has: the blocks of an encoded file (protos/encodings.py).
BLOCKS_DTYPE = "U8"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,511}")


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: floating point (or encoded blocks), row-major, `offset` bytes into the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.elements * (1 if self.dtype == BLOCKS_DTYPE else DTYPE_BYTES[self.dtype])


@dataclass(frozen=True)
class Layout:
    """The table of contents of a tensor file; `data_start` is where the data section begins."""

    tensors: tuple[TensorSpec, ...]
    data_start: int

    @property
    def named(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """(name, dtype, shape) of each, as `make_header` takes them."""
        return [(tensor.name, tensor.dtype, tensor.shape) for tensor in self.tensors]

    @property
    def data_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def file_bytes(self) -> int:
        return self.data_start + self.data_bytes


def make_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, Layout]:
    """The bytes before the data section, and the layout, for (name, dtype, shape) in canonical order.

    The header is padded with spaces to a multiple of 8 bytes, as safetensors does.
    """
    entries: dict[str, object] = {}
    specs: list[TensorSpec] = []
    offset = 0
    for name, dtype, shape in sorted(tensors):
        spec = TensorSpec(name, dtype, tuple(shape), offset)
        specs.append(spec)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + spec.size_bytes]}
        offset += spec.size_bytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return header, Layout(tuple(specs), len(header))


def header_length(first_bytes: bytes) -> int:
    """Bytes before the data section, from the first 8 bytes of a file. UpdateRejected when absurd."""
    if len(first_bytes) < 8:
        raise UpdateRejected("The tensor file is shorter than its own header length field.")
    (length,) = struct.unpack_from("<Q", first_bytes)
    if length > MAX_HEADER_BYTES:
        raise UpdateRejected(f"The tensor file claims a header of {length} bytes; the limit is {MAX_HEADER_BYTES}.")
    return 8 + length


def parse_header(header: bytes, *, file_bytes: int, encoded: bool = False) -> Layout:
    """The layout from the whole header (length field included) of a file of `file_bytes`.

    Only where it is `encoded` may tensors be blocks. UpdateRejected: not JSON, unknown dtype, bad name, duplicate name,
    a hole, an overlap or trailing bytes.
    """
    try:
        entries = json.loads(header[8:], object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise UpdateRejected(f"The tensor file's header is not valid JSON: {error}.") from error
    if not isinstance(entries, dict):
        raise UpdateRejected("The tensor file's header is not a JSON object.")
    entries.pop("__metadata__", None)
    specs: list[TensorSpec] = []
    for name, entry in entries.items():
        specs.append(_spec(name, entry, known=(*DTYPE_BYTES, BLOCKS_DTYPE) if encoded else tuple(DTYPE_BYTES)))
    # A tensor without elements stands before the one that begins at the same byte.
    specs.sort(key=lambda spec: (spec.offset, spec.size_bytes, spec.name))
    position = 0
    for spec in specs:
        if spec.offset != position:
            raise UpdateRejected(f"Tensor {spec.name!r} begins at byte {spec.offset}; byte {position} was expected.")
        position += spec.size_bytes
    if len(header) + position != file_bytes:
        raise UpdateRejected(f"The tensor file has {file_bytes} bytes; its header describes {len(header) + position}.")
    return Layout(tuple(specs), len(header))


def check_same_tensors(layout: Layout, expected: Layout) -> None:
    """UpdateRejected with the first difference, unless names, dtypes, shapes and order are the same."""
    have = {spec.name: spec for spec in layout.tensors}
    want = {spec.name: spec for spec in expected.tensors}
    for name in want:
        if name not in have:
            raise UpdateRejected(f"Tensor {name!r} is missing from the update.")
    for name, spec in have.items():
        if name not in want:
            raise UpdateRejected(f"The update has a tensor {name!r} that the global model does not have.")
        if spec.shape != want[name].shape:
            raise UpdateRejected(
                f"Tensor {name!r} has shape {list(spec.shape)}; {list(want[name].shape)} was expected."
            )
        if spec.dtype != want[name].dtype:
            raise UpdateRejected(f"Tensor {name!r} has dtype {spec.dtype}; {want[name].dtype} was expected.")
    if [spec.name for spec in layout.tensors] != [spec.name for spec in expected.tensors]:
        raise UpdateRejected("The update's tensors are not in canonical order (sorted by name).")


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _spec(name: str, entry: object, *, known: tuple[str, ...]) -> TensorSpec:
    if not _NAME.fullmatch(name):
        raise UpdateRejected(f"{name[:80]!r} is not a tensor name.")
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]  # type: ignore[index]
    except (KeyError, TypeError, ValueError) as error:
        raise UpdateRejected(f"Tensor {name!r} lacks dtype, shape or data_offsets.") from error
    if not isinstance(dtype, str) or dtype not in known:
        raise UpdateRejected(f"Tensor {name!r} has dtype {str(dtype)[:20]!r}; only {', '.join(known)} travel.")
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
        raise UpdateRejected(f"Tensor {name!r} has a bad shape.")
    if type(begin) is not int or type(end) is not int or begin < 0:
        raise UpdateRejected(f"Tensor {name!r} has bad offsets.")
    spec = TensorSpec(name, dtype, tuple(shape), begin)
    if end - begin != spec.size_bytes:
        raise UpdateRejected(f"Tensor {name!r} claims {end - begin} bytes; its shape needs {spec.size_bytes}.")
    return spec
