from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from client_agent.taskdir import UPDATE
from protos import jobspec
from protos.errors import RecipeInvalid
from tests.unit.client_agent.training.conftest import Site


def test_in_the_first_rounds_the_head_alone_is_trained_and_then_all_of_it(site: Site) -> None:
    local = {"steps": 3, "batch_size": 8, "learning_rate": 1e-3, "warm_head": {"rounds": 1, "learning_rate": 0.01}}
    recipe = site.recipe(local=local)
    init, _ = site.run("init", site.task("init", recipe=recipe))
    before = load_file(init / UPDATE)

    def changed(number: int, recipe: dict[str, Any]) -> set[str]:
        task = site.task("train", recipe=recipe, model=init / UPDATE, round=number)
        update, result = site.run(f"train-{number}-{len(recipe)}", task)
        assert result.metrics["learning_rate"] == (0.01 if number == 1 and "warm_head" in recipe["local"] else 1e-3)
        return {name for name, tensor in load_file(update / UPDATE).items() if not torch.equal(tensor, before[name])}

    head = {"classifier.weight", "classifier.bias"}
    assert changed(1, recipe) == head
    # The bias of the keys moves nothing: softmax takes no notice of it.
    assert {name for name in before if "key.bias" not in name} <= changed(2, recipe)
    # The same trainer, still warm, does a job that knows nothing of it.
    assert changed(1, recipe) == head
    assert len(changed(1, site.recipe(base_model={"name": "tiny-encoder"}))) > len(head)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"type": "lora", "targets": ["query"]}},
        {"task": {"type": "causal-lm"}, "evaluation": {"metric": "loss"}},
    ],
)
def test_only_a_classifier_that_is_trained_whole_has_a_head_to_warm(site: Site, changes: dict[str, Any]) -> None:
    recipe = site.recipe(local={"steps": 3, "warm_head": {"learning_rate": 0.1}})
    assert jobspec.parse(recipe).learning_rate_at(1) == 0.1
    with pytest.raises(RecipeInvalid, match="warm_head trains a classifier's new head"):
        jobspec.parse({**recipe, **changes})
