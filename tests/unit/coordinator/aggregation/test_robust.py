"""Robust rules: each as its paper has it, whichever way updates are written and whatever they hold."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter
from safetensors.numpy import load_file

from coordinator.aggregation import robust as rules
from coordinator.aggregation.combine import BLOCK_ELEMENTS, CorruptUpdate, Input, combine, read_header
from coordinator.aggregation.gram import ENCODED_ELEMENTS, STACK_ELEMENTS, block_elements
from protos.adapters import update_tensors
from protos.digests import digest_of
from protos.encoded_files import TensorFile, write_encoded
from protos.errors import Internal
from protos.jobspec import JobSpec, parse
from protos.recipe_robust import Robust
from protos.update_figures import COEFFICIENT, COSINE, NORM, by_site
from tests.unit.coordinator.aggregation.test_layers import spec_of, write

SITES = tuple(f"s{number}" for number in range(9))
RULES: list[dict[str, Any]] = [
    {"type": "median"},
    {"type": "trimmed-mean", "trim": 2},
    {"type": "krum", "byzantine": 2},
    {"type": "multi-krum", "byzantine": 2},
    {"type": "centered-clipping", "iterations": 1},
    {"type": "centered-clipping", "radius": 2.0, "iterations": 3},
    {"type": "norm-bound"},
    {"type": "norm-bound", "radius": 3.0},
]
NAMES = ["-".join(str(value) for value in rule.values()) for rule in RULES]
# Uneven, and even: what the first four rules get from coordinator/rounds/cohort.py.
WEIGHTS = np.array([0.05, 0.2, 0.1, 0.15, 0.1, 0.1, 0.1, 0.1, 0.1])
EVEN = np.full(9, 1 / 9)


def rule_of(fields: dict[str, Any]) -> Robust:
    found: Robust = TypeAdapter(Robust).validate_python(fields)
    return found


def deltas(seed: int = 0, *, count: int = 9, length: int = 500) -> np.ndarray:
    """Honest ones with a common part, and two that are wrong: one flipped, one ten times as long."""
    rng = np.random.default_rng(seed)
    made = rng.standard_normal(length) * 0.1 + rng.standard_normal((count, length)) * 0.05
    made[1] *= -1
    made[4] *= 10
    return made


def reference(fields: dict[str, Any], delta: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What is added to the version before, from the vectors themselves and by the papers' words."""
    count = len(delta)
    lengths = np.array([np.linalg.norm(row) for row in delta])
    radius = fields.get("radius") or np.median(lengths)
    match fields["type"]:
        case "median":
            return np.median(delta, axis=0)
        case "trimmed-mean":
            trim = fields["trim"]
            return np.mean(np.sort(delta, axis=0)[trim:-trim], axis=0)
        case "krum" | "multi-krum":
            byzantine = fields["byzantine"]
            scores = []
            for one in range(count):
                others = sorted(np.sum((delta[one] - delta[other]) ** 2) for other in range(count) if other != one)
                scores.append(sum(others[: count - byzantine - 2]))
            taken = np.argsort(scores)[: 1 if fields["type"] == "krum" else count - byzantine]
            return np.mean(delta[taken], axis=0)
        case "norm-bound":
            return sum(w * row * min(1.0, radius / np.linalg.norm(row)) for w, row in zip(weights, delta, strict=True))
    v = np.zeros(delta.shape[1])
    for _ in range(fields["iterations"]):
        kept = [min(1.0, radius / np.linalg.norm(row - v)) for row in delta]
        v = v + sum(w * k * (row - v) for w, k, row in zip(weights, kept, delta, strict=True))
    return v


