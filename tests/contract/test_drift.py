"""Drift control on a convex problem: the trainer's loop at three sites and the coordinator's aggregation together make
what the papers' formulas make, written once more in float64 for a softmax regression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, asdict, dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from client_agent.taskdir import TaskSpec
from client_agent.training.drift import STATE, read_corrections, with_controls, write_state
from client_agent.training.files import write_tensors
from client_agent.training.model import Model
from client_agent.training.train import batches, train
from coordinator.aggregation.worker import carry_out
from coordinator.rounds import state as s
from coordinator.rounds.cohort import contributions
from protos import jobspec
from protos.digests import digest_of

Weights = NDArray[np.float64]
CLASSES, FEATURES = 3, 4
# Rows of each site: an epoch is 1, 2 and 5 steps.
SITES = {"a": 8, "b": 16, "c": 40}
COHORTS = ("abc", "ac", "bc", "abc")
DECAY = 0.05


@dataclass(frozen=True)
class Points:
    """Rows of a site, as the loop takes them."""

    x: Tensor
    y: Tensor
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.y)

    @property
    def examples(self) -> int:
        return len(self.y)

    @property
    def lengths(self) -> Tensor:
        return torch.ones(len(self.y), dtype=torch.int64)

    @property
    def content(self) -> tuple[Tensor, ...]:
        return self.x, self.y

    def target_count(self, rows: Tensor) -> int:
        return len(rows)

    def batch(self, rows: Tensor, *, device: Any) -> tuple[dict[str, Tensor], Tensor]:
        return {"x": self.x[rows]}, self.y[rows]


class Softmax(nn.Module):
    is_activation_checkpointing = False

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(CLASSES, FEATURES))


class Regression:
    def predict(self, network: Softmax, inputs: dict[str, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        return inputs["x"] @ network.weight.T, targets


@cache
def points(site: str) -> Points:
    """Each site has its own mixture of classes, and features that lie elsewhere."""
    rng = np.random.default_rng(ord(site))
    y = rng.choice(CLASSES, size=SITES[site], p=np.roll([0.7, 0.2, 0.1], ord(site)))
    x = rng.standard_normal((SITES[site], FEATURES)) + y[:, None] * 0.5 + ord(site) % 3
    return Points(torch.tensor(x, dtype=torch.float32), torch.tensor(y))


def recipe(*, local: dict[str, Any] | None = None, **aggregation: Any) -> jobspec.JobSpec:
    return jobspec.parse(
        {
            "name": "convex",
            "task": {"type": "classification", "labels": ["a", "b", "c"]},
            "data": {"name": "points"},
            "base_model": {"name": "none"},
            "local": {
                "epochs": 2, "batch_size": 8, "optimizer": "sgd", "learning_rate": 0.1, "weight_decay": DECAY,
                **(local or {}),
            },
            "aggregation": aggregation,
            "evaluation": {"where": []},
            "rounds": 1000,
        }
    )  # fmt: skip


@dataclass
class Federation:
    """Version after version, as trainer and coordinator make them."""

    spec: jobspec.JobSpec
    directory: Path
    round: int = 0
    optimizer_digest: str = ""
    counted: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SITES, 0))
    start: InitVar[Weights | None] = None

    def __post_init__(self, start: Weights | None) -> None:
        first = torch.zeros(CLASSES, FEATURES) if start is None else torch.tensor(start, dtype=torch.float32)
        write_tensors(with_controls({"weight": first}, spec=self.spec), path=self.version)

    @property
    def version(self) -> Path:
        return self.directory / f"version-{self.round}"

    @property
    def weights(self) -> Weights:
        return load_file(self.version)["weight"].double().numpy()

    def train(self, site: str, *, number: int | None = None) -> tuple[Path, int]:
        """The update of a site in the next round, and its steps."""
        spec, rows = self.spec, points(site)
        number = number or self.round + 1
        network = Softmax()
        network.weight.data.copy_(load_file(self.version)["weight"])
        model = Model(
            network, None, torch.device("cpu"), {"weight": network.weight.detach()}, {"weight": (CLASSES, FEATURES)}
        )  # type: ignore[arg-type]
        steps, rate = spec.local.step_count(len(rows)), spec.learning_rate_at(number)
        task = TaskSpec(
            "task", "job", number, "train", spec.model_dump(mode="json"), 0, "", str(self.version), None, "", None,
            "cpu", 1, site=site, state_directory=str(self.directory / site), counted_round=self.counted[site],
        )  # fmt: skip
        scaffold = spec.aggregation.rule == "scaffold"
        corrections = read_corrections(task, model=model, version=self.version) if scaffold else None
        train(
            model, tokens=rows, task=Regression(), local=spec.local, steps=steps,  # type: ignore[arg-type]
            learning_rate_at=lambda step: rate, seed=seed_of(site, number), on_step=lambda *_: None,
            corrections=corrections,
        )  # fmt: skip
        update = self.directory / f"update-{number}-{site}"
        write_tensors(model.federated, path=update)
        if corrections:
            write_state(
                task, model=model, corrections=corrections, version=self.version, steps=steps, learning_rate=rate
            )
        return update, steps

    def go(self, cohort: Sequence[str]) -> None:
        """A round, until it is committed."""
        made = {site: self.train(site) for site in cohort}
        updates = [
            s.Update(site, s.Fate.ACCEPTED, digest_of(path.read_bytes()), 0, SITES[site], steps)
            for site, (path, steps) in made.items()
        ]
        job = s.Job("job", self.spec, s.JobState.RUNNING, self.round, None, 0.0)
        parts = contributions(job, updates, sites=len(SITES))
        previous, optimizer = self.version, self.spec.aggregation.server_optimizer
        self.round += 1
        answer = carry_out(
            {
                "spec": self.spec.model_dump(mode="json"),
                "round": self.round,
                "contributions": [{**asdict(part), "path": str(made[part.site][0])} for part in parts],
                "optimizer": optimizer.model_dump(),
                "output": str(self.version),
                "previous": str(previous),
                "previous_digest": digest_of(previous.read_bytes()),
                "state": str(self.directory / f"state-{self.round - 1}") if self.optimizer_digest else "",
                "state_digest": self.optimizer_digest,
                "state_output": str(self.directory / f"state-{self.round}"),
            }
        )
        assert answer["digest"] == digest_of(self.version.read_bytes())
        self.optimizer_digest = answer["optimizer_digest"]
        self.counted |= dict.fromkeys(cohort, self.round)


def seed_of(site: str, number: int) -> int:
    return 10 * number + ord(site)


def gradient(x: Weights, site: str, rows: Tensor | slice = slice(None)) -> Weights:
    """Of the mean loss over these rows of a site, with its weight decay."""
    features, y = points(site).x[rows].double().numpy(), points(site).y[rows].numpy()
    logits = features @ x.T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return (p - np.eye(CLASSES)[y]).T @ features / len(y) + DECAY * x


def local_rows(spec: jobspec.JobSpec, site: str, number: int) -> list[Tensor]:
    order = batches(SITES[site], batch_size=spec.local.batch_size, seed=seed_of(site, number))
    return list(islice(order, spec.local.step_count(SITES[site])))


def check(found: Federation, expected: Weights) -> None:
    assert np.linalg.norm(expected) > 0.1
    np.testing.assert_allclose(found.weights, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_fedprox_adds_the_way_back_to_the_version_to_every_gradient(
    tmp_path: Path, micro_batch_size: int | None
) -> None:
    spec = recipe(local={"proximal": 1.5, "max_gradient_norm": 1.0, "micro_batch_size": micro_batch_size})
    federation, version = Federation(spec, tmp_path), np.zeros((CLASSES, FEATURES))
    for number in (1, 2, 3):
        federation.go("abc")
        mean = np.zeros_like(version)
        for site in SITES:
            x = version.copy()
            for rows in local_rows(spec, site, number):
                # PyTorch's decay comes after the clipping.
                g = gradient(x, site, rows) - DECAY * x + 1.5 * (x - version)
                x -= 0.1 * (g / max(1.0, np.linalg.norm(g)) + DECAY * x)
            mean += SITES[site] / sum(SITES.values()) * x
        version = mean
    check(federation, version)


@pytest.mark.parametrize("weights", ["equal", "examples"])
def test_scaffold_is_option_two_of_the_paper(tmp_path: Path, weights: str) -> None:
    spec = recipe(rule="scaffold", weights=weights)
    federation, version = Federation(spec, tmp_path), np.zeros((CLASSES, FEATURES))
    common, own = np.zeros_like(version), {site: np.zeros_like(version) for site in SITES}
    for number, cohort in enumerate(COHORTS if weights == "equal" else ("abc",) * 4, start=1):
        federation.go(cohort)
        total = sum(SITES[site] for site in cohort)
        share = {site: 1 / len(cohort) if weights == "equal" else SITES[site] / total for site in cohort}
        moved, turned = np.zeros_like(version), np.zeros_like(version)
        for site in cohort:
            x, order = version.copy(), local_rows(spec, site, number)
            for rows in order:
                x -= 0.1 * (gradient(x, site, rows) - own[site] + common)
            new = own[site] - common + (version - x) / (len(order) * 0.1)
            moved += share[site] * (x - version)
            turned += share[site] * (new - own[site])
            own[site] = new
        version, common = version + moved, common + len(cohort) / len(SITES) * turned
    check(federation, version)
    found = load_file(federation.version)["control.weight"].numpy()
    np.testing.assert_allclose(found, common, rtol=1e-4, atol=1e-5)
    for site in SITES:
        kept = load_file(tmp_path / site / STATE.format(round=federation.counted[site]))["weight"].numpy()
        np.testing.assert_allclose(kept, own[site], rtol=1e-4, atol=1e-5)


def test_a_training_that_did_not_count_leaves_no_trace_in_scaffold(tmp_path: Path) -> None:
    for name in ("calm", "rough"):
        (tmp_path / name).mkdir()
        federation = Federation(recipe(rule="scaffold"), tmp_path / name)
        federation.go("abc")
        if name == "rough":
            # Round 2 is trained, and killed, and trained again; then it closes without c, whose training is lost.
            first = [path.read_bytes() for path, _ in (federation.train("a"), federation.train("a"))]
            assert first[0] == first[1]
            federation.train("c")
            assert {path.name for path in (tmp_path / name / "c").iterdir()} == {STATE.format(round=n) for n in (1, 2)}
        federation.go("ab")
        federation.go("abc")
    versions = [(tmp_path / name / "version-3").read_bytes() for name in ("calm", "rough")]
    assert versions[0] == versions[1]
    assert [path.name for path in (tmp_path / "rough" / "c").iterdir() if path.name != STATE.format(round=3)] == [
        STATE.format(round=1)
    ]


def test_a_site_that_lost_its_home_takes_itself_to_be_like_the_others(tmp_path: Path) -> None:
    federation = Federation(recipe(rule="scaffold"), tmp_path)
    federation.go("abc")
    (tmp_path / "a" / STATE.format(round=1)).unlink()
    uncorrected, _ = federation.train("a")
    (tmp_path / "plain").mkdir()
    plain = Federation(recipe(), tmp_path / "plain", start=federation.weights)
    expected, _ = plain.train("a", number=2)
    assert uncorrected.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fednova_takes_each_site_by_the_length_of_its_path(tmp_path: Path, momentum: float) -> None:
    spec = recipe(rule="fednova", local={"momentum": momentum})
    federation, version = Federation(spec, tmp_path), np.zeros((CLASSES, FEATURES))
    for number, cohort in enumerate(COHORTS, start=1):
        federation.go(cohort)
        share = {site: SITES[site] / sum(SITES[one] for one in cohort) for site in cohort}
        directions, lengths = {}, {}
        for site in cohort:
            x, u = version.copy(), np.zeros_like(version)
            # The accumulation vector, one gradient after the other: how often each is in x_k - x.
            counts: list[float] = []
            for rows in local_rows(spec, site, number):
                u = momentum * u + gradient(x, site, rows)
                x -= 0.1 * u
                counts.append(0.0)
                counts = [count + momentum ** (len(counts) - 1 - place) for place, count in enumerate(counts)]
            lengths[site] = sum(counts)
            directions[site] = (x - version) / lengths[site]
        effective = sum(share[site] * lengths[site] for site in cohort)
        version = version + effective * sum(share[site] * directions[site] for site in cohort)
    check(federation, version)


def test_the_outer_step_of_diloco_is_that_of_torchs_nesterov(tmp_path: Path) -> None:
    spec = recipe(server_optimizer={"type": "nesterov"}, local={"optimizer": "adamw", "weight_decay": 0.0})
    federation = Federation(spec, tmp_path)
    outer = torch.zeros(CLASSES, FEATURES, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([outer], lr=0.7, momentum=0.9, nesterov=True)
    for number in (1, 2, 3, 4):
        before = federation.weights
        federation.go("abc")
        updates = [load_file(tmp_path / f"update-{number}-{site}")["weight"].double() for site in SITES]
        mean = sum(rows / sum(SITES.values()) * x for rows, x in zip(SITES.values(), updates, strict=True))
        outer.grad = torch.tensor(before) - mean
        optimizer.step()
    check(federation, outer.detach().numpy())


def test_who_begins_at_the_optimum_stays_there_with_fednova_and_scaffold(tmp_path: Path) -> None:
    """Sites that differ, with 2, 4 and 10 steps a round: the mean goes from everybody's optimum towards that of c."""
    optimum = np.zeros((CLASSES, FEATURES))
    for _ in range(1500):
        optimum -= 0.2 * sum(rows / sum(SITES.values()) * gradient(optimum, site) for site, rows in SITES.items())
    away: dict[str, list[float]] = {}
    for rule, rounds in (("mean", 4), ("fednova", 1), ("scaffold", 4)):
        (tmp_path / rule).mkdir()
        federation = Federation(recipe(rule=rule, local={"learning_rate": 0.02}), tmp_path / rule, start=optimum)
        away[rule] = []
        for _ in range(rounds):
            federation.go("abc")
            away[rule].append(float(np.linalg.norm(federation.weights - optimum)))
    assert away["mean"][3] > 3 * away["mean"][0]
    assert away["fednova"][0] < 0.1 * away["mean"][0]
    # In its first round nothing is known of the others' gradients yet.
    assert away["scaffold"][0] == pytest.approx(away["mean"][0], rel=1e-5)
    assert away["scaffold"][3] < 1.1 * away["scaffold"][0]
