"""The cross entropy over a large vocabulary, whose float32 values are made for some of the rows at a time.

torch's own keeps the float32 log-probabilities for the way back and makes two more tensors of their size there. With
128,000 words that is most of a step's memory. Here the gradient is made with the loss and takes the logits' precision,
so that beside the logits only one tensor of their size is ever there (Hsu et al. 2024, Liger Kernel, arXiv:2410.10989,
go further: they never hold all logits, and need the output layer's weights for it).
"""

from __future__ import annotations

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
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), device=logits.device)
        count = max(1, PART_VALUES // logits.shape[1])
        for start in range(0, len(logits), count):
            rows = slice(start, start + count)
            logs, right = logits[rows].log_softmax(dim=1, dtype=torch.float32), classes[rows, None]
            found = logs.gather(1, right)
            total -= found.sum()
            if gradient is not None:
                gradient[rows] = logs.exp_().scatter_(1, right, found.exp() - 1)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # In place: torch refuses to use it a second time.
        return ctx.saved_tensors[0].mul_(gradients[0]), None