@pytest.mark.parametrize("fields", RULES, ids=NAMES)
def test_what_follows_from_the_gram_matrix_is_what_the_papers_make_of_the_vectors(fields: dict[str, Any]) -> None:
    for seed in range(5):
        delta, rule = deltas(seed), rule_of(fields)
        for weights in (EVEN, WEIGHTS):
            wanted = reference(fields, delta, weights)
            found = rules.coefficients(rule, delta @ delta.T, weights=weights.tolist())
            assert (found is None) == rules.is_coordinate_wise(rule)
            made = rules.coordinate_wise(rule, delta.copy()) if found is None else found @ delta
            assert np.allclose(made, wanted, rtol=1e-9, atol=1e-9)
            assert found is None or found.sum() <= 1 + 1e-9


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"type": "median"}, 9.0),
        ({"type": "trimmed-mean", "trim": 2}, (6 + 9 + 10) / 3),
        # The sums of the three least squares are 29, 11, 22, 46, 9, 14 and 30. With two or four of them, or with the
        # distances themselves, another one is the best, and others are the five best.
        ({"type": "krum", "byzantine": 2}, 11.0),
        ({"type": "multi-krum", "byzantine": 2}, (11 + 10 + 9 + 6 + 13) / 5),
        # To 3, and from there by 3, 3, 3, 0, 3, 3 and 1.
        ({"type": "centered-clipping", "radius": 3.0, "iterations": 2}, 3 + 16 / 7),
        ({"type": "norm-bound", "radius": 10.0}, (10 + 10 + 6 + 3 + 10 + 9 + 4) / 7),
        # The median norm is 9.
        ({"type": "norm-bound"}, (9 + 9 + 6 + 3 + 9 + 9 + 4) / 7),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else "",
)
def test_seven_numbers_come_to_what_is_worked_out_by_hand(fields: dict[str, Any], wanted: float) -> None:
    delta, rule = np.array([13.0, 10.0, 6.0, 3.0, 11.0, 9.0, 4.0])[:, None], rule_of(fields)
    found = rules.coefficients(rule, delta @ delta.T, weights=[1 / 7] * 7)
    made = rules.coordinate_wise(rule, delta.copy()) if found is None else found @ delta
    assert made == pytest.approx([wanted], rel=1e-11)


def test_the_median_of_an_even_number_is_the_middle_of_two_and_the_sites_order_changes_no_bit() -> None:
    values = deltas(3, count=6)
    for fields in ({"type": "median"}, {"type": "trimmed-mean", "trim": 1}):
        made = {
            rules.coordinate_wise(rule_of(fields), values[list(order)]).tobytes()
            for order in itertools.islice(itertools.permutations(range(6)), 50)
        }
        assert len(made) == 1
    assert np.allclose(
        np.frombuffer(rules.coordinate_wise(rule_of({"type": "median"}), values.copy())), np.median(values, axis=0)
    )


def test_equal_updates_tie_and_the_first_site_wins() -> None:
    gram = np.full((5, 5), 4.0)
    assert rules.krum_order(gram, byzantine=1) == [0, 1, 2, 3, 4]


def test_updates_that_changed_nothing_are_not_clipped() -> None:
    gram = np.zeros((3, 3))
    for kind in ("norm-bound", "centered-clipping"):
        found = rules.coefficients(rule_of({"type": kind}), gram, weights=[0.5, 0.25, 0.25])
        assert found is not None and found.sum() == 1.0


# --- through files


def full_spec(fields: dict[str, Any], **aggregation: Any) -> JobSpec:
    return parse(
        {
            "name": "robust",
            "task": {"type": "synthetic"},
            "local": {"steps": 1},
            "rounds": 3,
            "cohort": {"quorum": 9},
            "aggregation": {"robust": fields, **aggregation},
        }
    )


def lora_spec(fields: dict[str, Any], rule: str) -> JobSpec:
    return spec_of(rule, cohort={"quorum": 9}, aggregation={"robust": fields})


VERSIONS: dict[str, dict[str, tuple[int, ...]]] = {
    "full": {"a.weight": (40, 30), "b.bias": (7,), "c.empty": (0, 3), "d.long": (BLOCK_ELEMENTS + 300,)},
    "lora": {
        "m.q_proj.lora_A.weight": (4, 16), "m.q_proj.lora_B.weight": (20, 4), "score.weight": (3, 16),
    },
}  # fmt: skip


