"""A version that is rounded for the way down: what is committed is what sites rebuild, and nothing is lost for good."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from coordinator.aggregation.downlink import round_version
from coordinator.traffic import version_bytes
from protos.digests import digest_of
from protos.encoded_files import TensorFile, rebuild
from protos.errors import CorruptData
from protos.jobspec import JobSpec, parse
from protos.tensors import make_header

COUNT = 1000


def spec_of(encoding: str, *, rule: str = "mean") -> JobSpec:
    return parse(
        {
            "name": "j",
            "task": {"type": "classification", "labels": ["a", "b"]},
            "data": {"name": "notes"},
            "base_model": {"name": "tiny"},
            "method": {"type": "lora", "rank": 2, "alpha": 4},
            "aggregation": {"rule": rule},
            "encoding": {"down": encoding},
            "local": {"steps": 1},
            "rounds": 1,
        }
    )


def write(path: Path, values: np.ndarray) -> Path:
    path.write_bytes(make_header([("w", "F32", (COUNT,))])[0] + values.astype(np.float32).tobytes())
    return path


def read(path: Path) -> np.ndarray:
    with TensorFile(path) as file:
        return file.leading("w", (COUNT,))(0, COUNT)


def digest(path: Path) -> str:
    return digest_of(path.read_bytes())


@pytest.mark.parametrize("encoding", ["bf16", "int8", "int4"])
def test_the_committed_version_is_what_sites_rebuild_and_the_versions_do_not_drift(
    tmp_path: Path, encoding: str
) -> None:
    start = np.random.default_rng(0).standard_normal(COUNT) * 0.02
    initial = write(tmp_path / "initial", start)
    aim = np.random.default_rng(1).standard_normal(COUNT) * 1e-3
    residual, offs = "", []
    for number in range(30):
        # Every round's aggregate is the same place; each rounded version misses it by something else.
        version = write(tmp_path / "version", start + aim)
        made = round_version(
            version, spec=spec_of(encoding), initial=str(initial), initial_digest=digest(initial), seed=number,
            encoded=str(tmp_path / "encoded"), residual=residual,
            residual_digest=digest(Path(residual)) if residual else "",
            residual_output=str(tmp_path / f"residual-{number}"),
        )  # fmt: skip
        residual = str(tmp_path / f"residual-{number}")
        assert made["digest"] == digest(version)
        assert (made["encoded_digest"], made["encoded_size"]) == (
            digest(tmp_path / "encoded"),
            (tmp_path / "encoded").stat().st_size,
        )
        assert made["residual_digest"] == digest(Path(residual))
        again = rebuild(tmp_path / "encoded", base=initial, encoding=encoding, block=64, output=tmp_path / "rebuilt")
        assert again == made["digest"]
        offs.append(read(version) - (start + aim))
    quantum = np.abs(aim).max() * {"bf16": 1 / 128, "int8": 1 / 127, "int4": 1 / 7}[encoding]
    # What one version lacks, the next ones have too much: the mean over 30 of them is as near as 30 times finer steps.
    assert np.abs(np.mean(offs, axis=0)).max() < 3 * quantum / 30 + 1e-8
    assert np.abs(offs[-1]).max() < 3 * quantum


def test_a_version_0_or_a_residual_that_was_damaged_is_noticed(tmp_path: Path) -> None:
    initial, version = write(tmp_path / "initial", np.zeros(COUNT)), write(tmp_path / "version", np.ones(COUNT))
    order = {
        "initial": str(initial), "initial_digest": digest(initial), "spec": spec_of("int8"), "seed": 0,
        "encoded": str(tmp_path / "encoded"),
    }  # fmt: skip
    with pytest.raises(CorruptData, match="Version 0 of the job no longer matches"):
        round_version(version, **{**order, "initial_digest": "0" * 64})
    with pytest.raises(CorruptData, match="residual of the job no longer matches"):
        round_version(version, **order, residual=str(initial), residual_digest="0" * 64)
    # Without error feedback no residual is written.
    assert round_version(version, **order)["residual_digest"] == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoded", "initial", "version"]


@pytest.mark.parametrize(
    ("rule", "travels"), [("ffa-lora", ["lora_B"]), ("fed-sb", ["lora_R"]), ("rolora", ["lora_A", "lora_B"])]
)
def test_factors_that_no_round_trains_do_not_travel_down(tmp_path: Path, rule: str, travels: list[str]) -> None:
    shapes = {"lora_A": (2, 8), "lora_B": (8, 2), **({"lora_R": (2, 2)} if rule == "fed-sb" else {})}
    header, layout = make_header((f"m.{factor}.weight", "F32", shape) for factor, shape in shapes.items())
    rng = np.random.default_rng(0)
    values = {tensor.name: rng.standard_normal(tensor.elements).astype(np.float32) for tensor in layout.tensors}
    initial, version = tmp_path / "initial", tmp_path / "version"
    initial.write_bytes(header + b"".join(values[tensor.name].tobytes() for tensor in layout.tensors))
    moved = {name: part + ("lora_A" not in name or rule == "rolora") for name, part in values.items()}
    moved = {name: values[name] if rule == "fed-sb" and "lora_R" not in name else part for name, part in moved.items()}
    version.write_bytes(header + b"".join(moved[tensor.name].tobytes() for tensor in layout.tensors))
    spec, encoded = spec_of("int8", rule=rule), tmp_path / "encoded"
    made = round_version(
        version, spec=spec, initial=str(initial), initial_digest=digest(initial), seed=0, encoded=str(encoded),
        residual_output=str(tmp_path / "residual"),
    )  # fmt: skip
    with TensorFile(encoded, encoded=True) as sent, TensorFile(version) as whole:
        assert [tensor.name for tensor in sent.layout.tensors] == [f"m.{factor}.weight" for factor in travels]
        assert made["encoded_size"] == version_bytes(spec, layout, number=1)
        for name, part in moved.items():
            found = whole.leading(name, whole.shape(name))(0, len(part))
            assert np.allclose(found, part, atol=0.02) if name in sent else np.array_equal(found, values[name])
