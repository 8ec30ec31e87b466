"""Every version again from nothing but the recipe and the names of its contributors.

The synthetic trainer is a formula, so this needs no agent, no coordinator and none of the bytes that travelled: version
0 and each site's update are made here by that formula, combined by coordinator.aggregation.combine, and once more by
plain numpy in float64, which knows nothing of blocks. A digest that differs means that a round was made of something
else than its record says.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client_agent.synthetic import BLOCK_VALUES, tensor_shapes
from coordinator.aggregation.combine import Input, combine, read_header
from protos import jobspec
from protos.digests import new_hasher
from protos.jobspec import FedAdam, FedAvgM, FedYogi, JobSpec, task_seed
from protos.tensors import make_header
from tests.chaos.evidence import Version
from tests.chaos.scenario import HOUSE

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Made:
    """A version as it must be: its digest, that of each contributor's update, how many examples each site reports.

    A distillation is a training like any other: of the aggregate, by the house agent.
    """

    digest: str
    updates: dict[str, str]
    examples: dict[str, int]
    # The largest difference between the file and float64 arithmetic, in units of the largest value.
    off_by: float = 0.0


def recompute(
    recipe: dict[str, Any], versions: Sequence[Version], *, scratch: Path, undistilled: Collection[int] = ()
) -> dict[int, Made]:
    """What each version must be, by number, given who contributed with what weight, and which were not distilled."""
    spec = jobspec.parse(recipe)
    made: dict[int, Made] = {}
    head, state, state_digest = scratch / "version-0", None, ""
    _write_initial(spec, head)
    made[0] = Made(_digest(head), {}, {})
    reference = _Reference(spec, _values(head))
    for version in sorted(versions, key=lambda version: version.number):
        if version.number == 0:
            continue
        inputs, examples = [], {}
        for part in version.parts:
            seed = task_seed(spec.seed, round_number=version.number, site=part.site)
            update = scratch / f"update-{part.site}"
            _write_update(spec, head, update, seed=seed)
            inputs.append(Input(part.site, update, _digest(update), part.weight))
            examples[part.site] = 100 + seed % 100
        output, state_output = scratch / f"version-{version.number}", scratch / f"state-{version.number}"
        combined = combine(
            inputs,
            output=output,
            previous=head,
            previous_digest=made[version.number - 1].digest,
            optimizer=spec.aggregation.server_optimizer,
            state=state,
            state_digest=state_digest,
            state_output=state_output,
        )
        mean = sum(_values(part.path) * part.weight for part in inputs)
        off_by = reference.step(np.asarray(mean), _values(output))
        digest = combined.digest
        if spec.is_distilled(version.number) and version.number not in undistilled:
            aggregate, output = output, scratch / f"distilled-{version.number}"
            seed = task_seed(spec.seed, round_number=version.number, site=HOUSE)
            _write_update(spec, aggregate, output, seed=seed)
            aggregate.unlink()
            digest = _digest(output)
            reference.go_on_from(_values(output))
        made[version.number] = Made(digest, {part.site: part.digest for part in inputs}, examples, off_by)
        head.unlink()
        head = output
        if combined.optimizer_digest:
            state, state_digest = state_output, combined.optimizer_digest
    return made


class _Reference:
    """The same rule in float64, from each version as it was stored."""

    def __init__(self, spec: JobSpec, first: Values) -> None:
        self._optimizer = spec.aggregation.server_optimizer
        self._head = first
        self._first = np.zeros_like(first)
        tau = getattr(self._optimizer, "tau", 0.0)
        self._second = np.full_like(first, tau**2)

    def go_on_from(self, head: Values) -> None:
        self._head = head

    def step(self, mean: Values, found: Values) -> float:
        """How far the file is from what it must hold; goes on from the file."""
        rule, delta = self._optimizer, mean - self._head
        expected = mean
        if isinstance(rule, FedAvgM):
            self._first = rule.momentum * self._first + delta
            expected = self._head + rule.learning_rate * self._first
        elif isinstance(rule, (FedAdam, FedYogi)):
            self._first = rule.beta1 * self._first + (1 - rule.beta1) * delta
            square = delta * delta
            if isinstance(rule, FedAdam):
                self._second = rule.beta2 * self._second + (1 - rule.beta2) * square
            else:
                self._second = self._second - (1 - rule.beta2) * square * np.sign(self._second - square)
            expected = self._head + rule.learning_rate * self._first / (np.sqrt(self._second) + rule.tau)
        self._head = found
        # The coordinator keeps the state in float32.
        self._first, self._second = (x.astype(np.float32).astype(np.float64) for x in (self._first, self._second))
        return float(np.max(np.abs(found - expected)) / max(1e-12, float(np.max(np.abs(expected)))))


def _write_initial(spec: JobSpec, path: Path) -> None:
    assert isinstance(spec.task, jobspec.Synthetic)
    header, layout = make_header(tensor_shapes(int(spec.task.payload_mb * 1e6)))
    block = 0.02 * np.random.default_rng(spec.seed).standard_normal(BLOCK_VALUES, dtype=np.float32)
    values = np.resize(block, layout.data_bytes // 4)
    path.write_bytes(header + values.tobytes())


def _write_update(spec: JobSpec, head: Path, path: Path, *, seed: int) -> None:
    assert isinstance(spec.task, jobspec.Synthetic)
    header, _ = read_header(head)
    values = np.frombuffer(head.read_bytes()[len(header) :], dtype=np.float32)
    noise = np.random.default_rng(seed).standard_normal(BLOCK_VALUES, dtype=np.float32)
    noise *= np.float32(spec.task.noise)
    path.write_bytes(header + (values + np.resize(noise, values.size)).tobytes())


def _values(path: Path) -> Values:
    header, _ = read_header(path)
    return np.frombuffer(path.read_bytes()[len(header) :], dtype=np.float32).astype(np.float64)


def _digest(path: Path) -> str:
    hasher = new_hasher()
    hasher.update(path.read_bytes())
    return hasher.hexdigest()
