"""What stays in memory between tasks because it is costly: the base model with its tokenizer, and tokenised rows.

One model only, that which is trained: a distillation's teacher comes beside it, and goes with its task. A site's mentor
stays as long as its mentee.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from client_agent.training.kinds import Encoded
from client_agent.training.mentor import Mentor
from client_agent.training.model import Model

KEPT_MODELS = 1  # a second one would not fit on many a GPU
KEPT_SPLITS = 3  # train, validation and test of one data set, however large
KEPT_SPLITS_BYTES = 256 << 20  # more of them while they are small: a lab's trainer serves all its sites

Kept = TypeVar("Kept")


@dataclass
class Warm:
    """What stays in memory between tasks."""

    models: OrderedDict[Hashable, Model] = field(default_factory=OrderedDict)
    splits: OrderedDict[Hashable, Encoded] = field(default_factory=OrderedDict)
    mentors: OrderedDict[Hashable, Mentor] = field(default_factory=OrderedDict)
    # How long it last took to load a model and rows afresh, from the task's arrival until it could begin.
    fresh_seconds: float = 0.0

    def has_enough_splits(self) -> bool:
        size_bytes = sum(part.nbytes for tokens in self.splits.values() for part in tokens.content)
        return len(self.splits) >= KEPT_SPLITS and size_bytes >= KEPT_SPLITS_BYTES

    def clear(self) -> None:
        self.models.clear()
        self.splits.clear()
        self.mentors.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def kept(
    store: OrderedDict[Hashable, Kept], key: Hashable, *, is_full: Callable[[], bool], make: Callable[[], Kept]
) -> Kept:
    """What `store` keeps under `key`; made when missing, after the least recently used have gone."""
    if key in store:
        store.move_to_end(key)
    else:
        while is_full():
            store.popitem(last=False)
        store[key] = make()
    return store[key]
