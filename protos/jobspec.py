"""The job spec: what an operator writes as recipe.toml, a coordinator runs and a site approves.

It is data, checked whole before it costs anything: an unknown key or a contradiction fails at submission. Its
canonical JSON is hashed, and a site's approval is bound to that hash. Everything that both sides derive from it (seeds,
the learning rate of a round) is a function here, so that they cannot disagree.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from protos.digests import DIGEST, digest_of
from protos.errors import RecipeInvalid
from protos.identity import NAME
from protos.metrics import LOWER_IS_BETTER
from protos.recipe_errors import explain

SiteName = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/\-]{0,127}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Classification(_Part):
    """Text classification with an encoder: one text, one of the ordered labels."""

    # What an evaluation of this task reports.
    measures: ClassVar[tuple[str, ...]] = ("accuracy", "loss", "macro_f1", "matthews_correlation")

    type: Literal["classification"]
    labels: Annotated[tuple[str, ...], Field(min_length=2, max_length=1000)]
    max_length: Annotated[int, Field(ge=4, le=8192)] = 128

    @model_validator(mode="after")
    def _labels_differ(self) -> Classification:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must differ from one another")
        return self


class Synthetic(_Part):
    """No model: the trainer returns the received tensors plus small deterministic noise. For tests and benchmarks."""

    measures: ClassVar[tuple[str, ...]] = ("accuracy", "loss")

    type: Literal["synthetic"]
    payload_mb: Annotated[float, Field(gt=0, le=100_000)] = 1.0
    train_seconds: Annotated[float, Field(ge=0, le=86_400)] = 0.0
    noise: Annotated[float, Field(ge=0, le=1)] = 1e-3


class Data(_Part):
    """The name under which each site's site.toml describes its own rows."""

    name: Name


class BaseModelRef(_Part):
    """The frozen starting point. Without a digest the first site to build version 0 pins its own for all others."""

    name: Name
    digest: Annotated[str, Field(pattern=f"^{DIGEST.pattern}$")] | None = None
    # Keep only the first n encoder layers.
    layers: Annotated[int, Field(ge=1, le=1000)] | None = None


class Full(_Part):
    """Every weight is federated, except the embeddings where they are frozen."""

    type: Literal["full"]
    freeze_embeddings: bool = False


class Lora(_Part):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) and the task's head are federated."""

    type: Literal["lora"]
    rank: Annotated[int, Field(ge=1, le=1024)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # Names of the linear layers that get an adapter, as PEFT understands them.
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("query", "value")


class Schedule(_Part):
    """The learning rate over rounds: constant, or falling to `final` times its start by the last round.

    The default is above 0, because a last round at learning rate 0 would train nothing.
    """

    type: Literal["constant", "linear", "cosine"] = "constant"
    final: Annotated[float, Field(ge=0, le=1)] = 0.1


class Local(_Part):
    """Training at a site within one round: a number of passes over its rows, or of optimizer steps."""

    epochs: Annotated[float, Field(gt=0, le=1000)] | None = None
    steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 32
    # Rows in memory at once; the rest of the batch is accumulated. Default: the whole batch, halved when out of memory.
    micro_batch_size: Annotated[int, Field(ge=1, le=65_536)] | None = None
    optimizer: Literal["sgd", "adamw"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0, le=1000)] = 2e-5
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_gradient_norm: Annotated[float, Field(gt=0)] | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # The trainer saves its whole state this often, so that a killed one goes on from there. Default: not at all.
    checkpoint_seconds: Annotated[float, Field(gt=0)] | None = None
    schedule: Schedule = Schedule()

    @model_validator(mode="after")
    def _agree(self) -> Local:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError("momentum goes with optimizer = 'sgd'; adamw has its own")
        if self.micro_batch_size and self.micro_batch_size > self.batch_size:
            raise ValueError("micro_batch_size is larger than batch_size")
        return self


