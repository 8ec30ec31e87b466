"""The bytes of a job before it runs: which tensors travel, and how large the files are that they travel in.

It is the arithmetic of the files themselves. The names and shapes of a version follow from the recipe and from the
linear layers that a site reports of its base model; what of them an update holds is said in protos/adapters.py, and how
it is written in protos/encodings.py. Data sections are exact. Headers are so where the modules of the model are named
as in its checkpoint, as a causal language model's are; a classifier's may be off by a few bytes for each tensor.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from coordinator.rounds.cohort import draw_order
from coordinator.rounds.state import SiteFact
from protos.adapters import moving, split_name, update_tensors, with_controls
from protos.encodings import Named, encoded_header
from protos.jobspec import Classification, Full, JobSpec, Lora, Synthetic
from protos.recipe_rules import FOLDING_RULES
from protos.tensors import Layout, make_header

# Each array of Flower's messages is a file of numpy's format: its values, and a header of this size.
NUMPY_HEADER_BYTES = 128
# Rounds whose cohorts are drawn here as they will be; of a longer job the rest is taken to be like them.
DRAWN_ROUNDS = 1000


@dataclass(frozen=True)
class Linear:
    """`count` layers with weights [out_features, in_features]; `name` is their path, a * for each number."""

    name: str
    out_features: int
    in_features: int
    count: int

    @property
    def parameters(self) -> int:
        return self.count * self.out_features * self.in_features


@dataclass(frozen=True)
class Shapes:
    """What a site reports of its base model. `parameters` counts everything, embeddings too."""

    parameters: int
    hidden_size: int
    layers: int
    vocabulary: int
    linear: tuple[Linear, ...]

    def cut(self, layers: int | None) -> Shapes:
        """The same model with only its first `layers` layers."""
        if layers is None or not 0 < layers < self.layers:
            return self
        kept = tuple(
            # Layers that share their weights (ALBERT) cannot be told apart, and stay.
            replace(each, count=each.count // self.layers * layers) if each.count >= self.layers else each
            for each in self.linear
        )
        gone = sum(_with_bias(before) - _with_bias(after) for before, after in zip(self.linear, kept, strict=True))
        return replace(self, parameters=self.parameters - gone, layers=layers, linear=kept)


def _with_bias(linear: Linear) -> int:
    return linear.parameters + linear.count * linear.out_features


def paths_of(linear: Linear, *, layers: int) -> Iterator[str]:
    """The path of each of the layers that `linear` stands for. A second * counts the experts of a layer."""
    for number in range(linear.count):
        first, stars, rest = linear.name.partition("*")
        inner = number // layers if "*" in rest else 0
        yield f"{first}{(number % layers if '*' in rest else number) if stars else ''}{rest.replace('*', str(inner))}"


def takes_adapter(path: str, linear: Linear, *, method: Lora, shapes: Shapes) -> bool:
    """Whether PEFT puts an adapter there: the target is the path, or its end. "all-linear" is all but the output."""
    if method.targets == ("all-linear",):
        return "*" in linear.name or linear.out_features != shapes.vocabulary
    return any(path == target or path.endswith(f".{target}") for target in method.targets)


def version_tensors(spec: JobSpec, shapes: Shapes | None, *, fold: int = 0) -> list[Named]:
    """(name, dtype, shape) of a version; `fold` is the rank of what flora or fedex added to the frozen weights so far.

    `shapes` is None for a synthetic task, which has no base model.
    """
    if isinstance(spec.task, Synthetic) or shapes is None:
        assert isinstance(spec.task, Synthetic)
        return [("payload", "F32", (round(spec.task.payload_mb * 1e6 / 4),))]
    labels = len(spec.task.labels) if isinstance(spec.task, Classification) else 0
    head = [("classifier.weight", (labels, shapes.hidden_size)), ("classifier.bias", (labels,))] if labels else []
    if isinstance(spec.method, Full):
        found: list[tuple[str, tuple[int, ...]]] = [
            (f"{path}.weight", (linear.out_features, linear.in_features))
            for linear in shapes.linear
            for path in paths_of(linear, layers=shapes.layers)
        ]
        weights = sum(linear.parameters for linear in shapes.linear)
        # Biases, norms and embeddings are not reported one by one.
        rest = sum(_with_bias(linear) for linear in shapes.linear) if spec.method.freeze_embeddings else 0
        found.append(("rest", (max(0, (rest or shapes.parameters) - weights),)))
        return with_controls(spec, [(name, "F32", shape) for name, shape in [*found, *head]])
    rank = spec.method.rank
    factors: list[tuple[str, tuple[int, ...]]] = []
    for linear in shapes.linear:
        for path in paths_of(linear, layers=shapes.layers):
            if not takes_adapter(path, linear, method=spec.method, shapes=shapes):
                continue
            factors += [
                (f"{path}.lora_A.weight", (rank, linear.in_features)),
                (f"{path}.lora_B.weight", (linear.out_features, rank)),
            ]
            if spec.aggregation.rule == "fed-sb":
                factors.append((f"{path}.lora_R.weight", (rank, rank)))
            # A fold of more columns than the matrix has is written in as many as that.
            if columns := min(fold, linear.in_features, linear.out_features):
                factors += [
                    (f"{path}.fold_A.weight", (columns, linear.in_features)),
                    (f"{path}.fold_B.weight", (linear.out_features, columns)),
                ]
    return with_controls(spec, [(f"base_model.model.{name}", "F32", shape) for name, shape in [*factors, *head]])


def update_bytes(spec: JobSpec, version: Layout, *, round_number: int, site: str) -> int:
    """The file that a site sends up in this round."""
    tensors = update_tensors(spec, version, round_number=round_number, site=site)
    return encoded_header(tensors, encoding=spec.encoding.up, block=spec.encoding.block)[1].file_bytes


def version_bytes(spec: JobSpec, version: Layout, *, number: int) -> int:
    """The file that a site fetches of version `number`. With an encoding each site builds version 0 by itself."""
    if spec.encoding.down == "raw":
        return version.file_bytes
    tensors, way = moving(spec, version.named), spec.encoding
    return encoded_header(tensors, encoding=way.down, block=way.block)[1].file_bytes if number else 0


def numpy_bytes(layout: Layout) -> int:
    """One message of Flower's with these adapters or weights: what the FlowerTune study counts."""
    arrays = [tensor for tensor in layout.tensors if split_name(tensor.name)[1] != "lora_R"]
    return sum(tensor.size_bytes + NUMPY_HEADER_BYTES for tensor in arrays)


