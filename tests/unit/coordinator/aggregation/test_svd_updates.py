"""Updates of an svd job at the coordinator: refused before they are parsed when they are too large, read a piece at a
time, and combined to the mean of what the sites trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from coordinator.aggregation.admission import check_update
from coordinator.aggregation.combine import BLOCK_ELEMENTS, CorruptUpdate, Input, combine
from coordinator.aggregation.downlink import round_version
from coordinator.aggregation.reading import digest_of_file
from protos.digests import digest_of
from protos.encoded_files import TensorFile, rebuild, write_encoded
from protos.errors import UpdateRejected
from protos.jobspec import JobSpec, parse
from protos.tensors import make_header
from tests.unit.protos.test_encodings import read, write
from tests.unit.protos.test_low_rank import falling

# More than a block, so that it is asked for in pieces; and what travels as it is.
SHAPE = (400, 300)


def spec() -> JobSpec:
    return parse(
        {
            "name": "svd", "task": {"type": "synthetic"}, "local": {"steps": 1}, "rounds": 3,
            "encoding": {"up": "svd", "down": "svd"},
        }
    )  # fmt: skip


def update(path: Path, *, base: Path, seed: int) -> Path:
    """A version that moved from `base` by a few directions, as a site hands it in."""
    assert SHAPE[0] * SHAPE[1] > BLOCK_ELEMENTS
    moved = {"a.bias": np.full(7, seed, np.float32), "a.weight": falling(*SHAPE, seed=seed)}
    values = {name: read(base, name) + change for name, change in moved.items()}
    with TensorFile(write(path.with_suffix(".new-version"), values)) as file:
        write_encoded(
            lambda name: file.leading(name, file.shape(name)), tensors=file.layout.named, base=base, encoding="svd",
            block=64, seed=0, output=path, energy=0.9999,
        )  # fmt: skip
    return path


def version(directory: Path) -> Path:
    draw = np.random.default_rng(5)
    return write(directory / "version", {"a.bias": draw.standard_normal(7), "a.weight": draw.standard_normal(SHAPE)})


def test_the_mean_of_svd_updates_is_the_mean_of_what_they_stand_for(tmp_path: Path) -> None:
    base = version(tmp_path)
    paths = [update(tmp_path / f"u{seed}", base=base, seed=seed) for seed in (1, 2)]
    named = [("a.bias", "F32", (7,)), ("a.weight", "F32", SHAPE)]
    for path in paths:
        check_update(path, expected=named, encoding="svd", block=64)
        assert path.stat().st_size < base.stat().st_size / 5
    inputs = [
        Input(f"s{place}", path, digest_of_file(path), weight, "svd", 64)
        for place, (path, weight) in enumerate(zip(paths, (0.25, 0.75), strict=True))
    ]
    combined = combine(
        inputs, output=tmp_path / "next", previous=base, previous_digest=digest_of_file(base), spec=spec(),
        round_number=1,
    )  # fmt: skip
    assert digest_of_file(tmp_path / "next") == combined.digest
    for name in ("a.bias", "a.weight"):
        rebuilt = []
        for path in paths:
            rebuild(path, base=base, encoding="svd", block=64, output=tmp_path / "one")
            rebuilt.append(read(tmp_path / "one", name).astype(np.float64))
        wanted = (0.25 * rebuilt[0] + 0.75 * rebuilt[1]).astype(np.float32)
        assert np.array_equal(read(tmp_path / "next", name), wanted)


def test_a_damaged_update_is_told_from_a_good_one(tmp_path: Path) -> None:
    base = version(tmp_path)
    path = update(tmp_path / "u", base=base, seed=1)
    digest = digest_of_file(path)
    for damage in (path.read_bytes()[:-4], path.read_bytes()[:-1] + b"\x7f"):
        path.write_bytes(damage)
        with pytest.raises(CorruptUpdate):
            combine(
                [Input("s", path, digest, 1.0, "svd", 64)], output=tmp_path / "next", previous=base,
                previous_digest=digest_of_file(base), spec=spec(), round_number=1,
            )  # fmt: skip


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e19])
def test_factors_whose_product_is_absurd_are_refused_by_name(tmp_path: Path, bad: float) -> None:
    factors = np.ones((2, 50), np.float32)
    factors[1, 3] = bad
    header, _ = make_header([("w", "F32", factors.shape)])
    (tmp_path / "u").write_bytes(header + factors.tobytes())
    with pytest.raises(UpdateRejected, match="'w' has values that are not finite, or absurdly large"):
        check_update(tmp_path / "u", expected=[("w", "F32", (30, 20))], encoding="svd", block=64)


def test_sites_rebuild_the_version_that_was_committed_bit_for_bit(tmp_path: Path) -> None:
    initial, before = version(tmp_path), ""
    total = np.zeros(SHAPE)
    for number in (1, 2, 3):
        total += falling(*SHAPE, seed=number)
        aim = {"a.bias": read(initial, "a.bias"), "a.weight": read(initial, "a.weight") + total}
        made = write(tmp_path / f"aggregate-{number}", aim)
        known = {"residual": before, "residual_digest": digest_of_file(Path(before))} if before else {}
        answer = round_version(
            made, spec=spec(), round_number=number, initial=str(initial), initial_digest=digest_of_file(initial),
            seed=number, encoded=str(tmp_path / "encoded"), residual_output=str(tmp_path / f"residual-{number}"),
            **known,
        )  # fmt: skip
        before = str(tmp_path / f"residual-{number}")
        again = rebuild(tmp_path / "encoded", base=initial, encoding="svd", block=64, output=tmp_path / "rebuilt")
        assert again == answer["digest"] == digest_of((tmp_path / "rebuilt").read_bytes())
        assert answer["encoded_size"] == (tmp_path / "encoded").stat().st_size < initial.stat().st_size / 5
        # The part that the round's energy leaves out, 5 % of the squared sum in the first and 2 % in the last.
        lost = np.linalg.norm(read(Path(before), "a.weight"))
        assert 0 < lost <= np.sqrt(1 - (0.95, 0.965, 0.98)[number - 1]) * np.linalg.norm(total) * 1.5
