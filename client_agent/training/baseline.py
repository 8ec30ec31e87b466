"""The same training without a federation, for comparison: one site alone, or the rows of all sites pooled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from client_agent.training.data import Instructions, Rows
from client_agent.training.evaluate import evaluate
from client_agent.training.kinds import kind_of
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

    The learning rate follows the schedule as if the steps were spread evenly over the job's rounds.
    Rows are those of `read_rows` with the recipe's labels, or of `read_instructions`.
    `on_progress(done, total)` counts steps.
    """
    if spec.base_model and spec.base_model.digest not in (None, base_digest):
        raise InvalidInput(f"The base model at hand is not the {spec.base_model.name!r} that the recipe pins.")
    task = kind_of(spec)
    chosen = choose_device(device)
    prepare(device=chosen, threads=threads)
    model = build(spec, task=task, base_model_path=base_model_path, device=chosen)
    train_model(
        model,
        tokens=task.encode(train, tokenizer=model.tokenizer, on_rows=_nothing),
        task=task,
        local=spec.local,
        steps=steps,
        learning_rate_at=lambda step: spec.learning_rate_at(
            1 + step * spec.rounds // steps, part=step * spec.rounds % steps / steps
        ),
        seed=seed,
        on_step=lambda done, total, metrics: on_progress(done, total),
    )
    test_tokens = task.encode(test, tokenizer=model.tokenizer, on_rows=_nothing)
    return evaluate(model, tokens=test_tokens, task=task, local=spec.local, on_rows=_nothing)


def _nothing(done: int, total: int) -> None:
    pass
