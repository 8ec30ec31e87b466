"""The numbers that may leave a site, besides tensors: a closed list, so that nothing else can be smuggled or slip out.

A name outside these lists is refused by the coordinator and never sent by the agent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from protos.errors import InvalidInput

# Question sets with options; each is measured by what the model writes and by which option it finds most likely.
BENCHMARKS = ("pubmedqa", "medmcqa", "medqa")
# questions: how many; unparseable: the part whose answer is none of the options; parseable_accuracy: of the rest;
# exact_format: the part whose answer is an option and nothing else; option_accuracy: by the options' likelihood;
# gained, lost: right now and wrong in version 0, and the other way round.
BENCHMARK_MEASURES = (
    "accuracy", "unparseable", "parseable_accuracy", "exact_format", "option_accuracy", "questions", "gained", "lost",
)  # fmt: skip
BENCHMARK_METRICS = frozenset(f"{name}_{measure}" for name in BENCHMARKS for measure in BENCHMARK_MEASURES)

# Of a distillation. On the house agent's validation rows: the aggregate, the student that learnt from it, and the
# teacher (without labels: the mean of the sites' logits), before the round and as it is kept. slice: on the rows that
# they learn from, where a teacher that learns them by heart falls while its loss on the validation rows rises.
# kept: 1 where the student became the version, 0 where it was worse than the aggregate.
DISTILLATION_LOSSES = frozenset(
    {
        "aggregate_loss",
        "student_loss",
        "teacher_loss",
        "teacher_loss_before",
        "teacher_slice_loss",
        "teacher_slice_loss_before",
        "distillation_loss",
    }
)
DISTILLATION_METRICS = DISTILLATION_LOSSES | {
    "aggregate_accuracy",
    "student_accuracy",
    "teacher_accuracy",
    "distillation_kept",
}

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
        # A private mentor, which stays at the site: the mean training loss, and on the site's validation rows.
        "mentor_loss",
        "mentor_accuracy",
        *DISTILLATION_METRICS,
        *BENCHMARK_METRICS,
    }
)
LOWER_IS_BETTER = frozenset(
    {"loss", "perplexity", "mentor_loss", *DISTILLATION_LOSSES, *(f"{name}_unparseable" for name in BENCHMARKS)}
)

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


def benchmark_of(metric: str) -> str:
    """The benchmark that a metric belongs to; empty when it belongs to none."""
    return metric.partition("_")[0] if metric in BENCHMARK_METRICS else ""
