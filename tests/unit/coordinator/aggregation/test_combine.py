"""The weighted mean: exact, the same bit for bit on every run, in constant memory, and never from damaged input."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from coordinator.aggregation.combine import BLOCK_ELEMENTS, CorruptUpdate, Input, combine
from protos import tensors
from protos.digests import digest_of
from protos.errors import CorruptData
from protos.jobspec import FedAdam, FedAvgM, FedYogi, Nesterov, parse

SHAPES = {"b.weight": (300, 401), "a.bias": (7,), "c.scalar": (), "d.empty": (0, 3)}
DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


def write(path: Path, values: dict[str, np.ndarray]) -> str:
    header, layout = tensors.make_header((n, DTYPE_NAMES[v.dtype.name], v.shape) for n, v in values.items())
    data = header + b"".join(values[spec.name].tobytes() for spec in layout.tensors)
    path.write_bytes(data)
    return digest_of(data)


def random_model(seed: int, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def inputs(directory: Path, models: list[dict[str, np.ndarray]], weights: list[float]) -> list[Input]:
    made = []
    for number, (model, weight) in enumerate(zip(models, weights, strict=True)):
        path = directory / f"update-{number}"
        made.append(Input(f"site-{number}", path, write(path, model), weight))
    return made


@pytest.mark.parametrize("count", [1, 2, 8, 33])
def test_the_mean_equals_a_float64_reference(tmp_path: Path, count: int) -> None:
    models = [random_model(seed) for seed in range(count)]
    weights = list(np.random.default_rng(99).dirichlet([1.0] * count))
    combine(inputs(tmp_path, models, weights), output=tmp_path / "out")
    found = load_file(tmp_path / "out")
    for name, shape in SHAPES.items():
        reference = sum(w * m[name].astype(np.float64) for w, m in zip(weights, models, strict=True))
        assert found[name].shape == shape
        error = np.linalg.norm(found[name].astype(np.float64) - reference)
        assert error <= 1e-6 * max(np.linalg.norm(reference), 1e-300)


def test_a_tensor_longer_than_a_block_is_combined_whole(tmp_path: Path) -> None:
    models = [{"w": np.full(2 * BLOCK_ELEMENTS + 17, value, np.float32)} for value in (1.0, 3.0)]
    combine(inputs(tmp_path, models, [0.25, 0.75]), output=tmp_path / "out")
    assert np.array_equal(load_file(tmp_path / "out")["w"], np.full(2 * BLOCK_ELEMENTS + 17, 2.5, np.float32))


def test_the_result_repeats_bit_for_bit_and_its_digest_is_that_of_the_file(tmp_path: Path) -> None:
    models = [random_model(seed) for seed in range(5)]
    parts = inputs(tmp_path, models, [0.1, 0.2, 0.3, 0.15, 0.25])
    first = combine(parts, output=tmp_path / "one")
    second = combine(parts, output=tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert first.digest == second.digest == digest_of((tmp_path / "one").read_bytes())


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_one_site_alone_comes_back_bit_for_bit(tmp_path: Path, dtype: type) -> None:
    parts = inputs(tmp_path, [random_model(3, dtype)], [1.0])
    result = combine(parts, output=tmp_path / "out")
    assert result.digest == parts[0].digest


def test_a_damaged_update_is_named_and_nothing_is_made_of_it(tmp_path: Path) -> None:
    parts = inputs(tmp_path, [random_model(1), random_model(2)], [0.5, 0.5])
    data = bytearray(parts[1].path.read_bytes())
    data[-1] ^= 1
    parts[1].path.write_bytes(data)
    with pytest.raises(CorruptUpdate) as caught:
        combine(parts, output=tmp_path / "out")
    assert caught.value.site == "site-1"


@pytest.mark.parametrize("position", [7, 8, 60])
def test_damage_in_a_header_or_a_missing_file_is_the_sites_too(tmp_path: Path, position: int) -> None:
    for number in (0, 1):
        parts = inputs(tmp_path, [random_model(1), random_model(2)], [0.5, 0.5])
        data = bytearray(parts[number].path.read_bytes())
        data[position] ^= 0x40
        parts[number].path.write_bytes(data)
        with pytest.raises(CorruptUpdate) as caught:
            combine(parts, output=tmp_path / "out")
        assert caught.value.site == f"site-{number}"
        parts[number].path.unlink()
        with pytest.raises(CorruptUpdate):
            combine(parts, output=tmp_path / "out")


def test_a_damaged_base_version_or_state_makes_no_new_version(tmp_path: Path) -> None:
    parts = inputs(tmp_path, [random_model(1)], [1.0])
    digest = write(tmp_path / "v0", random_model(0))
    optimizer = FedAvgM(type="fedavgm")
    made = combine(
        parts,
        output=tmp_path / "out",
        previous=tmp_path / "v0",
        previous_digest=digest,
        optimizer=optimizer,
        state_output=tmp_path / "state",
    )
    for name in ("out", "state"):
        good = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(CorruptData):
            combine(
                parts,
                output=tmp_path / "next",
                previous=tmp_path / "out",
                previous_digest=made.digest,
                optimizer=optimizer,
                state=tmp_path / "state",
                state_digest=made.optimizer_digest,
                state_output=tmp_path / "next-state",
            )
        (tmp_path / name).write_bytes(good)


def open_files(directory: Path) -> list[Path]:
    """Those of this process below `directory`."""
    found = [link.resolve() for link in Path("/proc/self/fd").iterdir()]
    return [path for path in found if path.is_relative_to(directory)]


def test_a_damaged_update_leaves_no_file_open(tmp_path: Path) -> None:
    """The worker lives as long as the coordinator."""
    parts = inputs(tmp_path, [random_model(1), random_model(2)], [0.5, 0.5])
    before = {"previous": tmp_path / "v0", "previous_digest": write(tmp_path / "v0", random_model(0))}
    adam = FedAdam(type="fedadam")
    made = combine(parts, output=tmp_path / "out", **before, optimizer=adam, state_output=tmp_path / "state")
    parts[1].path.write_bytes(parts[0].path.read_bytes())
    # Nor does a state that cannot be written, as on a full disk.
    (tmp_path / "no-file").mkdir()
    for state_output, error in (("next-state", CorruptUpdate), ("no-file", IsADirectoryError)):
        with pytest.raises(error):
            combine(
                parts, output=tmp_path / "next", **before, optimizer=adam, state=tmp_path / "state",
                state_digest=made.optimizer_digest, state_output=tmp_path / state_output,
            )  # fmt: skip
        assert not open_files(tmp_path)


def test_the_worker_process_answers_with_digest_and_size_or_with_the_damaged_site(tmp_path: Path) -> None:
    parts = inputs(tmp_path, [random_model(1), random_model(2)], [0.5, 0.5])
    order = {
        "contributions": [{"site": p.site, "path": str(p.path), "digest": p.digest, "weight": p.weight} for p in parts],
        "optimizer": {"type": "none"},
        "output": str(tmp_path / "out"),
    }

    def run() -> dict:
        command = [sys.executable, "-m", "coordinator.aggregation.worker"]
        done = subprocess.run(command, input=json.dumps(order) + "\n", capture_output=True, text=True)
        answer = json.loads(done.stdout)
        assert answer.pop("peak_rss_bytes") > 0
        return answer

    answer = run()
    assert answer["digest"] == digest_of((tmp_path / "out").read_bytes())
    parts[0].path.write_bytes(parts[1].path.read_bytes())
    assert run() == {"corrupt_site": "site-0"}


def reference_rounds(optimizer, start: np.ndarray, means: list[np.ndarray]) -> np.ndarray:
    """The published update rules, written once more without blocks or files."""
    x, u = start.astype(np.float64), 0.0
    m, v = 0.0, np.full(start.shape, getattr(optimizer, "tau", 0.0) ** 2)
    for mean in means:
        delta = mean - x
        if isinstance(optimizer, FedAvgM):
            u = optimizer.momentum * u + delta
            x = x + optimizer.learning_rate * u
            continue
        if isinstance(optimizer, Nesterov):
            u = optimizer.momentum * u + delta
            x = x + optimizer.learning_rate * (delta + optimizer.momentum * u)
            continue
        m = optimizer.beta1 * m + (1 - optimizer.beta1) * delta
        if isinstance(optimizer, FedAdam):
            v = optimizer.beta2 * v + (1 - optimizer.beta2) * delta**2
        else:
            v = v - (1 - optimizer.beta2) * delta**2 * np.sign(v - delta**2)
        x = x + optimizer.learning_rate * m / (np.sqrt(v) + optimizer.tau)
    return x


@pytest.mark.parametrize(
    "optimizer",
    [
        FedAvgM(type="fedavgm", learning_rate=0.7, momentum=0.9),
        FedAdam(type="fedadam", learning_rate=0.05),
        FedYogi(type="fedyogi", learning_rate=0.05),
        Nesterov(type="nesterov"),
    ],
)
def test_a_server_optimizer_over_three_rounds_equals_the_published_rule(tmp_path: Path, optimizer) -> None:
    previous = tmp_path / "v0"
    start = random_model(0)
    digests = {"previous_digest": write(previous, start), "state_digest": ""}
    state = None
    means = []
    for number in range(1, 4):
        folder = tmp_path / f"round-{number}"
        folder.mkdir()
        models = [random_model(10 * number + k) for k in range(3)]
        parts = inputs(folder, models, [0.2, 0.3, 0.5])
        means.append(sum(w * m["b.weight"].astype(np.float64) for w, m in zip([0.2, 0.3, 0.5], models, strict=True)))
        result = combine(
            parts,
            output=folder / "out",
            previous=previous,
            optimizer=optimizer,
            state=state,
            state_output=folder / "state",
            **digests,
        )
        digests = {"previous_digest": result.digest, "state_digest": result.optimizer_digest}
        assert result.optimizer_digest == digest_of((folder / "state").read_bytes())
        previous, state = folder / "out", folder / "state"
    found = load_file(previous)["b.weight"]
    reference = reference_rounds(optimizer, start["b.weight"], means)
    assert np.linalg.norm(found - reference) <= 1e-6 * np.linalg.norm(reference)


@pytest.mark.parametrize("weights", [[0.75, 0.5], [0.125, 0.25], [1.0, 1.0]])
def test_weights_that_do_not_sum_to_one_count_from_the_version_before(tmp_path: Path, weights: list[float]) -> None:
    start, models = random_model(0), [random_model(1), random_model(2)]
    digest = write(tmp_path / "v0", start)
    parts = inputs(tmp_path, models, weights)
    combine(parts, output=tmp_path / "out", previous=tmp_path / "v0", previous_digest=digest)
    found = load_file(tmp_path / "out")
    for name in SHAPES:
        x = start[name].astype(np.float64)
        expected = x + sum(w * (m[name] - x) for w, m in zip(weights, models, strict=True))
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", ["fednova", "scaffold"])
def test_drift_rules_take_the_factors_of_a_pair_like_any_tensor(tmp_path: Path, rule: str) -> None:
    spec = parse(
        {
            "name": "j", "task": {"type": "classification", "labels": ["a", "b"]}, "data": {"name": "d"},
            "base_model": {"name": "m"}, "method": {"type": "lora", "rank": 2}, "aggregation": {"rule": rule},
            "local": {"steps": 4, "optimizer": "sgd", "learning_rate": 0.5}, "rounds": 2,
        }
    )  # fmt: skip
    rng = np.random.default_rng(1)
    shapes = {"m.lora_A.weight": (2, 5), "m.lora_B.weight": (4, 2), "score.weight": (2, 4)}
    start, *models = ({n: rng.standard_normal(s, dtype=np.float32) for n, s in shapes.items()} for _ in range(3))
    controls = {f"control.{n}": rng.standard_normal(s, dtype=np.float32) for n, s in shapes.items()}
    version = {**start, **(controls if rule == "scaffold" else {})}
    digest = write(tmp_path / "v0", version)
    parts = [
        replace(part, control_weight=weight / 2, steps=steps)
        for part, weight, steps in zip(inputs(tmp_path, models, [0.75, 0.25]), (0.75, 0.25), (4, 8), strict=True)
    ]
    momentum = FedAvgM(type="fedavgm")
    combine(
        parts, output=tmp_path / "out", previous=tmp_path / "v0", previous_digest=digest, spec=spec, round_number=1,
        optimizer=momentum, state_output=tmp_path / "state",
    )  # fmt: skip
    found = load_file(tmp_path / "out")
    assert found.keys() == version.keys()
    assert load_file(tmp_path / "state").keys() == {f"u.{name}" for name in shapes}, "a control has no momentum"
    for name in shapes:
        one, two = (model[name].astype(np.float64) for model in models)
        np.testing.assert_allclose(found[name], 0.75 * one + 0.25 * two, rtol=1e-5, atol=1e-6)
        if rule == "scaffold":
            gradients = [(start[name] - x) / (steps * 0.5) for x, steps in ((one, 4), (two, 8))]
            c = controls[f"control.{name}"].astype(np.float64)
            expected = c + 0.5 * (0.75 * (gradients[0] - c) + 0.25 * (gradients[1] - c))
            np.testing.assert_allclose(found[f"control.{name}"], expected, rtol=1e-5, atol=1e-6)


def test_momentum_zero_and_rate_one_is_the_plain_mean(tmp_path: Path) -> None:
    parts = inputs(tmp_path, [random_model(1), random_model(2)], [0.4, 0.6])
    digest = write(tmp_path / "v0", random_model(0))
    plain = combine(parts, output=tmp_path / "plain")
    assert plain.optimizer_digest == ""
    combine(
        parts,
        output=tmp_path / "momentum",
        previous=tmp_path / "v0",
        previous_digest=digest,
        optimizer=FedAvgM(type="fedavgm", learning_rate=1.0, momentum=0.0),
        state_output=tmp_path / "state",
    )
    one, two = load_file(tmp_path / "plain"), load_file(tmp_path / "momentum")
    for name in SHAPES:
        assert np.allclose(one[name], two[name], rtol=1e-6, atol=1e-7)
