"""[task] of a recipe: what is learnt, and what an evaluation of it measures."""

from __future__ import annotations

import string
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from protos.metrics import BENCHMARK_METRICS
from protos.recipe_part import Part


class Classification(Part):
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


class PromptTemplate(Part):
    """A prompt as data: {instruction} and {input} stand for a row's fields, and nothing else is ever filled in."""

    prompt: str
    # For rows whose input is empty; default: `prompt` with nothing in place of {input}.
    prompt_without_input: str | None = None

    @model_validator(mode="after")
    def _only_known_fields(self) -> PromptTemplate:
        for text in (self.prompt, self.prompt_without_input):
            if text is None:
                continue
            parts = list(string.Formatter().parse(text))
            fields = [name for _, name, _, _ in parts if name is not None]
            if any(form or conversion for _, _, form, conversion in parts):
                raise ValueError("a template's fields are written plainly: {instruction}, {input}")
            if unknown := set(fields) - {"instruction", "input"}:
                raise ValueError(f"a template knows {{instruction}} and {{input}}, not {{{min(unknown)}}}")
            if "instruction" not in fields:
                raise ValueError("a template needs {instruction}")
        return self


class CausalLm(Part):
    """Instruction tuning with a decoder: the loss is on the completion alone."""

    measures: ClassVar[tuple[str, ...]] = ("loss", "perplexity", *sorted(BENCHMARK_METRICS))

    type: Literal["causal-lm"]
    # Tokens of prompt and completion together; a longer row is cut.
    max_length: Annotated[int, Field(ge=8, le=1 << 20)] = 512
    # "alpaca" as the FlowerTune study writes it, "chat" as the tokenizer does, or the recipe's own.
    template: Literal["alpaca", "chat"] | PromptTemplate = "alpaca"
    # Several rows in one sequence; none of them sees another.
    packing: bool = False


class Synthetic(Part):
    """No model: the trainer returns the received tensors plus small deterministic noise. For tests and benchmarks."""

    measures: ClassVar[tuple[str, ...]] = ("accuracy", "loss")

    type: Literal["synthetic"]
    payload_mb: Annotated[float, Field(gt=0, le=100_000)] = 1.0
    train_seconds: Annotated[float, Field(ge=0, le=86_400)] = 0.0
    noise: Annotated[float, Field(ge=0, le=1)] = 1e-3


Task = Annotated[Classification | CausalLm | Synthetic, Field(discriminator="type")]
