"""[distillation] of a recipe: what the house agent teaches the aggregate before it becomes a version."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from protos.recipe_methods import BaseModelRef, Lora, Method
from protos.recipe_part import Name, Part
from protos.recipe_rules import Aggregation, Encoding
from protos.recipe_tasks import CausalLm, Task


class Distillation(Part):
    """Mutual distillation of a teacher and the aggregated student on rows of the house agent (FedKD, Wu et al. 2022,
    arXiv:2108.13323, at the server), or without labels from the sites' updates (FedDF, Lin et al. 2020,
    arXiv:2006.07242).

    A round never waits for it longer than `deadline_seconds`, and is committed without it where it does not succeed.
    """

    # Its state stays with the house agent from round to round. Only with labels = true.
    teacher: BaseModelRef | None = None
    # The house agent's data set of this name: its train rows are learnt from. Default: that of [data].
    data: Name | None = None
    # Every n rounds.
    every: Annotated[int, Field(ge=1)] = 1
    # Passes of teacher and student together, after those of the teacher alone.
    epochs: Annotated[float, Field(gt=0, le=1000)] = 1.0
    teacher_epochs: Annotated[float, Field(ge=0, le=1000)] = 1.0
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 32
    learning_rate: Annotated[float, Field(gt=0, le=1000)] = 5e-5
    teacher_learning_rate: Annotated[float, Field(gt=0, le=1000)] = 5e-5
    temperature: Annotated[float, Field(gt=0, le=1000)] = 2.0
    # The student's attention follows the teacher's, layer by layer from the last.
    attention: bool = True
    # The distillation losses are divided by what both models still get wrong, or are just added.
    weighting: Literal["adaptive", "sum"] = "adaptive"
    # false: text without labels, and the mean of the sites' logits is the teacher.
    labels: bool = True
    # A student that is worse than the aggregate on the house agent's validation rows is not taken.
    gate: bool = True
    # The teacher's best state on the validation rows stays.
    keep_best: bool = True
    deadline_seconds: Annotated[float, Field(gt=0)] = 3600

    @model_validator(mode="after")
    def _one_teacher(self) -> Distillation:
        if self.teacher and not self.labels:
            raise ValueError("labels = false learns from the sites' updates, so it takes no teacher")
        if self.teacher and (self.teacher.quantization != "none" or self.teacher.dtype != "float32"):
            raise ValueError("a teacher is trained whole, so it has no quantization and dtype float32")
        return self


# After these any tensor of a version may still change, and a version is nothing but what is trained.
_RULES = ("mean", "svd", "fednova")


def check(
    how: Distillation, *, task: Task, has_base_model: bool, method: Method, aggregation: Aggregation,
    encoding: Encoding,
) -> None:  # fmt: skip
    """ValueError: what the recipe asks for elsewhere does not go with it."""
    if isinstance(task, CausalLm):
        raise ValueError("distillation is for classification; a causal-lm task takes none")
    if how.labels and not how.teacher and has_base_model:
        raise ValueError("distillation with labels needs a teacher")
    if not has_base_model and (how.teacher or how.data):
        raise ValueError("a synthetic task has neither teacher nor data under [distillation]")
    if aggregation.rule not in _RULES:
        raise ValueError(f"rule {aggregation.rule} decides what may change in a version, so it takes no distillation")
    if encoding.down != "raw":
        raise ValueError("what a distillation makes is no rounded difference, so down must be raw under [encoding]")
    if how.labels:
        return
    if aggregation.rule != "mean" or aggregation.robust.type != "none":
        raise ValueError("distillation with labels = false takes the mean of all sites' logits, so it needs rule mean")
    if encoding.up != "raw":
        raise ValueError("distillation with labels = false loads updates as models, so up must be raw under [encoding]")
    if isinstance(method, Lora) and method.ranks:
        raise ValueError("distillation with labels = false loads updates as models, so it takes no ranks of sites")