class Cohort(_Part):
    """Who trains in a round, and how long it waits."""

    # All enrolled sites, or the named ones.
    sites: Literal["all"] | Annotated[tuple[SiteName, ...], Field(min_length=1)] = "all"
    # How many of them are drawn each round.
    size: Literal["all"] | Annotated[int, Field(ge=1)] = "all"
    # Fewest accepted updates with which a round may close at its deadline.
    quorum: Annotated[int, Field(ge=1)] = 1
    round_deadline_seconds: Annotated[float, Field(gt=0)] = 6 * 3600
    # A task without a byte or a step for this long no longer holds up the round.
    stall_limit_seconds: Annotated[float, Field(gt=0)] = 900
    # How long a round waits for the sites that are not connected yet, once a quorum of them is.
    gather_seconds: Annotated[float, Field(ge=0)] = 30
    # A round that ends below its quorum is tried again this many times before the job fails.
    retries: Annotated[int, Field(ge=0, le=1000)] = 2

    @model_validator(mode="after")
    def _agree(self) -> Cohort:
        if isinstance(self.sites, tuple):
            if len(set(self.sites)) != len(self.sites):
                raise ValueError("a site is named twice")
            if self.quorum > len(self.sites):
                raise ValueError(f"quorum is {self.quorum}, but only {len(self.sites)} sites are named")
            if self.size != "all" and self.size > len(self.sites):
                raise ValueError(f"size is {self.size}, but only {len(self.sites)} sites are named")
        if self.size != "all" and self.quorum > self.size:
            raise ValueError(f"quorum is {self.quorum}, but only {self.size} sites are drawn")
        return self


class Evaluation(_Part):
    """Measuring committed versions. Validation data selects the best round; test data is reported once, at the end."""

    where: tuple[Literal["sites", "house"], ...] = ("sites",)
    # Every n rounds, at round 0 and at the last.
    every: Annotated[int, Field(ge=1)] = 1
    metric: str = "accuracy"
    # Stop when the metric has not improved for this many evaluated rounds; 0: never.
    early_stop: Annotated[int, Field(ge=0)] = 0
    deadline_seconds: Annotated[float, Field(gt=0)] = 3600
    # The house agent's test split, once, on the best version.
    test: bool = False

    @model_validator(mode="after")
    def _agree(self) -> Evaluation:
        if len(set(self.where)) != len(self.where):
            raise ValueError("where names a place twice")
        if self.early_stop and not self.where:
            raise ValueError("early_stop needs an evaluation: where is empty")
        return self

    @property
    def lower_is_better(self) -> bool:
        return self.metric in LOWER_IS_BETTER


class NoServerOptimizer(_Part):
    """The mean becomes the next version as it is."""

    type: Literal["none"]


class FedAvgM(_Part):
    """Server momentum (Hsu et al. 2019, arXiv:1909.06335): u = momentum u + delta; x += learning_rate u."""

    type: Literal["fedavgm"]
    learning_rate: Annotated[float, Field(gt=0)] = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9


class FedAdam(_Part):
    """FedOpt (Reddi et al. 2021, arXiv:2003.00295) with Adam's second moment. No bias correction, as published."""

    type: Literal["fedadam"]
    learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Annotated[float, Field(gt=0)] = 1e-3


class FedYogi(_Part):
    """FedOpt (Reddi et al. 2021, arXiv:2003.00295) with Yogi's second moment."""

    type: Literal["fedyogi"]
    learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Annotated[float, Field(gt=0)] = 1e-3


ServerOptimizer = Annotated[NoServerOptimizer | FedAvgM | FedAdam | FedYogi, Field(discriminator="type")]


class Aggregation(_Part):
    """How updates combine: the weighted mean (FedAvg, McMahan et al. 2017, arXiv:1602.05629)."""

    rule: Literal["mean"] = "mean"
    weights: Literal["examples", "steps", "equal"] = "examples"
    # No site's share exceeds this part of the whole; the excess goes to the others in proportion.
    max_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    server_optimizer: ServerOptimizer = NoServerOptimizer(type="none")


