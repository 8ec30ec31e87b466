"""What a task is to the model, the loop and the evaluation, which do not know which one it is.

A task reads its rows, turns them into tensors, and says which of the model's outputs stand against which targets. All
the rest is common: the loss is the cross entropy of these, and its mean is over the targets of a whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from client_agent.settings import DataSet
from client_agent.training.causal import CausalLanguageModel
from client_agent.training.classification import TextClassification
from client_agent.training.cross_entropy import cross_entropy_sum
from client_agent.training.tables import Split
from protos import jobspec
from protos.errors import InvalidInput


class Encoded(Protocol):
    """Rows as tensors. What is counted and shuffled is what `len` counts."""

    @property
    def skipped(self) -> int: ...

    @property
    def examples(self) -> int:
        """Rows of the site that it holds."""
        ...

    @property
    def lengths(self) -> Tensor:
        """Tokens of each, int64 [len]"""
        ...

    @property
    def content(self) -> tuple[Tensor, ...]:
        """Equal where the rows are: what a checkpoint is bound to."""
        ...

    def __len__(self) -> int: ...

    def target_count(self, rows: Tensor) -> int:
        """What the mean loss of these is over."""
        ...

    def batch(self, rows: Tensor, *, device: Any) -> tuple[dict[str, Tensor], Tensor]:
        """The model's inputs, and the targets as the task's `predict` takes them."""
        ...


class Scores(Protocol):
    def add(self, logits: Tensor, targets: Tensor, *, loss_sum: float) -> None: ...

    def metrics(self) -> dict[str, float]: ...


class Kind(Protocol):
    """A task of the recipe."""

    # What transformers and PEFT call it, how many rows are looked at together without gradients, and the modules that
    # keep their precision where the base model is quantised.
    @property
    def model_class(self) -> Any: ...
    @property
    def peft_type(self) -> str: ...
    @property
    def evaluation_rows(self) -> int: ...
    @property
    def never_quantized(self) -> tuple[str, ...]: ...
    @property
    def max_length(self) -> int: ...

    def configure(self, config: PreTrainedConfig) -> None:
        """Before the model is made. InvalidInput: it cannot do the task."""

    def check(self, network: Any, *, missing: Collection[str], name: str) -> None:
        """When it is loaded; `missing` are weights that the base model lacks. InvalidInput: it cannot do the task."""

    def read(self, data_set: DataSet, *, name: str, split: Split) -> Any: ...

    def encode(
        self, rows: Any, *, tokenizer: PreTrainedTokenizerBase, on_rows: Callable[[int, int], None]
    ) -> Encoded: ...

    def predict(self, network: Any, inputs: dict[str, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [n, classes] and the right classes [n]."""
        ...

    def new_scores(self) -> Scores: ...


def kind_of(spec: jobspec.JobSpec) -> Kind:
    """The recipe's task. InvalidInput: there is no training for it."""
    match spec.task:
        case jobspec.Classification():
            return TextClassification.of(spec.task)
        case jobspec.CausalLm():
            return CausalLanguageModel(spec.task)
    raise InvalidInput(f"This trainer does not know the task {spec.task.type!r}.")


def loss_sum(logits: Tensor, classes: Tensor) -> Tensor:
    """The summed loss, in float32 whatever the model computes in."""
    return cross_entropy_sum(logits, classes)
