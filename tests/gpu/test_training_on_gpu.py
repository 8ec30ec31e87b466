"""LoRA on a CUDA device, through the trainer's own tasks: it learns, and a repetition has the same bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from client_agent.taskdir import UPDATE
from client_agent.training.warm import Warm
from tests.unit.client_agent.training.conftest import Site, causal_recipe
from tests.unit.client_agent.training.conftest import language_model as language_model
from tests.unit.client_agent.training.conftest import teaching_site as teaching_site

DEVICE = "cuda:0"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("base", [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "quantization": "nf4"}])
def test_lora_learns_on_a_gpu_and_repeats_bit_for_bit(teaching_site: Site, base: dict[str, Any]) -> None:
    recipe = causal_recipe(
        base_model={"name": "tiny-llama", **base},
        local={"steps": 20, "batch_size": 8, "learning_rate": 1e-2, "gradient_checkpointing": True},
    )
    init, _ = teaching_site.run("init", teaching_site.task("init", recipe=recipe, device=DEVICE))
    task = teaching_site.task("train", recipe=recipe, model=init / UPDATE, device=DEVICE)
    measure = teaching_site.task("evaluate", recipe=recipe, model=init / UPDATE, device=DEVICE)
    _, before = teaching_site.run("before", measure)
    trained, result = teaching_site.run("trained", task)
    again, _ = teaching_site.run("again", task, warm=Warm())
    assert result.metrics["loss"] < before.metrics["loss"]
    assert math.isfinite(result.metrics["update_norm"]) and result.metrics["gpu_memory_bytes"] > 0
    assert (trained / UPDATE).read_bytes() == (again / UPDATE).read_bytes()