# Keys that 0.1 does not know. Unset they are not written: a recipe keeps its hash, to which approvals are bound, and an
# agent of the release before reads it.
LATER_KEYS = (("local", "checkpoint_seconds"),)


class JobSpec(_Part):
    """A whole recipe. `parse` is the way in."""

    name: Name
    task: Annotated[Classification | Synthetic, Field(discriminator="type")]
    data: Data | None = None
    base_model: BaseModelRef | None = None
    method: Annotated[Full | Lora, Field(discriminator="type")] = Full(type="full")
    local: Local
    cohort: Cohort = Cohort()
    aggregation: Aggregation = Aggregation()
    evaluation: Evaluation = Evaluation()
    rounds: Annotated[int, Field(ge=1, le=1_000_000)]
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0

    @model_validator(mode="after")
    def _agree(self) -> JobSpec:
        if isinstance(self.task, Synthetic):
            if self.base_model or self.data:
                raise ValueError("a synthetic task has neither base_model nor data")
        elif not self.base_model or not self.data:
            raise ValueError(f"a {self.task.type} task needs [base_model] and [data]")
        if self.evaluation.metric not in self.task.measures:
            raise ValueError(f"metric must be one of {', '.join(self.task.measures)} for a {self.task.type} task")
        count = self.cohort.size if self.cohort.size != "all" else None
        if count is None and isinstance(self.cohort.sites, tuple):
            count = len(self.cohort.sites)
        if count and self.aggregation.max_share * count < 1 - 1e-9:
            raise ValueError(f"max_share {self.aggregation.max_share} cannot hold for {count} sites: it must be >= 1/n")
        return self

    @property
    def canonical_json(self) -> str:
        """The same spec always has the same text: keys sorted, defaults written out, but for LATER_KEYS."""
        fields = self.model_dump(mode="json")
        for table, key in LATER_KEYS:
            if fields[table][key] is None:
                del fields[table][key]
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @property
    def hash(self) -> str:
        return digest_of(self.canonical_json.encode())

    def learning_rate_at(self, round_number: int) -> float:
        """The local learning rate of round 1 .. rounds; `schedule.final` times the start in the last round."""
        local, schedule = self.local, self.local.schedule
        progress = (round_number - 1) / (self.rounds - 1) if self.rounds > 1 else 0.0
        if schedule.type == "linear":
            scale = 1 - (1 - schedule.final) * progress
        elif schedule.type == "cosine":
            scale = schedule.final + (1 - schedule.final) * 0.5 * (1 + math.cos(math.pi * progress))
        else:
            scale = 1.0
        return local.learning_rate * scale

    def is_evaluated(self, version: int) -> bool:
        """Whether version 0 .. rounds is measured on validation data."""
        return bool(self.evaluation.where) and (version % self.evaluation.every == 0 or version == self.rounds)


def task_seed(job_seed: int, *, round_number: int, site: str) -> int:
    """The 63-bit seed of one site in one round: no two rounds or sites shuffle alike."""
    text = f"{job_seed}\0{round_number}\0{site}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def parse(fields: dict[str, object]) -> JobSpec:
    """A checked spec from parsed TOML or JSON.

    RecipeInvalid names the first thing that is wrong; `facts["path"]` is its dotted key, for finding the line.
    """
    try:
        return JobSpec.model_validate(fields)
    except ValidationError as error:
        sentence, path = explain(error)
        raise RecipeInvalid(sentence, path=path) from None


def from_json(text: str) -> JobSpec:
    """A checked spec from its JSON. RecipeInvalid as `parse`."""
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise RecipeInvalid(f"The job spec is not JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise RecipeInvalid("The job spec is not a JSON object.")
    return parse(fields)
