"""A training that is interrupted and goes on: the same bits as in one sitting."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from client_agent.taskdir import CHECKPOINT, UPDATE, Paused, TaskResult, TaskSpec, checkpoint_step
from client_agent.training.tasks import Work
from client_agent.training.warm import Warm
from tests.unit.client_agent.training.conftest import Site, causal_recipe

# 29 rows in batches of 8: four steps are an epoch.
STEPS = 7
KINDS: dict[str, dict[str, Any]] = {
    "full, AdamW": {"method": {"type": "full"}, "local": {"optimizer": "adamw", "weight_decay": 0.1}},
    "LoRA, AdamW": {"method": {"type": "lora", "rank": 2, "dropout": 0.3}, "local": {"optimizer": "adamw"}},
    "full, SGD with momentum": {"method": {"type": "full"}, "local": {"optimizer": "sgd", "momentum": 0.9}},
    "LoRA, plain SGD": {"method": {"type": "lora", "rank": 2, "dropout": 0.3}, "local": {"optimizer": "sgd"}},
    "LoRA, FedProx": {"method": {"type": "lora", "rank": 2, "dropout": 0.3}, "local": {"proximal": 5.0}},
    "full, SCAFFOLD": {"local": {"optimizer": "sgd"}, "aggregation": {"rule": "scaffold"}},
    "LoRA, SCAFFOLD": {
        "method": {"type": "lora", "rank": 2},
        "local": {"optimizer": "sgd"},
        "aggregation": {"rule": "scaffold"},
    },
}


def train_task(
    site: Site,
    *,
    method: dict[str, Any] | None = None,
    local: dict[str, Any] | None = None,
    aggregation: dict[str, Any] | None = None,
) -> TaskSpec:
    local = {"steps": STEPS, "batch_size": 8, "learning_rate": 1e-2, **(local or {})}
    recipe = site.recipe(method=method or {"type": "full"}, local=local, aggregation=aggregation or {})
    init, _ = site.run("init", site.task("init", recipe=recipe))
    return site.task(
        "train", recipe=recipe, model=init / UPDATE, state_directory=str(site.directory / "jobs" / "job-1")
    )


class Sitting:
    """One run of the task directory `name`, cold, as after a kill."""

    def __init__(self, site: Site, task: TaskSpec, *, name: str = "rough", pause_after: int | None = None) -> None:
        self.steps: list[int] = []
        self.said: list[str] = []
        self.result: TaskResult | None = None
        self.directory = site.write(name, task)
        work = Work(
            task, self.directory, Warm(), self._report, time.monotonic(),
            pausing=lambda: self.steps[-1] == pause_after, warn=self.said.append,
        )  # fmt: skip
        if pause_after is None:
            self.result = work.run()
        else:
            with pytest.raises(Paused):
                work.run()

    def _report(self, stage: str, done: int, total: int, unit: str, metrics: dict[str, float]) -> None:
        if stage == "training":
            self.steps.append(done)


@pytest.mark.parametrize("kind", KINDS)
def test_a_paused_training_ends_with_the_bits_of_an_undisturbed_one(site: Site, kind: str) -> None:
    task = train_task(site, **KINDS[kind])
    calm = Sitting(site, task, name="calm")
    assert Sitting(site, task, pause_after=2).steps == [0, 1, 2]
    assert Sitting(site, task, pause_after=5).steps == [2, 3, 4, 5]
    last = Sitting(site, task)
    assert last.steps == [5, 6, 7]
    assert (last.directory / UPDATE).read_bytes() == (calm.directory / UPDATE).read_bytes()
    assert last.result and calm.result and last.result.metrics["loss"] == calm.result.metrics["loss"]
    assert last.result.steps == STEPS


@pytest.mark.parametrize("packing", [False, True])
def test_so_does_one_of_a_quantised_language_model(teaching_site: Site, packing: bool) -> None:
    recipe = causal_recipe(
        base_model={"name": "tiny-llama", "quantization": "nf4"},
        task={"type": "causal-lm", "max_length": 128, "packing": packing},
        method={"type": "lora", "rank": 2, "dropout": 0.3, "targets": ["q_proj", "v_proj"]},
        local={"steps": STEPS, "batch_size": 8, "micro_batch_size": 3, "gradient_checkpointing": True},
    )
    init, _ = teaching_site.run("init", teaching_site.task("init", recipe=recipe))
    task = teaching_site.task("train", recipe=recipe, model=init / UPDATE)
    calm = Sitting(teaching_site, task, name="calm")
    Sitting(teaching_site, task, pause_after=3)
    last = Sitting(teaching_site, task)
    assert last.steps == [3, 4, 5, 6, 7]
    assert (last.directory / UPDATE).read_bytes() == (calm.directory / UPDATE).read_bytes()


def test_the_micro_batch_size_that_fitted_is_kept(site: Site) -> None:
    task = train_task(site, local={"micro_batch_size": 3})
    rough = Sitting(site, task, pause_after=3)
    assert json.loads((rough.directory / CHECKPOINT).read_text())["checkpoint"]["state"]["micro_batch_size"] == 3
    Sitting(site, task)
    calm = Sitting(site, task, name="calm")
    assert (rough.directory / UPDATE).read_bytes() == (calm.directory / UPDATE).read_bytes()


def test_checkpoints_are_saved_as_often_as_the_recipe_says_and_only_the_newest_is_kept(site: Site) -> None:
    often = Sitting(site, train_task(site, local={"checkpoint_seconds": 1e-6}), name="often")
    assert checkpoint_step(often.directory) == STEPS - 1, "the last step is the result's"
    assert [path.name for path in often.directory.glob("checkpoint-*")] == [f"checkpoint-{STEPS - 1}.safetensors"]
    assert checkpoint_step(Sitting(site, train_task(site), name="never").directory) == 0


@pytest.mark.parametrize("change", ["seed", "rows", "damage", "threads", "torch"])
def test_what_is_not_this_works_whole_checkpoint_is_ignored(
    site: Site, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = train_task(site)
    rough = Sitting(site, task, pause_after=3)
    match change:
        case "seed":
            task = site.task("train", recipe=task.spec, model=Path(task.model_path or ""), seed=6)
        case "rows":
            with Path(site.data_set.path).open("a") as file:
                file.write('{"text": "the patient has been given blood", "label": "lab"}\n' * 3)
        case "threads":
            task = replace(task, threads=2)
        case "torch":
            monkeypatch.setattr(torch, "__version__", "9.9.0")
        case "damage":
            tensors = rough.directory / "checkpoint-3.safetensors"
            tensors.write_bytes(tensors.read_bytes()[:-1] + b"\xff")
    assert Sitting(site, task).steps[0] == 0
    calm = Sitting(site, task, name="calm")
    assert (rough.directory / UPDATE).read_bytes() == (calm.directory / UPDATE).read_bytes()


def test_a_disk_that_takes_no_checkpoint_does_not_stop_the_training(site: Site) -> None:
    task = train_task(site, local={"checkpoint_seconds": 1e-6})
    directory = site.write("rough", task)
    # A full disk cannot be had here; a directory in the file's place gives the same kind of error.
    (directory / f"{CHECKPOINT}.new").mkdir()
    sitting = Sitting(site, task)
    assert sitting.steps[-1] == STEPS
    assert set(sitting.said) == {"A checkpoint could not be saved: Is a directory."}
    assert list(directory.glob("checkpoint-*")) == []
