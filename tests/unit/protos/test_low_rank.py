"""Matrices travel as their largest directions: as many as the energy asks for, the same bits wherever they are rebuilt,
and what was cut off is not lost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from protos.encoded_files import TensorFile, check_encoded, decoded, rebuild, write_encoded
from protos.encodings import Named, encoded_header
from protos.errors import RecipeInvalid, UpdateRejected
from protos.jobspec import Encoding, parse
from protos.low_rank import cut, product
from protos.rounding import Values
from protos.tensors import make_header
from tests.unit.protos.test_encodings import read, write

ENERGIES = (0.5, 0.9, 0.95, 0.99, 1.0)


def falling(rows: int, columns: int, *, seed: int = 0) -> Values:
    """A matrix whose k-th singular value is 2^-k."""
    draw = np.random.default_rng(seed)
    left, _ = np.linalg.qr(draw.standard_normal((rows, rows)))
    right, _ = np.linalg.qr(draw.standard_normal((columns, columns)))
    smaller = min(rows, columns)
    return ((left[:, :smaller] * 0.5 ** np.arange(smaller)) @ right[:smaller]).astype(np.float32)


def encoded(
    directory: Path, new: Mapping[str, np.ndarray], *, energy: float, before: Path | None = None, name: str = "update"
) -> tuple[Path, Path]:
    """The file that stands for `new` minus zeros, and its residual."""
    base = write(directory / "base.safetensors", {key: np.zeros_like(values) for key, values in new.items()})
    with TensorFile(write(directory / "new.safetensors", new)) as file:
        write_encoded(
            lambda key: file.leading(key, file.shape(key)), tensors=file.layout.named, base=base, encoding="svd",
            block=64, seed=0, output=directory / name, before=before, residual=directory / f"{name}-residual",
            energy=energy,
        )  # fmt: skip
    return directory / name, directory / f"{name}-residual"


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (24, 24)])
@pytest.mark.parametrize("energy", ENERGIES)
def test_the_fewest_directions_that_hold_the_energy_are_kept(shape: tuple[int, int], energy: float) -> None:
    matrix = falling(*shape)
    factors = cut(matrix, energy=energy, name="w")
    held = np.cumsum(np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2) / np.sum(matrix**2.0)
    if energy == 1.0:
        assert factors is None, "all directions are larger than the matrix"
        return
    assert factors is not None
    wanted = int(np.argmax(held >= energy)) + 1
    assert factors.shape == (wanted, sum(shape))
    rebuilt = product(factors, rows=shape[0], first=0, last=matrix.size).reshape(shape)
    # What is missing is the rest of the squared sum.
    assert np.sum((matrix - rebuilt) ** 2.0) == pytest.approx((1 - held[wanted - 1]) * np.sum(matrix**2.0), rel=1e-3)


def test_a_matrix_of_zeros_costs_nothing_and_one_without_structure_travels_whole() -> None:
    zeros = cut(np.zeros((30, 20), np.float32), energy=0.95, name="w")
    assert zeros is not None and zeros.shape == (0, 50)
    assert not product(zeros, rows=30, first=0, last=600).any()
    noise = np.random.default_rng(0).standard_normal((30, 20)).astype(np.float32)
    assert cut(noise, energy=0.95, name="w") is None
    assert cut(noise, energy=0.3, name="w") is not None
    assert cut(np.ones((30, 1), np.float32), energy=0.5, name="w") is None, "two thin ones are larger than one"


def test_any_piece_of_a_rebuilt_matrix_has_the_bits_of_the_whole() -> None:
    factors = cut(falling(30, 20), energy=0.99, name="w")
    assert factors is not None
    whole = product(factors, rows=30, first=0, last=600)
    assert whole.dtype == np.float32
    for first, last in ((0, 1), (19, 21), (7, 333), (599, 600), (20, 40)):
        assert product(factors, rows=30, first=first, last=last).tobytes() == whole[first:last].tobytes()
    # Written out by hand: in this order and this precision.
    value = np.float32(0)
    for row in factors:
        value = np.float32(value + np.float32(row[7] * row[30 + 11]))
    assert whole[7 * 20 + 11] == value


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e37])
def test_what_is_not_finite_or_absurdly_large_is_refused_by_name(bad: float) -> None:
    matrix = falling(30, 20)
    matrix[3, 4] = bad
    with pytest.raises(UpdateRejected, match="'w' has changed to values that are not finite"):
        cut(matrix, energy=0.95, name="w")


def test_a_decomposition_that_does_not_converge_is_a_sentence_that_names_the_tensor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object, **__: object) -> None:
        raise np.linalg.LinAlgError("SVD did not converge")

    # No finite matrix is known on which the library gives up.
    monkeypatch.setattr(np.linalg, "svd", never)
    with pytest.raises(UpdateRejected, match=r"Tensor 'w' could not be cut .*: SVD did not converge"):
        cut(falling(30, 20), energy=0.95, name="w")


def test_a_file_is_as_small_as_its_factors_repeats_bit_for_bit_and_rebuilds_the_version(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).standard_normal
    new = {
        "a.bias": noise(40), "a.weight": falling(40, 30), "b.noise": noise((8, 9)), "b.zero": np.zeros((40, 30)),
        "c.conv": noise((4, 5, 6)),
    }  # fmt: skip
    update, residual = encoded(tmp_path, new, energy=0.95)
    content, lost = update.read_bytes(), residual.read_bytes()
    update, residual = encoded(tmp_path, new, energy=0.95, name="again")
    assert (update.read_bytes(), residual.read_bytes()) == (content, lost)
    with TensorFile(update, encoded=True) as file:
        shapes = {tensor.name: tensor.shape for tensor in file.layout.tensors}
    # 1, 1/2, 1/4: three directions hold 98 per cent.
    assert shapes == {"a.bias": (40,), "a.weight": (3, 70), "b.noise": (8, 9), "b.zero": (0, 70), "c.conv": (4, 5, 6)}
    assert len(content) < write(tmp_path / "raw", new).stat().st_size / 3
    digests = {
        rebuild(update, base=tmp_path / "base.safetensors", encoding="svd", block=64, output=tmp_path / name)
        for name in ("first", "second")
    }
    assert len(digests) == 1
    for name, values in new.items():
        assert read(tmp_path / "first", name) + read(residual, name) == pytest.approx(values, abs=1e-6)
        assert bool(read(residual, name).any()) == (name == "a.weight")


def test_with_error_feedback_what_arrives_follows_what_was_sent_and_without_it_falls_behind(tmp_path: Path) -> None:
    rounds, slow = 40, falling(30, 20, seed=7)

    def behind(*, feedback: bool) -> float:
        arrived, sent, before = np.zeros((30, 20)), np.zeros((30, 20)), None
        for number in range(rounds):
            # Each round another large direction, which is all that its energy has room for.
            step = falling(30, 20, seed=100 + number)[:, :] + 0.1 * slow
            update, residual = encoded(tmp_path, {"w": step}, energy=0.6, before=before, name=f"u{number}")
            before = residual if feedback else None
            rebuild(
                update, base=tmp_path / "base.safetensors", encoding="svd", block=64, output=tmp_path / "decoded"
            )  # fmt: skip
            arrived += read(tmp_path / "decoded", "w")
            sent += step
        missing = sent - arrived
        if feedback:
            # It telescopes: all that is missing is the last residual.
            assert missing == pytest.approx(read(residual, "w"), abs=1e-4)
        return float(np.linalg.norm(missing))

    assert behind(feedback=True) < behind(feedback=False) / 2


NAMED: list[Named] = [("v", "F32", (5,)), ("w", "F32", (30, 20))]


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ([("v", "F32", (5,)), ("w", "F32", (12, 50))], r"'w' has shape \[12, 50\]; \[30, 20\] was expected"),
        ([("v", "F32", (5,)), ("w", "F32", (2, 49))], r"'w' has shape \[2, 49\]; \[30, 20\] was expected"),
        ([("v", "F32", (5,)), ("w", "F16", (2, 50))], "'w' has dtype F16; F32 was expected"),
        ([("v", "F32", (1, 5)), ("w", "F32", (2, 50))], r"'v' has shape \[1, 5\]; \[5\] was expected"),
        ([("w", "F32", (2, 50))], "'v' is missing"),
    ],
    ids=["larger than the matrix", "of another matrix", "of another precision", "no matrix", "missing"],
)
def test_factors_that_are_none_of_the_expected_matrix_are_refused(tensors: list[Named], sentence: str) -> None:
    with pytest.raises(UpdateRejected, match=sentence):
        check_encoded(make_header(tensors)[1], NAMED, encoding="svd", block=64)


def test_the_largest_file_is_that_of_the_values_themselves() -> None:
    largest = encoded_header(NAMED, encoding="svd", block=64)[1]
    assert largest == make_header(NAMED)[1]
    # 30 x 20 values, 50 of each direction: 11 are smaller, 12 are not.
    for rank in range(12):
        layout = encoded_header(NAMED, encoding="svd", block=64, ranks={"w": rank})[1]
        assert check_encoded(layout, NAMED, encoding="svd", block=64) == {"w": rank}
        assert layout.data_bytes < largest.data_bytes


def test_a_part_of_a_file_is_decoded_as_the_whole(tmp_path: Path) -> None:
    update, _ = encoded(tmp_path, {"v": np.arange(5.0), "w": falling(30, 20)}, energy=0.9)
    with TensorFile(update, encoded=True) as file:
        ranks = check_encoded(file.layout, NAMED, encoding="svd", block=64)
        part = decoded(file, "w", (30, 20), encoding="svd", block=64, rank=ranks["w"])
        assert part(100, 50).tobytes() == part(0, 600)[100:150].tobytes()
        assert decoded(file, "v", (5,), encoding="svd", block=64)(1, 3).tolist() == [1, 2, 3]


def test_the_energy_rises_evenly_over_the_rounds() -> None:
    encoding = Encoding(up="svd", svd_energy_start=0.9, svd_energy_end=0.98)
    assert [encoding.energy(round_number=number, rounds=5) for number in (1, 3, 5)] == pytest.approx([0.9, 0.94, 0.98])
    assert encoding.energy(round_number=1, rounds=1) == 0.9


def test_an_energy_without_svd_is_refused_and_its_defaults_are_not_written() -> None:
    fields = {"name": "a", "task": {"type": "synthetic"}, "local": {"steps": 1}, "rounds": 2}
    with pytest.raises(RecipeInvalid, match="go with up or down = 'svd'"):
        parse({**fields, "encoding": {"up": "int8", "svd_energy_start": 0.9}})
    assert "svd_energy" not in parse({**fields, "encoding": {"up": "int8"}}).canonical_json