class Round:
    """A version on disk, and updates of nine sites of which two are wrong."""

    def __init__(self, directory: Path, spec: JobSpec, *, shapes: dict[str, tuple[int, ...]], number: int = 1) -> None:
        self.directory, self.spec, self.number = directory, spec, number
        rng = np.random.default_rng(7)
        self.previous = directory / "previous"
        self.digest = write(self.previous, {name: rng.standard_normal(shape) for name, shape in shapes.items()})
        layout = read_header(self.previous)[1]
        self.held = update_tensors(spec, layout, round_number=number, site=SITES[0])
        old = load_file(self.previous)
        elements = sum(int(np.prod(shape)) for _, _, shape in self.held)
        self.parts = []
        for site, delta, weight in zip(SITES, deltas(length=elements), self.weights, strict=True):
            update, at = {}, 0
            for name, _, shape in self.held:
                size = int(np.prod(shape))
                update[name] = old[name] + delta[at : at + size].reshape(shape)
                at += size
            path = directory / site
            self.parts.append(Input(site, path, write(path, update), float(weight)))

    @property
    def weights(self) -> np.ndarray:
        clips = self.spec.aggregation.robust.type in ("norm-bound", "centered-clipping")
        return WEIGHTS if clips else EVEN

    def combine(self, parts: list[Input] | None = None, **more: Any) -> Any:
        made = combine(
            parts or self.parts, output=self.directory / "out", previous=self.previous, previous_digest=self.digest,
            spec=self.spec, round_number=self.number, **more,
        )  # fmt: skip
        return made

    def vector(self, path: Path) -> np.ndarray:
        """What travels of a version or of an update, in one."""
        found = load_file(path)
        return np.concatenate([found[name].astype(np.float64).ravel() for name, _, _ in self.held])

    def wanted(self, fields: dict[str, Any]) -> np.ndarray:
        old = self.vector(self.previous)
        return old + reference(fields, np.stack([self.vector(p.path) - old for p in self.parts]), self.weights)


@pytest.mark.parametrize("fields", RULES, ids=NAMES)
def test_a_version_is_what_the_papers_make_of_the_whole_updates(tmp_path: Path, fields: dict[str, Any]) -> None:
    round_ = Round(tmp_path, full_spec(fields), shapes=VERSIONS["full"])
    made = round_.combine()
    assert np.allclose(round_.vector(tmp_path / "out"), round_.wanted(fields), rtol=1e-6, atol=1e-6)
    norms = by_site(made.metrics, NORM)
    old = round_.vector(round_.previous)
    for part in round_.parts:
        assert norms[part.site] == pytest.approx(np.linalg.norm(round_.vector(part.path) - old), rel=1e-6)
    cosines = by_site(made.metrics, COSINE)
    assert cosines["s1"] < -0.1 < 0.1 < min(value for site, value in cosines.items() if site != "s1")
    coefficients = by_site(made.metrics, COEFFICIENT)
    if fields["type"] == "multi-krum":
        assert [site for site, a in coefficients.items() if not a] == ["s1", "s4"]
    assert bool(coefficients) == (fields["type"] not in ("median", "trimmed-mean"))


@pytest.mark.parametrize("rule", ["mean", "ffa-lora", "rolora"])
@pytest.mark.parametrize("fields", RULES[:4:3] + RULES[5:7], ids=lambda fields: fields["type"])
def test_of_adapters_the_travelling_factors_are_one_vector_and_the_others_stay(
    tmp_path: Path, fields: dict[str, Any], rule: str
) -> None:
    for number in (1, 2):
        (directory := tmp_path / str(number)).mkdir()
        round_ = Round(directory, lora_spec(fields, rule), shapes=VERSIONS["lora"], number=number)
        round_.combine()
        assert np.allclose(round_.vector(directory / "out"), round_.wanted(fields), rtol=1e-6, atol=1e-6)
        before, after = load_file(round_.previous), load_file(directory / "out")
        still = set(before) - {name for name, _, _ in round_.held}
        assert bool(still) == (rule != "mean")
        assert all(np.array_equal(before[name], after[name]) for name in still)


def stored(part: Input, path: Path, *, encoding: str) -> Input:
    return replace(part, path=path, digest=digest_of(path.read_bytes()), encoding=encoding, block=64)


@pytest.mark.parametrize("fields", RULES[::3] + RULES[4:5], ids=lambda fields: fields["type"])
@pytest.mark.parametrize("encoding", ["int8", "bf16"])
def test_encoded_updates_count_as_what_they_stand_for(tmp_path: Path, fields: dict[str, Any], encoding: str) -> None:
    round_ = Round(tmp_path, full_spec(fields), shapes=VERSIONS["full"])
    encoded, plain = [], []
    for part in round_.parts:
        with TensorFile(part.path) as trained:
            write_encoded(
                lambda name: trained.leading(name, trained.shape(name)), tensors=round_.held, base=round_.previous,
                encoding=encoding, block=64, seed=1, output=tmp_path / f"q-{part.site}",
            )  # fmt: skip
        encoded.append(stored(part, tmp_path / f"q-{part.site}", encoding=encoding))
        # The mean of one update is what it stands for.
        combine(
            [replace(encoded[-1], weight=1.0)], output=tmp_path / f"p-{part.site}", previous=round_.previous,
            previous_digest=round_.digest, spec=full_spec({"type": "none"}), round_number=1,
        )  # fmt: skip
        plain.append(stored(part, tmp_path / f"p-{part.site}", encoding="raw"))
    assert round_.combine(encoded).digest == round_.combine(plain).digest != round_.combine().digest