@dataclass(frozen=True)
class SiteTraffic:
    """Of one site in the whole job. Evaluations fetch only versions that training there did not."""

    rounds: int
    up_bytes: int
    down_bytes: int
    evaluation_bytes: int
    # Of a house agent that distils: versions up; aggregates and, without labels, updates down.
    distillation_up_bytes: int = 0
    distillation_down_bytes: int = 0


@dataclass(frozen=True)
class Ledger:
    """The bytes of the whole job, payload only. Who trains when is as it will be if all sites are connected."""

    sites: Mapping[str, SiteTraffic]
    # Of each round that was drawn: its cohort.
    cohorts: tuple[tuple[str, ...], ...]
    # Uploaded once, by the agent that builds version 0; and the last version, which with some rules is larger.
    first_version_bytes: int
    last_version_bytes: int
    # What lies beside each later version: its encoded form. 0 without an encoding.
    encoded_version_bytes: int
    # What flora or fedex will have added to the frozen weights in the end.
    fold_rank: int
    # The same rounds as Flower would send them.
    numpy_bytes: int

    @property
    def up_bytes(self) -> int:
        return sum(site.up_bytes for site in self.sites.values())

    @property
    def down_bytes(self) -> int:
        return sum(site.down_bytes for site in self.sites.values())

    @property
    def distillation_bytes(self) -> int:
        return sum(site.distillation_up_bytes + site.distillation_down_bytes for site in self.sites.values())

    @property
    def evaluation_bytes(self) -> int:
        return sum(site.evaluation_bytes for site in self.sites.values())


