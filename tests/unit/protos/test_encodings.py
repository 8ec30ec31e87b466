"""Encoded tensors have the bytes that arithmetic says, repeat bit for bit, have no bias, and lose nothing for good."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from protos.digests import digest_of
from protos.encoded_files import CHUNK_VALUES, TensorFile, rebuild, write_encoded
from protos.encodings import encoded_bytes, encoded_header
from protos.errors import UpdateRejected
from protos.rounding import Noise, Values, decode, encode
from protos.tensors import make_header

ENCODINGS = ("bf16", "int8", "int4")
BLOCK = 64


def normal(count: int, *, seed: int = 0, scale: float = 1e-3) -> Values:
    return (np.random.default_rng(seed).standard_normal(count) * scale).astype(np.float32)


def there_and_back(values: Values, encoding: str, *, seed: int = 0, block: int = BLOCK) -> Values:
    written = encode(values, encoding=encoding, block=block, noise=Noise(seed, name="w"), start=0)
    assert len(written) == encoded_bytes(len(values), encoding, block)
    return decode(written, len(values), encoding=encoding, block=block)


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    header, layout = make_header((name, "F32", values.shape) for name, values in tensors.items())
    path.write_bytes(header + b"".join(tensors[t.name].astype(np.float32).tobytes() for t in layout.tensors))
    return path


def read(path: Path, name: str) -> np.ndarray:
    with TensorFile(path) as file:
        values = file.leading(name, file.shape(name))
        return values(0, int(np.prod(file.shape(name)))).reshape(file.shape(name))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("count", [1, 63, 64, 65, 1000])
def test_a_value_comes_back_within_one_step(encoding: str, count: int) -> None:
    values = normal(count)
    step = {"bf16": np.abs(values) / 128, "int8": 0.01 * np.abs(values).max(), "int4": 0.15 * np.abs(values).max()}
    assert (np.abs(there_and_back(values, encoding) - values) <= step[encoding]).all()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_mean_over_seeds_is_the_value(encoding: str) -> None:
    values = normal(256)
    seeds = 4000
    decoded = np.stack([there_and_back(values, encoding, seed=seed) for seed in range(seeds)]).astype(np.float64)
    error = decoded.mean(axis=0) - values
    spread = decoded.std(axis=0) / seeds**0.5
    # Of 256 means none is off by five times its own spread; what is nearly always rounded alike may have none.
    rare = 10 / seeds * (np.abs(values) / 128 if encoding == "bf16" else np.abs(values).max() / 7)
    assert (np.abs(error) <= 5 * spread + rare).all()
    assert np.abs(decoded.std(axis=0)).max() > 0


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encoding_in_pieces_or_at_once_gives_the_same_bytes_and_another_seed_or_name_does_not(encoding: str) -> None:
    values = normal(1000)

    def written(*cuts: int, seed: int = 3, name: str = "w") -> bytes:
        noise = Noise(seed, name=name)
        return b"".join(
            encode(values[begin:end], encoding=encoding, block=BLOCK, noise=noise, start=begin).tobytes()
            for begin, end in pairwise([0, *cuts, len(values)])
        )

    assert written() == written() == written(64, 512) == written(448)
    assert len({written(), written(seed=4), written(name="v")}) == 3


def test_the_bytes_are_those_of_every_other_machine() -> None:
    """A change of these digests means that sites of different releases no longer rebuild the same version."""
    values = ((np.arange(1000) * 7919 % 1009 - 504) / 4096).astype(np.float32)
    digests = {
        encoding: digest_of(encode(values, encoding=encoding, block=32, noise=Noise(5, name="a.b"), start=0).tobytes())[
            :12
        ]
        for encoding in ENCODINGS
    }
    assert digests == {"bf16": "e9fcf986b512", "int8": "6779e1d8c6e7", "int4": "19b7fa004e50"}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_zeros_stay_zeros_and_the_smallest_numbers_do_no_harm(encoding: str) -> None:
    assert not there_and_back(np.zeros(100, np.float32), encoding).any()
    assert not there_and_back(np.full(100, -0.0, np.float32), encoding).any()
    denormal = np.full(64, np.float32(1e-45))
    assert np.isfinite(there_and_back(denormal, encoding)).all()
    mixed = np.concatenate([denormal, np.float32([-1.0])])
    assert there_and_back(mixed, encoding)[-1] == pytest.approx(-1.0, rel=0.01)
    # In one block with a large value, what is next to nothing becomes nothing.
    assert not there_and_back(np.float32([1.0, 1e-45, -1e-45, -0.0]), "int8")[1:].any()


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e37])
def test_what_is_not_finite_or_absurdly_large_is_refused_by_name(encoding: str, bad: float) -> None:
    values = normal(100)
    values[70] = bad
    with pytest.raises(UpdateRejected, match="'w' has changed to values that are not finite"):
        there_and_back(values, encoding)


@pytest.mark.parametrize("encoding", ["int8", "int4"])
@pytest.mark.parametrize("block", [32, 64, 128, 256])
def test_the_largest_value_of_a_block_always_fits(encoding: str, block: int) -> None:
    # The scale is rounded up, so a magnitude just above one of bfloat16 does not wrap around to its opposite.
    for largest in normal(200, seed=9, scale=1e3):
        values = np.full(block, largest)
        assert there_and_back(values, encoding, block=block) == pytest.approx(values, rel=0.3)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_file_has_the_size_that_arithmetic_says_and_rebuilds_the_version_everywhere(
    tmp_path: Path, encoding: str
) -> None:
    # More than a chunk, a short last block, an odd shape, and one value alone.
    base = {"a": normal(CHUNK_VALUES + 100).reshape(-1, 1), "b.c": normal(105).reshape(7, 15), "z": normal(1)}
    new = {name: values + normal(values.size, seed=5).reshape(values.shape) for name, values in base.items()}
    start, end = write(tmp_path / "base.safetensors", base), write(tmp_path / "new.safetensors", new)
    with TensorFile(end) as file:
        named = file.layout.named
        write_encoded(
            lambda name: file.leading(name, file.shape(name)), tensors=named, base=start, encoding=encoding,
            block=BLOCK, seed=1, output=tmp_path / "encoded",
        )  # fmt: skip
    size = encoded_header(named, encoding=encoding, block=BLOCK)[1].file_bytes
    assert (tmp_path / "encoded").stat().st_size == size
    bits = {"bf16": 16, "int8": 8 + 16 / BLOCK, "int4": 4 + 16 / BLOCK}[encoding]
    assert size == pytest.approx((CHUNK_VALUES + 206) * bits / 8, rel=0.01)
    digests = {
        rebuild(tmp_path / "encoded", base=start, encoding=encoding, block=BLOCK, output=tmp_path / name)
        for name in ("first", "second")
    }
    assert len(digests) == 1
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    for name, values in new.items():
        assert read(tmp_path / "first", name) == pytest.approx(values, abs=2e-3)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_with_error_feedback_the_sum_of_updates_follows_the_sum_of_what_was_trained_and_without_it_drifts(
    tmp_path: Path, encoding: str
) -> None:
    rounds = 60
    base = write(tmp_path / "base.safetensors", {"w": np.zeros(256)})
    # Small steady changes beside a large one that comes and goes: most of them are lost to int4 each time.
    steps = [normal(256, seed=number, scale=1e-4) + np.float32(2e-4) for number in range(rounds)]
    for step in steps:
        step[::64] = 1e-2

    def lost(*, feedback: bool) -> float:
        """How far the sum of what arrives is from the sum of what was sent, at most, in quantisation steps."""
        arrived, sent, before = np.zeros(256), np.zeros(256), None
        for number, step in enumerate(steps):
            residual = tmp_path / f"residual-{number}.safetensors"
            new = {"w": lambda begin, count, step=step: step[begin : begin + count]}
            write_encoded(
                new.__getitem__, tensors=[("w", "F32", (256,))], base=base, encoding=encoding, block=BLOCK,
                seed=number, output=tmp_path / "update.safetensors", before=before if feedback else None,
                residual=residual,
            )  # fmt: skip
            before = residual
            rebuild(
                tmp_path / "update.safetensors", base=base, encoding=encoding, block=BLOCK,
                output=tmp_path / "decoded.safetensors",
            )  # fmt: skip
            arrived += read(tmp_path / "decoded.safetensors", "w")
            sent += step
        quantum = 1e-2 * {"bf16": 1 / 128, "int8": 1 / 127, "int4": 1 / 7}[encoding]
        return float(np.abs(arrived - sent).max()) / (1.25 * quantum)

    assert lost(feedback=True) <= 1.0
    assert lost(feedback=False) > 3 * lost(feedback=True)


def test_a_residual_keeps_the_tensors_that_travel_in_other_rounds(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", {"a": np.zeros(100), "b": np.zeros(100)})
    before = None
    for number, name in enumerate("abab"):
        values = normal(100, seed=number)
        residual = tmp_path / f"residual-{number}.safetensors"
        write_encoded(
            lambda _, values=values: lambda begin, count: values[begin : begin + count],
            tensors=[(name, "F32", (100,))], base=base, encoding="int4", block=BLOCK, seed=number,
            output=tmp_path / "update", before=before, residual=residual,
        )  # fmt: skip
        before = residual
    for name, number in (("a", 1), ("b", 2)):
        kept = read(tmp_path / f"residual-{number}.safetensors", name)
        assert kept.any()
        assert (read(tmp_path / "residual-3.safetensors", "a") == read(tmp_path / "residual-2.safetensors", "a")).all()


def test_a_site_of_lower_rank_encodes_the_leading_part_of_a_matrix(tmp_path: Path) -> None:
    whole = normal(8 * 6, scale=1.0).reshape(8, 6)
    base = write(tmp_path / "base.safetensors", {"l.lora_B.weight": whole})
    part = (whole[:, :4] + np.float32(0.5)).reshape(-1)
    write_encoded(
        lambda _: lambda begin, count: part[begin : begin + count], tensors=[("l.lora_B.weight", "F32", (8, 4))],
        base=base, encoding="int8", block=32, seed=0, output=tmp_path / "update",
    )  # fmt: skip
    with TensorFile(tmp_path / "update", encoded=True) as file:
        data = np.frombuffer(file.read("l.lora_B.weight", 0, encoded_bytes(32, "int8", 32)), np.uint8)
    assert decode(data, 32, encoding="int8", block=32) == pytest.approx(np.full(32, 0.5), abs=0.01)


def test_blocks_travel_only_where_they_are_expected(tmp_path: Path) -> None:
    header, layout = make_header([("w", "U8", (34,))])
    (tmp_path / "update").write_bytes(header + bytes(layout.data_bytes))
    TensorFile(tmp_path / "update", encoded=True)
    with pytest.raises(UpdateRejected, match="'w' has dtype 'U8'; only F64, F32, F16, BF16 travel"):
        TensorFile(tmp_path / "update")
