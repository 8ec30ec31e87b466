"""LoRA jobs through files: which tensors a rule reads and writes, and that what is not a pair is averaged as ever."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from coordinator.aggregation.combine import Combined, CorruptUpdate, Input, combine, read_header
from protos import tensors
from protos.adapters import update_tensors
from protos.digests import digest_of
from protos.encoded_files import TensorFile, write_encoded
from protos.errors import CorruptData
from protos.jobspec import JobSpec, parse
from protos.rounding import decode

RULES = ["mean", "ffa-lora", "rolora", "svd", "flora", "fedex", "fed-sb"]
SITES = {"a": 0.5, "b": 0.3, "c": 0.2}
LAYERS = {"m.q_proj": (20, 16), "m.up": (24, 16)}
RANK = 4


def spec_of(rule: str, **changes: Any) -> JobSpec:
    aggregation = {"rule": rule, **changes.pop("aggregation", {})}
    fields = {
        "name": "rules",
        "task": {"type": "synthetic"},
        "method": {"type": "lora", "rank": RANK, "ranks": changes.pop("ranks", {})},
        "local": {"steps": 1},
        "rounds": 4,
        "aggregation": aggregation,
    }
    return parse({**fields, **changes})


def write(path: Path, values: dict[str, np.ndarray]) -> str:
    header, layout = tensors.make_header((name, "F32", value.shape) for name, value in values.items())
    data = header + b"".join(values[spec.name].astype(np.float32).tobytes() for spec in layout.tensors)
    path.write_bytes(data)
    return digest_of(data)


@dataclass
class Job:
    """A job's head version on disk, and rounds of it with random training."""

    directory: Path
    spec: JobSpec
    rng: np.random.Generator
    round: int = 0
    digest: str = ""
    optimizer_digest: str = ""

    @staticmethod
    def begin(directory: Path, spec: JobSpec) -> Job:
        job = Job(directory, spec, np.random.default_rng(1))
        values = {"score.weight": job.rng.standard_normal((3, 16))}
        for layer, (m, n) in LAYERS.items():
            values[f"{layer}.lora_A.weight"] = job.rng.standard_normal((RANK, n))
            values[f"{layer}.lora_B.weight"] = np.zeros((m, RANK))
            if spec.aggregation.rule == "fed-sb":
                values[f"{layer}.lora_B.weight"] = job.rng.standard_normal((m, RANK))
                values[f"{layer}.lora_R.weight"] = np.zeros((RANK, RANK))
        job.digest = write(job.version, values)
        return job

    @property
    def version(self) -> Path:
        return self.directory / f"version-{self.round}"

    @property
    def state(self) -> Path:
        return self.directory / f"state-{self.round}"

    def train(self, weights: dict[str, float]) -> list[Input]:
        old, layout = load_file(self.version), read_header(self.version)[1]
        parts = []
        for site, weight in weights.items():
            update = {}
            for name, _, shape in update_tensors(self.spec, layout, round_number=self.round + 1, site=site):
                part = old[name][tuple(slice(n) for n in shape)]
                update[name] = part + 0.1 * self.rng.standard_normal(shape)
            path = self.directory / f"{site}-{self.round + 1}"
            parts.append(Input(site, path, write(path, update), weight))
        return parts

    def combine(self, parts: list[Input]) -> Combined:
        optimizer = self.spec.aggregation.server_optimizer
        previous, state = self.version, self.state if self.optimizer_digest else None
        self.round += 1
        result = combine(
            parts, output=self.version, previous=previous, previous_digest=self.digest, optimizer=optimizer,
            state=state, state_digest=self.optimizer_digest,
            state_output=self.state if optimizer.type != "none" else None, spec=self.spec, round_number=self.round,
        )  # fmt: skip
        self.digest, self.optimizer_digest = result.digest, result.optimizer_digest
        return result


@pytest.mark.parametrize("rule", RULES)
def test_rounds_of_mixed_ranks_repeat_bit_for_bit_and_say_what_they_missed(tmp_path: Path, rule: str) -> None:
    job = Job.begin(tmp_path, spec_of(rule, ranks={"b": 2}))
    for _ in range(3):
        parts = job.train(SITES)
        updates = [load_file(part.path) for part in parts]
        result = job.combine(parts)
        content = job.version.read_bytes()
        again = combine(
            parts, output=tmp_path / "again", previous=tmp_path / f"version-{job.round - 1}", spec=job.spec,
            previous_digest=digest_of((tmp_path / f"version-{job.round - 1}").read_bytes()), round_number=job.round,
        )  # fmt: skip
        assert digest_of(content) == result.digest == again.digest
        assert 0 <= result.metrics["aggregation_error"] < 1
        # A file that any site reads, canonical to the byte.
        header, layout = read_header(job.version)
        assert header == tensors.make_header(layout.named)[0]
        new = load_file(job.version)
        assert any("fold" in name for name in new) == (rule in ("flora", "fedex"))
        head = sum(w * u["score.weight"].astype(np.float64) for w, u in zip(SITES.values(), updates, strict=True))
        assert np.array_equal(new["score.weight"], head.astype(np.float32))


