"""An update that may not count is refused with the first thing that is wrong with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from coordinator.aggregation.admission import check_update, read_layout
from protos import tensors
from protos.encodings import Named
from protos.errors import UpdateRejected


def write(path: Path, values: dict[str, np.ndarray]) -> Path:
    names = {"float32": "F32", "float16": "F16"}
    header, layout = tensors.make_header((n, names[v.dtype.name], v.shape) for n, v in values.items())
    path.write_bytes(header + b"".join(values[spec.name].tobytes() for spec in layout.tensors))
    return path


GOOD = {"a": np.ones((3, 4), np.float32), "b": np.zeros(5, np.float32)}


def expected(tmp_path: Path) -> list[Named]:
    return read_layout(write(tmp_path / "global", GOOD)).named


def test_an_update_like_the_global_model_is_admitted(tmp_path: Path) -> None:
    assert check_update(write(tmp_path / "u", GOOD), expected=expected(tmp_path)).data_bytes == 68


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_single_value_that_is_not_finite_is_found_and_named(tmp_path: Path, bad: float) -> None:
    values = {**GOOD, "a": np.ones((1000, 300), np.float32)}
    values["a"][999, 299] = bad
    with pytest.raises(UpdateRejected, match="'a' has values that are not finite"):
        check_update(write(tmp_path / "u", values), expected=None)


def test_large_values_are_admitted_and_absurd_ones_are_not(tmp_path: Path) -> None:
    check_update(write(tmp_path / "u", {"a": np.full(100_000, 5e17, np.float32)}), expected=None)
    check_update(write(tmp_path / "u", {"a": np.full(9, 6e4, np.float16)}), expected=None)
    # The mean of it with others could not be rounded for the way down, and products of factors would overflow.
    with pytest.raises(UpdateRejected, match="not finite, or absurdly large"):
        check_update(write(tmp_path / "u", {"a": np.full(9, 2e18, np.float32)}), expected=None)
    with pytest.raises(UpdateRejected, match="not finite, or absurdly large"):
        check_update(write(tmp_path / "u", {"a": np.full(9, np.inf, np.float16)}), expected=None)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"a": GOOD["a"]}, "'b' is missing"),
        ({**GOOD, "z": GOOD["b"]}, "'z' that the global model does not have"),
        ({**GOOD, "a": np.ones((4, 3), np.float32)}, r"'a' has shape \[4, 3\]; \[3, 4\] was expected"),
        ({**GOOD, "a": np.ones((3, 4), np.float16)}, "'a' has dtype F16; F32 was expected"),
    ],
)
def test_other_tensors_than_expected_are_refused(tmp_path: Path, values: dict, sentence: str) -> None:
    with pytest.raises(UpdateRejected, match=sentence):
        check_update(write(tmp_path / "u", values), expected=expected(tmp_path))


def test_rubbish_is_refused(tmp_path: Path) -> None:
    (tmp_path / "u").write_bytes(b"\xff" * 4096)
    with pytest.raises(UpdateRejected, match="header"):
        check_update(tmp_path / "u", expected=None)
    (tmp_path / "u").write_bytes(b"")
    with pytest.raises(UpdateRejected, match="shorter"):
        check_update(tmp_path / "u", expected=None)
