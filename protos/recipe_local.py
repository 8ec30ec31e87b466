"""[local] of a recipe: training at a site within one round."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from protos.recipe_methods import BaseModelRef
from protos.recipe_part import Part


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


class Mentor(Part):
    """FedKD (Wu et al. 2022, arXiv:2108.13323): each site trains a model of its own beside the one that is federated,
    on the same batches, and both learn from one another too. It never leaves the site."""

    # All of it is trained; its embeddings are frozen with method lora, and where method full freezes them.
    base_model: BaseModelRef
    # Default: that of [local], whose schedule it follows.
    learning_rate: Annotated[float, Field(gt=0, le=1000)] | None = None
    # What of both models is drawn together besides their answers, layer by layer from the last.
    attention: bool = True
    hidden: bool = True
    temperature: Annotated[float, Field(gt=0, le=1000)] = 1.0

    @model_validator(mode="after")
    def _is_trained(self) -> Mentor:
        if self.base_model.quantization != "none" or self.base_model.dtype != "float32":
            raise ValueError("a mentor is trained whole, so its base_model has no quantization and dtype float32")
        return self


class WarmHead(Part):
    """In the first rounds the head alone is trained, so that what was pre-trained is not changed for the sake of random
    weights (linear probing before fine-tuning: Kumar et al. 2022, arXiv:2202.10054)."""

    rounds: Annotated[int, Field(ge=1)] = 1
    # Of these rounds, whatever the schedule.
    learning_rate: Annotated[float, Field(gt=0, le=1000)]


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
    # FedProx (Li et al. 2020, arXiv:1812.06127): proximal (x - x_t) is added to each gradient, where x_t is the version
    # that the round began with. The losses that are reported are without it.
    proximal: Annotated[float, Field(ge=0)] = 0.0
    # Compiles the model before the first step; it pays where rounds are long.
    compile: bool = False
    schedule: Schedule = Schedule()
    mentor: Mentor | None = None
    warm_head: WarmHead | None = None

    @model_validator(mode="after")
    def _agree(self) -> Local:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError("momentum goes with optimizer = 'sgd'; adamw has its own")
        if self.micro_batch_size and self.micro_batch_size > self.batch_size:
            raise ValueError("micro_batch_size is larger than batch_size")
        self._check_mentor()
        return self

    def _check_mentor(self) -> None:
        if self.mentor is None:
            return
        # What divides the losses is of a whole batch, and a checkpoint is of one model.
        alone = ("checkpoint_seconds", "micro_batch_size", "gradient_checkpointing", "compile", "proximal", "warm_head")
        for key in alone:
            if getattr(self, key):
                raise ValueError(f"a mentor and the model train side by side, a whole batch at a time: no {key}")

    def step_count(self, rows: int) -> int:
        """Optimizer steps in one round; a last batch may be short."""
        return self.steps or max(1, math.ceil((self.epochs or 0) * math.ceil(rows / self.batch_size)))