def test_a_server_optimizer_takes_the_robust_aggregate_for_the_mean(tmp_path: Path) -> None:
    for number, shapes in ((0, VERSIONS["full"]), (6, VERSIONS["full"]), (2, VERSIONS["lora"])):
        fields = RULES[number]
        momentum = {"type": "fedavgm", "learning_rate": 0.5, "momentum": 0.9}
        spec = full_spec(fields, server_optimizer=momentum)
        if "score.weight" in shapes:
            changes = {"robust": fields, "server_optimizer": momentum}
            spec = spec_of("ffa-lora", cohort={"quorum": 9}, aggregation=changes)
        (directory := tmp_path / str(number)).mkdir()
        round_ = Round(directory, spec, shapes=shapes)
        round_.combine(optimizer=spec.aggregation.server_optimizer, state_output=directory / "state")
        old = round_.vector(round_.previous)
        wanted = old + 0.5 * (round_.wanted(fields) - old)
        assert np.allclose(round_.vector(directory / "out"), wanted, rtol=1e-6, atol=1e-6)
        moved, state = {name for name, _, _ in round_.held}, load_file(directory / "state")
        assert all(
            np.any(values) == (name.removeprefix("u.") in moved) for name, values in state.items() if values.size
        )


def test_a_report_alone_changes_no_bit_of_the_mean(tmp_path: Path) -> None:
    spec = full_spec({"type": "none"}, report=True)
    round_ = Round(tmp_path, spec, shapes=VERSIONS["full"])
    made = round_.combine()
    assert len(by_site(made.metrics, NORM)) == 9 and not by_site(made.metrics, COEFFICIENT)
    assert made.digest == combine(round_.parts, output=tmp_path / "plain").digest
    with pytest.raises(Internal):
        combine(round_.parts, output=tmp_path / "plain", spec=spec)


def test_one_bit_that_was_damaged_is_told_from_whose_it_is_before_anything_is_made_of_it(tmp_path: Path) -> None:
    round_ = Round(tmp_path, full_spec({"type": "krum"}), shapes=VERSIONS["full"])
    # Also where the rule would have left this update out.
    part = next(part for part in round_.parts if part.site == "s4")
    data = bytearray(part.path.read_bytes())
    data[-1] ^= 1
    part.path.write_bytes(data)
    with pytest.raises(CorruptUpdate, match="s4"):
        round_.combine()
    assert not (tmp_path / "out").exists()


def test_a_larger_cohort_is_read_in_smaller_blocks() -> None:
    assert block_elements(1) == block_elements(4) == BLOCK_ELEMENTS
    for sites in range(1, 5000, 7):
        block = block_elements(sites)
        assert block % ENCODED_ELEMENTS == 0
        assert sites * block <= STACK_ELEMENTS or block == ENCODED_ELEMENTS


def test_so_many_updates_that_their_blocks_are_small_are_combined_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    values = {"a": rng.standard_normal(BLOCK_ELEMENTS // 2), "b": rng.standard_normal(5)}
    previous = write(tmp_path / "previous", values)
    parts, updates = [], []
    for number in range(40):
        updates.append({name: value + rng.standard_normal(value.shape) for name, value in values.items()})
        path = tmp_path / f"site-{number:02}"
        parts.append(Input(path.name, path, write(path, updates[-1]), 1 / 40))
    assert block_elements(40) < len(values["a"])
    combine(
        parts, output=tmp_path / "out", previous=tmp_path / "previous", previous_digest=previous,
        spec=full_spec({"type": "median"}), round_number=1,
    )  # fmt: skip
    found = load_file(tmp_path / "out")
    for name in values:
        wanted = np.median([update[name].astype(np.float32).astype(np.float64) for update in updates], axis=0)
        assert np.array_equal(found[name], wanted.astype(np.float32))
