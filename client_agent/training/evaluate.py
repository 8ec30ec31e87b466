"""Measuring a version on rows that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable

import torch

from client_agent.training.classification import TextClassification, Tokens
from client_agent.training.model import Model
from client_agent.training.train import autocast, out_of_memory
from protos.jobspec import Local

BATCH_ROWS = 64


def evaluate(
    model: Model, *, tokens: Tokens, task: TextClassification, local: Local, on_rows: Callable[[int, int], None]
) -> dict[str, float]:
    """The task's metrics over all rows. `on_rows(done, total)` is called before each batch and at the end.

    OutOfSpace when not even one row fits into the device's memory.
    """
    model.network.eval()
    scores = task.new_scores()
    # By length, so that little is padded; the metrics do not depend on the order.
    waiting = list(tokens.lengths.argsort(stable=True, descending=True).split(BATCH_ROWS))
    done = 0
    while waiting:
        on_rows(done, len(tokens))
        rows = waiting.pop(0)
        try:
            with torch.no_grad(), autocast(local, device=model.device):
                inputs, labels = tokens.batch(rows, device=model.device)
                logits = model.network(**inputs).logits
                scores.add(logits, labels, loss_sum=float(task.loss_sum(logits, labels)))
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise out_of_memory(1) from None
            waiting[:0] = rows.split(len(rows) // 2)
            continue
        done += len(rows)
    on_rows(done, len(tokens))
    return scores.metrics()
