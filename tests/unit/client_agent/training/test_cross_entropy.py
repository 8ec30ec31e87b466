"""A wide vocabulary in parts: the loss and the gradients of torch's own, and what is kept for the way back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from client_agent.training import cross_entropy as parts_module
from client_agent.training.cross_entropy import cross_entropy_sum

ROWS, CLASSES = 50, 300


def found(logits: Tensor, classes: Tensor, *, ours: bool) -> tuple[Tensor, Tensor]:
    """The loss and its gradient."""
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy_sum(leaf, classes) if ours else cross_entropy(leaf.float(), classes, reduction="sum")
    (loss / 7).backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.fixture
def logits(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    # Seven rows at a time, and one at the end.
    monkeypatch.setattr(parts_module, "PART_VALUES", 7 * CLASSES + 5)
    return torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(0)) * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_parts_the_loss_and_its_gradient_are_the_same(logits: Tensor, dtype: torch.dtype) -> None:
    classes = torch.randint(CLASSES, (ROWS,), generator=torch.Generator().manual_seed(1))
    loss, gradient = found(logits.to(dtype), classes, ours=True)
    whole, right = found(logits.to(dtype), classes, ours=False)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
    # bfloat16 is rounded to before and after the gradient of the sum is multiplied in.
    torch.testing.assert_close(gradient, right, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-7)
    with torch.no_grad():
        assert torch.equal(cross_entropy_sum(logits.to(dtype), classes), loss)


def test_one_tensor_as_large_as_the_logits_and_as_precise_is_kept(logits: Tensor) -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    half = logits.bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        cross_entropy_sum(half, torch.zeros(ROWS, dtype=torch.int64))
    assert [tensor.dtype for tensor in kept if tensor.numel() >= logits.numel()] == [torch.bfloat16]


def test_what_is_no_larger_than_a_part_is_torchs_own(logits: Tensor) -> None:
    few, classes = logits[:7], torch.arange(7)
    for ours, right in zip(found(few, classes, ours=True), found(few, classes, ours=False), strict=True):
        assert torch.equal(ours, right)