def at_house(spec: JobSpec) -> bool:
    """Whether the house agent has something to measure or to distil."""
    return "house" in spec.evaluation.where or spec.evaluation.test or spec.distillation is not None


def fold_growth(spec: JobSpec, cohort: Sequence[str]) -> int:
    """By how much a round with this cohort raises the rank of what was added to the frozen weights.

    flora stacks the factors of all; fedex adds what their means miss, which is one site's rank less.
    """
    if spec.aggregation.rule not in FOLDING_RULES:
        return 0
    ranks = [spec.rank_at(site) for site in cohort]
    return sum(ranks) - (max(ranks, default=0) if spec.aggregation.rule == "fedex" else 0)


def ledger(
    spec: JobSpec, shapes: Shapes | None, *, sites: Sequence[str], house: str = "", whole: Collection[str] = ()
) -> Ledger:
    """All transfers of a job with these sites, and the house agent where there is work for one. Those in `whole`
    fetch versions whole, whatever the encoding."""
    drawn = min(spec.rounds, DRAWN_ROUNDS)
    facts = [SiteFact(name, house=False, connected=True) for name in sites]
    measures = "house" in spec.evaluation.where or spec.evaluation.test
    evaluators = {*(sites if "sites" in spec.evaluation.where else ()), *([house] if measures and house else ())}
    rounds = dict.fromkeys([*sites, *([house] if at_house(spec) and house else ())], 0)
    up, down, measured, taught, learnt = (dict(rounds) for _ in range(5))
    cohorts: list[tuple[str, ...]] = []
    fold, flower = 0, 0
    version = make_header(version_tensors(spec, shapes))[1]
    first, sizes = version, {}
    for number in range(1, drawn + 1):
        cohort = tuple(sites)
        if spec.cohort.size != "all":
            order = draw_order(facts, seed=spec.seed, round_number=number)
            cohort = tuple(site.name for site in order[: spec.cohort.size])
        cohorts.append(cohort)
        encoded = version_bytes(spec, version, number=number - 1)
        for site in rounds:
            fetched = version.file_bytes if site in whole else encoded
            if site in cohort:
                rounds[site] += 1
                down[site] += fetched
                key = (site, number % 2)
                if key not in sizes:
                    # Folds do not travel up, and every rule's rounds repeat in pairs.
                    sizes[key] = update_bytes(spec, first, round_number=number, site=site)
                up[site] += sizes[key]
            elif site in evaluators and spec.is_evaluated(number - 1):
                measured[site] += fetched
        if house and spec.distillation and spec.is_distilled(number):
            members = 0 if spec.distillation.labels else sum(sizes[site, number % 2] for site in cohort)
            taught[house] += first.file_bytes
            learnt[house] += first.file_bytes + members
        flower += 2 * len(cohort) * numpy_bytes(first)
        if growth := fold_growth(spec, cohort):
            fold += growth
            version = make_header(version_tensors(spec, shapes, fold=fold))[1]
    for site in evaluators:
        measured[site] += version.file_bytes if site in whole else version_bytes(spec, version, number=drawn)
    longer = spec.rounds / drawn
    return Ledger(
        sites={
            site: SiteTraffic(
                round(rounds[site] * longer),
                round(up[site] * longer),
                round(down[site] * longer),
                round(measured[site] * longer),
                round(taught[site] * longer),
                round(learnt[site] * longer),
            )
            for site in rounds
        },
        cohorts=tuple(cohorts),
        first_version_bytes=first.file_bytes,
        last_version_bytes=math.ceil(version.file_bytes + (version.file_bytes - first.file_bytes) * (longer - 1)),
        encoded_version_bytes=0 if spec.encoding.down == "raw" else version_bytes(spec, first, number=1),
        fold_rank=math.ceil(fold * longer),
        numpy_bytes=round(flower * longer),
    )
