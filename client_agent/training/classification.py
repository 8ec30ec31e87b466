"""Text classification: everything of the trainer that depends on the task, in one place.

The tasks beside it are in causal.py; what they have in common is in kinds.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedTokenizerBase

from client_agent.settings import DataSet
from client_agent.training.data import Rows, read_rows, read_texts
from client_agent.training.tables import Split
from protos import jobspec

ENCODED_ROWS = 512


@dataclass(frozen=True)
class Tokens:
    """Tokenised rows in three flat tensors: a list of lists would take ten times the memory."""

    ids: Tensor  # int32 [tokens of all rows]
    starts: Tensor  # int64 [rows + 1], into ids
    labels: Tensor  # int64 [rows]
    pad_id: int
    skipped: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def examples(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Tensor:
        return self.starts.diff()

    @property
    def content(self) -> tuple[Tensor, ...]:
        return (self.ids, self.starts, self.labels)

    def target_count(self, rows: Tensor) -> int:
        return len(rows)

    def batch(self, rows: Tensor, *, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        """The model's inputs [len(rows), longest of them] and the labels [len(rows)], padded on the right."""
        starts, lengths = self.starts[rows], self.lengths[rows]
        columns = torch.arange(int(lengths.max()))
        mask = columns < lengths[:, None]
        ids = self.ids[(starts[:, None] + columns).clamp(max=len(self.ids) - 1)].long().where(mask, self.pad_id)
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}
        return inputs, self.labels[rows].to(device)


@dataclass
class Scores:
    """Counts what is needed for all metrics of a classifier, batch by batch."""

    confusion: Tensor  # int64 [true label, predicted label]
    loss_sum: float = 0.0
    _examples: int = field(default=0, init=False)

    def add(self, logits: Tensor, labels: Tensor, *, loss_sum: float) -> None:
        classes = len(self.confusion)
        pairs = labels.cpu() * classes + logits.argmax(dim=-1).cpu()
        self.confusion += torch.bincount(pairs, minlength=classes * classes).view(classes, classes)
        self.loss_sum += loss_sum
        self._examples += len(labels)

    def metrics(self) -> dict[str, float]:
        """loss, accuracy, macro_f1 (over the labels that occur as truth or prediction, as scikit-learn averages) and
        matthews_correlation (its form for several classes, Gorodkin 2004; 0 where it is not defined)."""
        counts = self.confusion.double()
        total, correct = counts.sum(), counts.diag().sum()
        true, predicted = counts.sum(dim=1), counts.sum(dim=0)
        occurs = true + predicted > 0
        f1 = 2 * counts.diag()[occurs] / (true + predicted)[occurs]
        spread = (total**2 - (predicted**2).sum()) * (total**2 - (true**2).sum())
        covariance = correct * total - (true * predicted).sum()
        return {
            "loss": self.loss_sum / self._examples,
            "accuracy": float(correct / total),
            "macro_f1": float(f1.mean()),
            "matthews_correlation": float(covariance / spread.sqrt()) if spread > 0 else 0.0,
        }


@dataclass(frozen=True)
class TextClassification:
    """One text, one of the ordered labels of the recipe."""

    labels: tuple[str, ...]
    max_length: int

    # What transformers and PEFT call it.
    model_class: ClassVar[Any] = AutoModelForSequenceClassification
    peft_type: ClassVar[str] = "SEQ_CLS"
    evaluation_rows: ClassVar[int] = 64
    # The heads of transformers' architectures, and what stands before them and may begin anew too.
    never_quantized: ClassVar[tuple[str, ...]] = ("classifier", "score", "pooler", "pre_classifier")

    @classmethod
    def of(cls, task: jobspec.Classification) -> TextClassification:
        return cls(labels=task.labels, max_length=task.max_length)

    def configure(self, config: PreTrainedConfig) -> None:
        config.id2label = dict(enumerate(self.labels))
        config.label2id = {label: number for number, label in enumerate(self.labels)}
        config.problem_type = None

    def check(self, network: Any, *, missing: Collection[str], name: str) -> None:
        """A head is always missing, and begins anew."""

    def read(self, data_set: DataSet, *, name: str, split: Split) -> Rows:
        return read_rows(data_set, name=name, labels=self.labels, split=split)

    def read_texts(self, data_set: DataSet, *, name: str, split: Split) -> Rows:
        """Without a look at labels."""
        return read_texts(data_set, name=name, labels=self.labels, split=split)

    def encode(self, rows: Rows, *, tokenizer: PreTrainedTokenizerBase, on_rows: Callable[[int, int], None]) -> Tokens:
        """The rows as tokens, cut to max_length. `on_rows(done, total)` is called before each part; it may raise."""
        assert rows.label_names == self.labels, "rows were read with other labels"
        parts: list[Tensor] = []
        lengths: list[int] = []
        for start in range(0, len(rows), ENCODED_ROWS):
            on_rows(start, len(rows))
            encoded = tokenizer(
                rows.texts[start : start + ENCODED_ROWS],
                truncation=True, max_length=self.max_length, padding=False,
                return_attention_mask=False, return_token_type_ids=False,
            )["input_ids"]  # fmt: skip
            parts.append(torch.tensor([token for ids in encoded for token in ids], dtype=torch.int32))
            lengths += [len(ids) for ids in encoded]
        starts = torch.tensor([0, *lengths]).cumsum(dim=0)
        labels = torch.tensor(rows.labels)
        return Tokens(torch.cat(parts), starts, labels, tokenizer.pad_token_id or 0, rows.skipped)

    def predict(self, network: Any, inputs: dict[str, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        with mixed_precision(network, device=targets.device):
            return network(**inputs).logits, targets

    def new_scores(self) -> Scores:
        classes = len(self.labels)
        return Scores(torch.zeros(classes, classes, dtype=torch.int64))


def mixed_precision(network: Any, *, device: torch.device) -> torch.autocast:
    """bfloat16 where the recipe or the frozen layers want it: a new head is float32 whatever is below it."""
    enabled = torch.is_autocast_enabled(device.type) or network.dtype == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
