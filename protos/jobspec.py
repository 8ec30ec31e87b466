"""The job spec: what an operator writes as recipe.toml, a coordinator runs and a site approves.

It is data, checked whole before it costs anything: an unknown key or a contradiction fails at submission. Its
canonical JSON is hashed, and a site's approval is bound to that hash. Everything that both sides derive from it (seeds,
the learning rate of a round) is a function here, so that they cannot disagree.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from protos.digests import digest_of
from protos.errors import RecipeInvalid
from protos.metrics import LOWER_IS_BETTER, benchmark_of
from protos.recipe_errors import explain
from protos.recipe_methods import BaseModelRef as BaseModelRef
from protos.recipe_methods import Full as Full
from protos.recipe_methods import Lora as Lora
from protos.recipe_methods import Method
from protos.recipe_part import Name, Part, SiteName
from protos.recipe_rules import FOLDING_RULES, REBASING_RULES
from protos.recipe_rules import Aggregation as Aggregation
from protos.recipe_rules import Encoding as Encoding
from protos.recipe_rules import FedAdam as FedAdam
from protos.recipe_rules import FedAvgM as FedAvgM
from protos.recipe_rules import FedYogi as FedYogi
from protos.recipe_rules import NoServerOptimizer as NoServerOptimizer
from protos.recipe_rules import ServerOptimizer as ServerOptimizer
from protos.recipe_tasks import CausalLm as CausalLm
from protos.recipe_tasks import Classification as Classification
from protos.recipe_tasks import Synthetic as Synthetic
from protos.recipe_tasks import Task


class Data(Part):
    """The name under which each site's site.toml describes its own rows."""

    name: Name


class Schedule(Part):
    """The learning rate over rounds: constant, or falling to `final` times its start by the last round.

    The default is above 0, because a last round at learning rate 0 would train nothing.
    """

    type: Literal["constant", "linear", "cosine"] = "constant"
    final: Annotated[float, Field(ge=0, le=1)] = 0.1
    # Constant within a round, or falling with each step as well.
    over: Literal["rounds", "steps"] = "rounds"
    # Round t of R has come t / R of the way, as FlowerTune counts: the first is below the start already.
    one_based: bool = False

    def progress(self, *, round_number: int, rounds: int, part: float) -> float:
        """How far the schedule has come, 0 to 1; `part` of the round is done, 0 to 1."""
        if self.over == "steps":
            return (round_number - 1 + part) / rounds
        if self.one_based:
            return round_number / rounds
        return (round_number - 1) / (rounds - 1) if rounds > 1 else 0.0

    @model_validator(mode="after")
    def _one_way_of_counting(self) -> Schedule:
        if self.one_based and self.over == "steps":
            raise ValueError("one_based counts rounds; with over = 'steps' there is nothing for it to count")
        return self


class Local(Part):
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
    # Activations are computed again on the way back: a third more time for a fraction of the memory.
    gradient_checkpointing: bool = False
    # Whether each round shuffles anew. "same" is what FlowerTune does: few steps a round then see the same rows always.
    data_order: Literal["new", "same"] = "new"
    # Compiles the model before the first step; it pays where rounds are long.
    compile: bool = False
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


class Cohort(Part):
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


class Evaluation(Part):
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
    # Questions with options, where the evaluating agent has a data set of that name.
    benchmarks: tuple[Literal["pubmedqa", "medmcqa", "medqa"], ...] = ()
    # Longest answer that is generated for a question. Default: as long as the longest option.
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] | None = None

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


