"""The same training without a federation, for comparison: one site alone, or the rows of all sites pooled."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from client_agent.training.data import Instructions, Rows
from client_agent.training.evaluate import evaluate
from client_agent.training.kinds import kind_of
from client_agent.training.loading import hold_body
from client_agent.training.model import build
from client_agent.training.tasks import choose_device
from client_agent.training.train import prepare
from client_agent.training.train import train as train_model
from protos import jobspec
from protos.errors import InvalidInput


def train_alone(
    spec: jobspec.JobSpec,
    *,
    base_model_path: Path,
    base_digest: str,
    train: Rows | Instructions,
    test: Rows | Instructions,
    steps: int,
    seed: int,
    threads: int,
    on_progress: Callable[[int, int], None],
    device: str = "cpu",
) -> dict[str, float]:
    """Metrics on `test` after `steps` steps on `train` from the job's version 0, with one optimizer.

    The learning rate follows the schedule as if the steps were spread evenly over the job's rounds, and in those of a
    warm head the head alone is trained, with an optimizer of its own. `proximal` has no part: there are no other sites
    to keep near to. Nor has a mentor.
    Rows are those of `read_rows` with the recipe's labels, or of `read_instructions`.
    `on_progress(done, total)` counts steps.
    """
    if spec.base_model and spec.base_model.digest not in (None, base_digest):
        raise InvalidInput(f"The base model at hand is not the {spec.base_model.name!r} that the recipe pins.")
    task = kind_of(spec)
    chosen = choose_device(device)
    prepare(device=chosen, threads=threads)
    model = build(spec, task=task, base_model_path=base_model_path, device=chosen)
    tokens = task.encode(train, tokenizer=model.tokenizer, on_rows=_nothing)

    def train_part(first: int, last: int) -> None:
        train_model(
            model,
            tokens=tokens,
            task=task,
            local=spec.local.model_copy(update={"proximal": 0.0}),
            steps=last - first,
            learning_rate_at=lambda step: spec.learning_rate_at(
                1 + (first + step) * spec.rounds // steps, part=(first + step) * spec.rounds % steps / steps
            ),
            seed=seed + first,
            on_step=lambda done, total, metrics: on_progress(first + done, steps),
        )

    warm = spec.local.warm_head
    # As many as `learning_rate_at` takes to be in a round of the warm head.
    head_steps = min(steps, math.ceil(warm.rounds * steps / spec.rounds)) if warm else 0
    if head_steps:
        hold_body(model, held=True)
        train_part(0, head_steps)
        hold_body(model, held=False)
    if head_steps < steps:
        train_part(head_steps, steps)
    test_tokens = task.encode(test, tokenizer=model.tokenizer, on_rows=_nothing)
    return evaluate(model, tokens=test_tokens, task=task, local=spec.local, on_rows=_nothing)


def _nothing(done: int, total: int) -> None:
    pass
