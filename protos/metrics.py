"""The numbers that may leave a site, besides tensors: a closed list, so that nothing else can be smuggled or slip out.

A name outside these lists is refused by the coordinator and never sent by the agent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from protos.errors import InvalidInput

# Results and progress of training and evaluation. Higher is better, unless the name is in LOWER_IS_BETTER.
METRICS = frozenset(
    {
        "loss",
        "accuracy",
        "macro_f1",
        "matthews_correlation",
        "perplexity",
        "learning_rate",
        "steps_per_second",
        "tokens_per_second",
        "update_norm",
        "gpu_memory_bytes",
        "skipped_rows",
    }
)
LOWER_IS_BETTER = frozenset({"loss", "perplexity"})

# Where a task's time went at the site, in seconds.
STAGE_SECONDS = frozenset({"fetch", "load", "first_step", "train", "evaluate", "save", "upload"})


def check_numbers(numbers: Mapping[str, float], *, allowed: frozenset[str]) -> dict[str, float]:
    """The same numbers; InvalidInput names the first that is not on the list or not finite."""
    for name, value in numbers.items():
        if name not in allowed:
            raise InvalidInput(f"{name[:40]!r} is not a number that a site may report.")
        if not math.isfinite(value):
            raise InvalidInput(f"The reported {name} is not a finite number.")
    return dict(numbers)