# Keys that 0.1 does not know, and their defaults. With its default a key is not written: a recipe keeps its hash, to
# which approvals are bound, and an agent of the release before reads it.
LATER_KEYS: tuple[tuple[tuple[str, ...], Any], ...] = (
    (("local", "checkpoint_seconds"), None),
    (("local", "gradient_checkpointing"), False),
    (("local", "data_order"), "new"),
    (("local", "compile"), False),
    (("local", "schedule", "over"), "rounds"),
    (("local", "schedule", "one_based"), False),
    (("base_model", "revision"), None),
    (("base_model", "quantization"), "none"),
    (("base_model", "double_quantization"), False),
    (("base_model", "dtype"), "float32"),
    (("base_model", "attention"), "auto"),
    (("method", "scale"), "alpha/rank"),
    (("method", "ranks"), {}),
    (("aggregation", "svd_energy"), 1.0),
    (("evaluation", "benchmarks"), []),
    (("evaluation", "max_new_tokens"), None),
    (("encoding",), Encoding().model_dump(mode="json")),
)


class JobSpec(Part):
    """A whole recipe. `parse` is the way in."""

    name: Name
    task: Task
    data: Data | None = None
    base_model: BaseModelRef | None = None
    method: Method = Full(type="full")
    local: Local
    cohort: Cohort = Cohort()
    aggregation: Aggregation = Aggregation()
    evaluation: Evaluation = Evaluation()
    encoding: Encoding = Encoding()
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
        if self.evaluation.benchmarks and not isinstance(self.task, CausalLm):
            raise ValueError("benchmarks are questions to a causal-lm; this task has none")
        measured = benchmark_of(self.evaluation.metric)
        if measured and measured not in self.evaluation.benchmarks:
            raise ValueError(f"metric is {self.evaluation.metric}, but benchmarks does not name {measured}")
        self._check_method()
        count = self.cohort.size if self.cohort.size != "all" else None
        if count is None and isinstance(self.cohort.sites, tuple):
            count = len(self.cohort.sites)
        if count and self.aggregation.max_share * count < 1 - 1e-9:
            raise ValueError(f"max_share {self.aggregation.max_share} cannot hold for {count} sites: it must be >= 1/n")
        return self

    def _check_method(self) -> None:
        rule, method, encoding = self.aggregation.rule, self.method, self.encoding
        if self.base_model and self.base_model.quantization != "none" and not isinstance(method, Lora):
            raise ValueError("quantization freezes the base model, so it needs method lora")
        if rule == "mean":
            return
        if not isinstance(method, Lora):
            raise ValueError(f"rule {rule} combines pairs of LoRA factors, so it needs method lora")
        if rule in REBASING_RULES and self.aggregation.server_optimizer.type != "none":
            raise ValueError(f"rule {rule} changes what the factors stand for, so it takes no server_optimizer")
        if rule in REBASING_RULES and {encoding.up, encoding.down} != {"raw"} and encoding.error_feedback:
            raise ValueError(f"rule {rule} changes what the factors stand for, so error_feedback must be false")
        if rule in FOLDING_RULES and encoding.down != "raw":
            raise ValueError(f"rule {rule} lets versions grow, so down must be raw under [encoding]")

    @property
    def canonical_json(self) -> str:
        """The same spec always has the same text: keys sorted, defaults written out, but for LATER_KEYS."""
        fields = self.model_dump(mode="json")
        for (*tables, key), default in LATER_KEYS:
            table: Any = fields
            for name in tables:
                table = table.get(name) or {}
            if key in table and table[key] == default:
                del table[key]
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @property
    def hash(self) -> str:
        return digest_of(self.canonical_json.encode())

    def learning_rate_at(self, round_number: int, *, part: float = 0.0) -> float:
        """The local learning rate in round 1 .. rounds once `part` of the round is done, 0 to 1."""
        schedule = self.local.schedule
        progress = schedule.progress(round_number=round_number, rounds=self.rounds, part=part)
        if schedule.type == "linear":
            scale = 1 - (1 - schedule.final) * progress
        elif schedule.type == "cosine":
            scale = schedule.final + (1 - schedule.final) * 0.5 * (1 + math.cos(math.pi * progress))
        else:
            scale = 1.0
        return self.local.learning_rate * scale

    def rank_at(self, site: str) -> int:
        """The LoRA rank of a site's factors. Only for method lora."""
        assert isinstance(self.method, Lora)
        return self.method.ranks.get(site, self.method.rank)

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
