"""The bench of the GPU in its tiny form, so that it is not first tried out on rented hours."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.bench_llm import LINES, Work, make_rows, measure, table
from tests.gpu.random_llama import TINY


def test_the_bench_puts_silotune_and_trainer_side_by_side() -> None:
    work = Work(TINY, torch.device("cpu"), make_rows(vocabulary=TINY.vocabulary, length=32, count=32), steps=1)
    lines = [line for line in LINES if line[2] == "nf4" and line[0] in ("silotune", "Trainer")]
    results = [measure(line, work) for line in lines]
    for result in results:
        assert result.tokens_per_second > 0 and not result.note
        # The same random model before it has learnt anything, on other rows of the same kind.
        assert result.first_loss == pytest.approx(results[0].first_loss, abs=0.05)
    assert table(results).count("\n") == 1 + len(lines)
