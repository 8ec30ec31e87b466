"""Measuring a version on rows that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from client_agent.training.kinds import Encoded, Kind, loss_sum
from client_agent.training.model import Model
from client_agent.training.train import autocast, cannot_be_compiled, out_of_memory
from protos.jobspec import Local


class Predicted(NamedTuple):
    rows: Tensor  # int64 [rows], into the tokens
    logits: Tensor  # [n, classes]
    targets: Tensor  # the right classes [n]
    loss_sum: float


def evaluate(
    model: Model,
    *,
    tokens: Encoded,
    task: Kind,
    local: Local,
    on_rows: Callable[[int, int], None],
    on_predicted: Callable[[Predicted], None] | None = None,
) -> dict[str, float]:
    """The task's metrics over all rows. Errors and `on_rows` as `predictions`; `on_predicted` sees each batch."""
    scores = task.new_scores()
    for seen in predictions(model, tokens=tokens, task=task, local=local, on_rows=on_rows):
        scores.add(seen.logits, seen.targets, loss_sum=seen.loss_sum)
        if on_predicted is not None:
            on_predicted(seen)
    return scores.metrics()


def predictions(
    model: Model, *, tokens: Encoded, task: Kind, local: Local, on_rows: Callable[[int, int], None]
) -> Iterator[Predicted]:
    """Batch by batch, until every row was there once.

    `on_rows(done, total)` is called before each batch and at the end. OutOfSpace when not even one row fits into the
    device's memory; InvalidInput when the model is to be compiled and cannot be.
    """
    model.network.eval()
    # By length, so that little is padded; the metrics do not depend on the order.
    waiting = list(tokens.lengths.argsort(stable=True, descending=True).split(task.evaluation_rows))
    done = 0
    while waiting:
        on_rows(done, len(tokens))
        rows = waiting.pop(0)
        try:
            with torch.no_grad(), autocast(local, device=model.device):
                logits, targets = task.predict(model.network, *tokens.batch(rows, device=model.device))
                loss = float(loss_sum(logits, targets))
        except torch.OutOfMemoryError:
            # Of several processes only this one would cut its rows.
            if len(rows) == 1 or model.group.size > 1:
                raise out_of_memory(len(rows)) from None
            waiting[:0] = rows.split(len(rows) // 2)
            continue
        except TorchDynamoException as error:
            raise cannot_be_compiled(error) from error
        yield Predicted(rows, logits, targets, loss)
        done += len(rows)
    on_rows(done, len(tokens))
