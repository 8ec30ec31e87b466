"""The cross entropy over a large vocabulary, whose float32 values are made for some of the rows at a time.

torch's own keeps the float32 log-probabilities for the way back and makes two more tensors of their size there. With
128,000 words that is most of a step's memory. Here the logits stay as the model computed them, with one number for each
row beside them, and their gradient has their type, so what is kept and made is a third (Hsu et al. 2024, Liger Kernel,
arXiv:2410.10989, go further: they never hold all logits, and need the output layer's weights for it).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# 64 MiB in float32.
PART_VALUES = 1 << 24


def cross_entropy_sum(logits: Tensor, classes: Tensor) -> Tensor:
    """The summed loss in float32, of logits [n, classes] in any precision and the right classes [n]."""
    if logits.numel() <= PART_VALUES:
        return nn.functional.cross_entropy(logits.float(), classes, reduction="sum")
    total: Tensor = _InParts.apply(logits, classes)
    return total


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, classes: Tensor) -> Tensor:
        scales = torch.empty(len(logits), device=logits.device)
        right = torch.empty(len(logits), device=logits.device)
        for rows in _parts(logits):
            values = logits[rows].float()
            torch.logsumexp(values, dim=1, out=scales[rows])
            right[rows] = values.gather(1, classes[rows, None]).squeeze(1)
        ctx.save_for_backward(logits, classes, scales)
        return (scales - right).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, classes, scales = ctx.saved_tensors
        result = torch.empty_like(logits)
        for rows in _parts(logits):
            shares = (logits[rows].float() - scales[rows, None]).exp_()
            place = classes[rows, None]
            shares.scatter_(1, place, shares.gather(1, place) - 1)
            torch.mul(shares, gradients[0], out=shares)
            result[rows] = shares
        return result, None


def _parts(logits: Tensor) -> Iterator[slice]:
    rows = max(1, PART_VALUES // logits.shape[1])
    for start in range(0, len(logits), rows):
        yield slice(start, start + rows)