@pytest.mark.parametrize("rule", ["mean", "ffa-lora", "rolora", "fedex", "fed-sb"])
def test_one_site_and_one_round_give_that_site_s_weights_bit_for_bit(tmp_path: Path, rule: str) -> None:
    job = Job.begin(tmp_path, spec_of(rule))
    before = load_file(job.version)
    [part] = job.train({"a": 1.0})
    assert job.combine([part]).metrics["aggregation_error"] < 1e-6
    wanted = {**before, **load_file(part.path)}
    new = load_file(job.version)
    assert new.keys() == wanted.keys()
    assert all(new[name].tobytes() == wanted[name].astype(np.float32).tobytes() for name in wanted)


def test_with_equal_ranks_the_mean_of_pairs_has_the_bits_of_the_mean_of_tensors(tmp_path: Path) -> None:
    job = Job.begin(tmp_path, spec_of("mean"))
    parts = job.train(SITES)
    assert job.combine(parts).digest == combine(parts, output=tmp_path / "plain").digest


@pytest.mark.parametrize("rule", ["mean", "ffa-lora", "rolora", "fed-sb", "fedex"])
def test_a_server_optimizer_moves_what_was_trained_and_keeps_its_memory_of_the_rest(tmp_path: Path, rule: str) -> None:
    momentum = {"type": "fedavgm", "learning_rate": 1.0, "momentum": 0.5}
    job = Job.begin(tmp_path, spec_of(rule, aggregation={"server_optimizer": momentum}))
    moved: dict[str, np.ndarray] = {}
    for _ in range(4):
        before, parts = load_file(job.version), job.train(SITES)
        updates = [load_file(part.path) for part in parts]
        job.combine(parts)
        after = load_file(job.version)
        for name in before:
            if "fold" in name:
                continue
            if name not in updates[0]:
                assert np.array_equal(after[name], before[name])
                continue
            mean = sum(w * u[name].astype(np.float64) for w, u in zip(SITES.values(), updates, strict=True))
            moved[name] = 0.5 * moved.get(name, 0.0) + (mean - before[name])
            assert np.allclose(after[name], before[name] + moved[name], atol=1e-5)


@pytest.mark.parametrize("rule", ["mean", "rolora", "fedex"])
def test_encoded_updates_count_as_what_they_stand_for(tmp_path: Path, rule: str) -> None:
    job = Job.begin(tmp_path, spec_of(rule, ranks={"b": 2}))
    encoded, decoded = [], []
    for part in job.train(SITES):
        held = read_header(part.path)[1].named
        with TensorFile(part.path) as trained:
            write_encoded(
                lambda name: trained.leading(name, trained.shape(name)),
                tensors=held, base=job.version, encoding="int8", block=64, seed=1, output=tmp_path / f"q-{part.site}",
            )  # fmt: skip
        digest = digest_of((tmp_path / f"q-{part.site}").read_bytes())
        encoded.append(Input(part.site, tmp_path / f"q-{part.site}", digest, part.weight, "int8", 64))
        values, base = {}, load_file(job.version)
        with TensorFile(encoded[-1].path, encoded=True) as file:
            for name, _, shape in held:
                spec = next(tensor for tensor in file.layout.tensors if tensor.name == name)
                count = int(np.prod(shape))
                difference = decode(
                    np.frombuffer(file.read(name, 0, spec.size_bytes), np.uint8), count, encoding="int8", block=64
                ).reshape(shape)
                values[name] = base[name][tuple(slice(n) for n in shape)] + difference
        path = tmp_path / f"plain-{part.site}"
        decoded.append(Input(part.site, path, write(path, values), part.weight))
    order: dict[str, Any] = {"previous": job.version, "previous_digest": job.digest, "spec": job.spec}
    made = [
        combine(parts, output=tmp_path / "out", round_number=1, **order).digest for parts in (encoded, decoded)
    ]  # fmt: skip
    assert made[0] == made[1]


@pytest.mark.parametrize("rule", ["fedex", "svd"])
def test_damage_is_told_from_whose_it_is(tmp_path: Path, rule: str) -> None:
    job = Job.begin(tmp_path, spec_of(rule))
    parts = job.train(SITES)
    good = parts[1].path.read_bytes()
    order: dict[str, Any] = {"previous": job.version, "previous_digest": job.digest, "spec": job.spec}
    # One bit, and numbers that no decomposition can take: NaN.
    for torn in (good[:-1] + bytes([good[-1] ^ 1]), good[:-400] + b"\xff" * 400):
        parts[1].path.write_bytes(torn)
        with pytest.raises(CorruptUpdate, match="b"):
            combine(parts, output=tmp_path / "out", round_number=1, **order)
    parts[1].path.write_bytes(good)
    for damaged in (-1, 9):
        version = bytearray(job.version.read_bytes())
        version[damaged] ^= 1
        (tmp_path / "damaged").write_bytes(version)
        with pytest.raises(CorruptData):
            combine(parts, output=tmp_path / "out", round_number=1, **order | {"previous": tmp_path / "damaged"})
