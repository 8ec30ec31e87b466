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
from protos.recipe_distillation import Distillation as Distillation
from protos.recipe_distillation import check as check_distillation
from protos.recipe_errors import explain
from protos.recipe_local import Local as Local
from protos.recipe_local import Mentor as Mentor
from protos.recipe_local import Schedule as Schedule
from protos.recipe_local import WarmHead as WarmHead
from protos.recipe_methods import BaseModelRef as BaseModelRef
from protos.recipe_methods import Full as Full
from protos.recipe_methods import Lora as Lora
from protos.recipe_methods import Method
from protos.recipe_part import Name, Part, SiteName
from protos.recipe_robust import check as check_robust
from protos.recipe_rules import DRIFT_RULES as DRIFT_RULES
from protos.recipe_rules import FOLDING_RULES, LORA_RULES, REBASING_RULES
from protos.recipe_rules import Aggregation as Aggregation
from protos.recipe_rules import Encoding as Encoding
from protos.recipe_rules import FedAdam as FedAdam
from protos.recipe_rules import FedAvgM as FedAvgM
from protos.recipe_rules import FedYogi as FedYogi
from protos.recipe_rules import Nesterov as Nesterov
from protos.recipe_rules import NoServerOptimizer as NoServerOptimizer
from protos.recipe_rules import ServerOptimizer as ServerOptimizer
from protos.recipe_tasks import CausalLm as CausalLm
from protos.recipe_tasks import Classification as Classification
from protos.recipe_tasks import Synthetic as Synthetic
from protos.recipe_tasks import Task


class Data(Part):
    """The name under which each site's site.toml describes its own rows."""

    name: Name


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
    (("local", "mentor"), None),
    (("local", "proximal"), 0.0),
    (("local", "warm_head"), None),
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
    (("aggregation", "robust"), {"type": "none"}),
    (("aggregation", "report"), False),
    (("evaluation", "benchmarks"), []),
    (("evaluation", "max_new_tokens"), None),
    (("encoding",), Encoding().model_dump(mode="json")),
    (("encoding", "svd_energy_start"), 0.95),
    (("encoding", "svd_energy_end"), 0.98),
    (("distillation",), None),
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
    distillation: Distillation | None = None
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
        if self.local.mentor and not isinstance(self.task, Classification):
            raise ValueError("a mentor is for classification; this task takes none")
        if self.distillation is not None:
            check_distillation(
                self.distillation, task=self.task, has_base_model=self.base_model is not None, method=self.method,
                aggregation=self.aggregation, encoding=self.encoding,
            )  # fmt: skip
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
        if self.local.warm_head and not (isinstance(self.task, Classification) and isinstance(method, Full)):
            raise ValueError("warm_head trains a classifier's new head alone at first, so it needs method full")
        if self.local.warm_head and self.distillation:
            raise ValueError("a distillation trains all of the model in every round, so it takes no warm_head")
        mixed = isinstance(method, Lora) and any(rank != method.rank for rank in method.ranks.values())
        how = self.aggregation
        check_robust(how.robust, report=how.report, rule=rule, mixed_ranks=mixed, quorum=self.cohort.quorum)
        if rule in DRIFT_RULES:
            self._check_drift_rule()
        if rule not in LORA_RULES:
            return
        if not isinstance(method, Lora):
            raise ValueError(f"rule {rule} combines pairs of LoRA factors, so it needs method lora")
        if rule in REBASING_RULES and self.aggregation.server_optimizer.type != "none":
            raise ValueError(f"rule {rule} changes what the factors stand for, so it takes no server_optimizer")
        if rule in REBASING_RULES and {encoding.up, encoding.down} != {"raw"} and encoding.error_feedback:
            raise ValueError(f"rule {rule} changes what the factors stand for, so error_feedback must be false")
        if rule in FOLDING_RULES and encoding.down != "raw":
            raise ValueError(f"rule {rule} lets versions grow, so down must be raw under [encoding]")

    def _check_drift_rule(self) -> None:
        rule, local, encoding = self.aggregation.rule, self.local, self.encoding
        if isinstance(self.method, Lora) and self.method.ranks:
            raise ValueError(f"rule {rule} combines factors of one shape, so it takes no ranks")
        if local.proximal:
            raise ValueError(f"rule {rule} says itself how sites stay together, so proximal must be 0")
        if rule == "fednova":
            return
        if isinstance(self.task, Synthetic):
            raise ValueError("rule scaffold corrects gradients, and a synthetic task has none")
        if local.optimizer != "sgd" or local.momentum:
            raise ValueError("rule scaffold corrects plain steps, so it needs optimizer = 'sgd' and momentum = 0")
        if local.mentor:
            raise ValueError("rule scaffold corrects gradients of one model, so it takes no mentor")
        if local.max_gradient_norm:
            raise ValueError("rule scaffold reads gradients from what was trained, so it takes no max_gradient_norm")
        if local.schedule.type != "constant" and (local.schedule.over == "steps" or not local.schedule.final):
            raise ValueError("rule scaffold needs one rate above 0 in each round: a schedule over rounds, final > 0")
        if {encoding.up, encoding.down} != {"raw"}:
            raise ValueError("rule scaffold needs up = raw and down = raw under [encoding]")
        if self.cohort.size != "all" and self.aggregation.weights != "equal":
            raise ValueError("rule scaffold with a part of the sites in each round needs weights = 'equal'")

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
        schedule, warm = self.local.schedule, self.local.warm_head
        if warm and round_number <= warm.rounds:
            return warm.learning_rate
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

    @property
    def proxy_data(self) -> str:
        """The house agent's data set that a distillation learns from; empty without one, and for a synthetic task."""
        named = self.distillation and (self.distillation.data or (self.data and self.data.name))
        return named or ""

    def beside(self, kind: str) -> BaseModelRef | None:
        """The base model that a task of this kind trains beside the job's own: a distillation's teacher, a mentor."""
        if kind == "distill":
            return self.distillation.teacher if self.distillation else None
        return self.local.mentor.base_model if kind == "train" and self.local.mentor else None

    def is_distilled(self, round_number: int) -> bool:
        """Whether the aggregate of round 1 .. rounds goes to the house agent before it is committed."""
        return self.distillation is not None and round_number > 0 and round_number % self.distillation.every == 0

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
