"""Tensor files open in the safetensors library, and hostile ones are refused before they cost anything."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from protos import tensors
from protos.errors import UpdateRejected

NUMPY_TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def header(entries: object) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def entry(begin: int, end: int, *, shape: object = None, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def parse(entries: object, *, data_bytes: int) -> tensors.Layout:
    raw = header(entries)
    return tensors.parse_header(raw, file_bytes=len(raw) + data_bytes)


names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,40}", fullmatch=True).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
contents = st.dictionaries(names, st.tuples(st.sampled_from(sorted(NUMPY_TYPES)), shapes), max_size=6)


@given(contents)
def test_what_is_written_here_is_read_by_the_safetensors_library(
    content: dict[str, tuple[str, tuple[int, ...]]],
) -> None:
    raw, layout = tensors.make_header((name, dtype, shape) for name, (dtype, shape) in content.items())
    data = bytes(range(256)) * (layout.data_bytes // 256 + 1)
    loaded = safetensors.numpy.load(raw + data[: layout.data_bytes])
    assert {name: (array.dtype, array.shape) for name, array in loaded.items()} == {
        name: (np.dtype(NUMPY_TYPES[dtype]), shape) for name, (dtype, shape) in content.items()
    }
    for spec in layout.tensors:
        assert loaded[spec.name].tobytes() == data[spec.offset : spec.offset + spec.size_bytes]


@given(contents)
def test_what_the_safetensors_library_writes_is_read_here(content: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    arrays = {name: np.ones(shape, NUMPY_TYPES[dtype]) for name, (dtype, shape) in content.items()}
    raw = safetensors.numpy.save(arrays)
    length = tensors.header_length(raw[:8])
    layout = tensors.parse_header(raw[:length], file_bytes=len(raw))
    assert {spec.name: spec.shape for spec in layout.tensors} == {name: array.shape for name, array in arrays.items()}
    assert layout.file_bytes == len(raw)


@given(contents)
def test_a_layout_survives_its_own_header(content: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    raw, layout = tensors.make_header((name, dtype, shape) for name, (dtype, shape) in content.items())
    assert tensors.header_length(raw[:8]) == len(raw) == layout.data_start
    assert len(raw) % 8 == 0
    assert tensors.parse_header(raw, file_bytes=layout.file_bytes) == layout


def test_two_sites_write_the_same_header_whatever_their_order() -> None:
    content = [("b", "F32", (2,)), ("a", "BF16", (3, 1)), ("a.b", "F16", ())]
    assert tensors.make_header(content) == tensors.make_header(reversed(content))


def test_bfloat16_is_two_bytes_an_element(tmp_path: Path) -> None:
    raw, layout = tensors.make_header([("w", "BF16", (3, 5))])
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw + bytes(30))
    assert layout.file_bytes == path.stat().st_size
    with safetensors.safe_open(path, framework="numpy") as opened:
        assert list(opened.keys()) == ["w"]
        assert opened.get_slice("w").get_dtype() == "BF16"


def test_an_absurd_header_length_is_refused_before_it_is_read() -> None:
    for length in (tensors.MAX_HEADER_BYTES + 1, 1 << 40, (1 << 64) - 1):
        with pytest.raises(UpdateRejected, match="the limit is"):
            tensors.header_length(struct.pack("<Q", length))


@pytest.mark.parametrize("size", range(8))
def test_a_file_shorter_than_its_length_field_is_refused(size: int) -> None:
    with pytest.raises(UpdateRejected, match="shorter"):
        tensors.header_length(bytes(size))


@pytest.mark.parametrize(
    ("entries", "data_bytes", "sentence"),
    [
        (b'{"a":1', 0, "not valid JSON"),
        (b"\xff\xfe{}", 0, "JSON"),
        (b"[" * 100_000, 0, "not valid JSON"),
        (b'{"a":' + b"9" * 10_000 + b"}", 0, "JSON"),
        ([], 0, "not a JSON object"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', 4, "a name occurs twice"),
        (b'{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', 4, "a name occurs twice"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "byte 4 was expected"),
        ({"a": entry(4, 8)}, 8, "byte 0 was expected"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "byte 8 was expected"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, 4, "byte 4 was expected"),
        ({"a": entry(0, 4)}, 5, "its header describes"),
        ({"a": entry(0, 4)}, 3, "its header describes"),
        ({}, 1, "its header describes"),
        ({"a": entry(0, 4, shape=[2])}, 4, "its shape needs 8"),
        ({"a": entry(0, 4, shape=[1 << 62])}, 4, "bad shape"),
        ({"a": entry(0, 4, shape=[1 << 40] * 8)}, 4, "its shape needs"),
        ({"a": entry(0, 4, shape=[1] * 9)}, 4, "bad shape"),
        ({"a": entry(0, 4, shape=[-1])}, 4, "bad shape"),
        ({"a": entry(0, 4, shape=[True])}, 4, "bad shape"),
        ({"a": entry(0, 4, shape=[1.0])}, 4, "bad shape"),
        ({"a": entry(0, 4, shape="x")}, 4, "bad shape"),
        ({"a": entry(-4, 0)}, 0, "bad offsets"),
        ({"a": entry(4, 0, shape=[1])}, 4, "claims"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4.0]}}, 4, "bad offsets"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, 4, "lacks"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": None}}, 4, "lacks"),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, "lacks"),
        ({"a": "F32"}, 4, "lacks"),
        ({"a": entry(0, 4, dtype="I32")}, 4, "only F64, F32, F16, BF16 travel"),
        ({"a": entry(0, 4, dtype="x" * 500)}, 4, "travel"),
        ({"a": entry(0, 4, dtype=["F32"])}, 4, "travel"),
        ({"a": entry(0, 4, dtype=None)}, 4, "travel"),
    ],
)
def test_a_hostile_header_is_refused_in_one_sentence(entries: object, data_bytes: int, sentence: str) -> None:
    with pytest.raises(UpdateRejected, match=sentence) as caught:
        parse(entries, data_bytes=data_bytes)
    assert "\n" not in caught.value.message and len(caught.value.message) < 400


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a/b", "", ".hidden", "a b", "a\0", "é", "x" * 513]
)
def test_a_name_that_could_be_a_path_is_no_tensor_name(name: str) -> None:
    with pytest.raises(UpdateRejected, match="is not a tensor name"):
        parse({name: entry(0, 4)}, data_bytes=4)


keys = st.sampled_from(["a", "dtype", "shape", "data_offsets"])
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner),
)


@given(
    anything
    | st.dictionaries(names, st.fixed_dictionaries({"dtype": anything, "shape": anything, "data_offsets": anything}))
)
def test_any_json_is_a_layout_or_a_refusal(entries: object) -> None:
    with suppress(UpdateRejected):
        parse(entries, data_bytes=4)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_layout_or_a_refusal(junk: bytes) -> None:
    with suppress(UpdateRejected):
        parse(junk, data_bytes=0)


EXPECTED = [("a", "F32", (2, 3)), ("b", "F32", (4,))]


@pytest.mark.parametrize(
    ("update", "sentence"),
    [
        ([("a", "F32", (2, 3))], "'b' is missing"),
        ([*EXPECTED, ("c", "F32", (1,))], "'c' that the global model does not have"),
        ([("a", "F32", (3, 2)), ("b", "F32", (4,))], r"'a' has shape \[3, 2\]; \[2, 3\] was expected"),
        ([("a", "F32", (2, 3)), ("b", "F16", (4,))], "'b' has dtype F16; F32 was expected"),
    ],
)
def test_an_update_has_the_tensors_of_the_global_model(
    update: list[tuple[str, str, tuple[int, ...]]], sentence: str
) -> None:
    _, expected = tensors.make_header(EXPECTED)
    with pytest.raises(UpdateRejected, match=sentence):
        tensors.check_same_tensors(tensors.make_header(update)[1], expected)


def test_an_update_in_another_order_is_refused() -> None:
    _, expected = tensors.make_header(EXPECTED)
    shuffled = parse({"b": entry(0, 16), "a": entry(16, 40, shape=[2, 3])}, data_bytes=40)
    with pytest.raises(UpdateRejected, match="canonical order"):
        tensors.check_same_tensors(shuffled, expected)
    tensors.check_same_tensors(tensors.make_header(reversed(EXPECTED))[1], expected)
