"""The hub recipes with the real classes at full size: random weights in a local hub cache, few rows, one round."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AlbertConfig, AutoModel, BertConfig, DistilBertConfig, PreTrainedConfig

from client_agent.training.small_trio import make_tokenizer
from deploy.data.make_samples import write
from deploy.lab.make_llama import lay_out_as_hub_cache
from deploy.lab.make_trio import texts

RECIPES = Path(__file__).parents[2] / "deploy" / "recipes"
# As config.json of the three repositories has it, in what decides shapes; and how many values the classifier of two
# labels has that is made of it (108,310,272 of BERT's 108,311,810 are the base model's), and whether with a pooler.
FULL_SIZE: dict[str, tuple[str, PreTrainedConfig, int, bool]] = {
    "bert": ("google-bert/bert-base-cased", BertConfig(vocab_size=28996), 108_311_810, True),
    "albert": (
        "albert/albert-base-v2",
        AlbertConfig(
            embedding_size=128, hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12,
            inner_group_num=1, num_hidden_groups=1, vocab_size=30000, classifier_dropout_prob=0.1, pad_token_id=0,
        ),
        11_685_122,
        True,
    ),
    "distilbert": ("distilbert/distilbert-base-cased", DistilBertConfig(vocab_size=28996), 65_783_042, False),
}  # fmt: skip
SMALL = DistilBertConfig(vocab_size=400, dim=16, hidden_dim=32, n_heads=2, n_layers=1)


def put_into_hub_cache(directory: Path, repository: str, config: PreTrainedConfig) -> None:
    """A model with random weights, where `run_a_round` looks for it."""
    made = directory / "made"
    torch.manual_seed(1)
    AutoModel.from_config(config).save_pretrained(made)
    make_tokenizer(texts()[:60], vocabulary=400).save_pretrained(made)
    lay_out_as_hub_cache(made, cache=directory / "hub" / "hub", repository=repository)
    shutil.rmtree(made)


def write_rows(path: Path, *, labels: Sequence[str]) -> None:
    """48 of them, no two alike: which are held out follows from the text."""
    words = [("wonderful", labels[0]), ("terrible", labels[1]), ("a joy", labels[0]), ("a bore", labels[1])]
    rows = [{"text": f"{row}: it was {words[row % 4][0]}", "label": words[row % 4][1]} for row in range(48)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, rows, columns=("text", "label"))


def run_a_round(directory: Path, *words: str) -> dict[str, Any]:
    """metrics.json of one round of what lies in `directory`; of a grid its only cell's."""
    out = directory / "out"
    few = ("--rounds", "1", "--threads", "1", "--set", "task.max_length=16", "--set", "local.epochs=1")
    command = [
        str(Path(sys.executable).parent / "silotune"), "lab", "run", str(directory), "--out", str(out), *few, *words,
    ]  # fmt: skip
    environment = {**os.environ, "HF_HOME": str(directory / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (path,) = out.rglob("metrics.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def run_hilmkil(directory: Path, kind: str, config: PreTrainedConfig) -> dict[str, Any]:
    """A round of the paper's recipe at two sites, from a model that lies in a hub cache under its name."""
    repository = FULL_SIZE[kind][0]
    put_into_hub_cache(directory, repository, config)
    write_rows(directory / "rows.parquet", labels=("positive", "negative"))
    (directory / "lab.toml").write_text(
        f'recipe = "{RECIPES}/hilmkil-2021/recipe.toml"\nsites = 2\n[model]\nhub = "{repository}"\n'
        '[data]\nrows = "rows.parquet"\nvalidation = "rows.parquet"\n'
    )
    return run_a_round(directory)


def check(found: dict[str, Any], *, sites: int) -> dict[str, Any]:
    """The round."""
    only: dict[str, Any]
    (only,) = found["rounds"]
    assert [update["fate"] for update in only["updates"]] == ["ACCEPTED"] * sites
    assert {entry["version"] for entry in found["evaluations"] if entry["site"] == "house"} == {0, 1}
    return only


def versions(directory: Path, *, values: int) -> list[dict[str, list[int]]]:
    """The shapes in each tensor file at the coordinator that has exactly so many values."""
    found = []
    for file in directory.glob("out/**/coordinator/blobs/blobs/*/*"):
        # Smaller ones are those of configuration and tokenizer.
        if file.stat().st_size > values:
            with safe_open(file, framework="np") as tensors:
                shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
            if sum(math.prod(shape) for shape in shapes.values()) == values:
                found.append(shapes)
    return found


def test_a_model_is_taken_from_the_hub_cache_by_the_paper_s_name_and_trained_a_round(tmp_path: Path) -> None:
    check(run_hilmkil(tmp_path, "distilbert", SMALL), sites=2)


# Each takes 30 to 45 CPU seconds; the largest has 2.7 GB of memory in all its processes, and 3 GB of disk.
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", FULL_SIZE)
def test_the_paper_s_models_train_a_round_at_full_size(kind: str, tmp_path: Path) -> None:
    _, config, parameters, has_pooler = FULL_SIZE[kind]
    check(run_hilmkil(tmp_path, kind, config), sites=2)
    # Version 0 and what the round made of it.
    found = versions(tmp_path, values=parameters)
    assert len(found) >= 2
    assert all(any("pooler" in name for name in shapes) == has_pooler for shapes in found)
    shutil.rmtree(tmp_path)


# 50 CPU seconds; its largest process has 2.7 GB of memory.
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_teacher_teaches_the_adapters_of_fedlora_kd_at_full_size(tmp_path: Path) -> None:
    """lab-full.toml as it is shipped, with few rows in the place of CoLA's."""
    for name in ("lab-full.toml", "recipe.toml"):
        shutil.copy(RECIPES / "fedlora-kd" / name, tmp_path)
    put_into_hub_cache(tmp_path, "distilbert/distilbert-base-uncased", DistilBertConfig())
    put_into_hub_cache(tmp_path, "google-bert/bert-base-uncased", BertConfig())
    for part in ("train", "validation", "test"):
        write_rows(tmp_path / "data" / "cola" / f"{part}.parquet", labels=("acceptable", "unacceptable"))
    one = ("--lab", "lab-full.toml", "--data", "cola", "--variants", "fed-lora-kd", "--seeds", "1")
    only = check(run_a_round(tmp_path, *one), sites=4)
    assert only["undistilled"] == "" and {"distillation_kept", "teacher_loss", "student_loss"} <= only["metrics"].keys()
    # As recipe.toml says: adapters of rank 8 and the head.
    assert len(versions(tmp_path, values=739_586)) >= 2
    shutil.rmtree(tmp_path)


# 140 CPU seconds; its largest process has 2.7 GB of memory.
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_mentors_of_twelve_layers_teach_a_mentee_of_four_that_travels_as_its_directions(tmp_path: Path) -> None:
    put_into_hub_cache(tmp_path, "google-bert/bert-base-uncased", BertConfig())
    write_rows(tmp_path / "rows.parquet", labels=("reaction", "no-reaction"))
    (tmp_path / "lab.toml").write_text(
        f'recipe = "{RECIPES}/fedkd/recipe.toml"\nsites = 2\n[model]\nhub = "google-bert/bert-base-uncased"\n'
        '[data]\nrows = "rows.parquet"\nvalidation = "rows.parquet"\ntest = "rows.parquet"\nsite_validation = 0.2\n'
    )
    found = run_a_round(tmp_path, "--set", "cohort.quorum=2")
    assert found["spec"]["base_model"]["layers"] == 4
    assert (found["spec"]["encoding"]["up"], found["spec"]["encoding"]["down"]) == ("svd", "svd")
    only = check(found, sites=2)
    assert all({"mentor_loss", "mentor_accuracy"} <= update["metrics"].keys() for update in only["updates"])
    # Four layers, pooler and head, and no embeddings.
    values = 28_943_618
    assert len(versions(tmp_path, values=values)) >= 2
    # What two updates are, and the version that the house agent fetches to measure it, without svd.
    assert 0 < only["bytes_up"] < 2 * 4 * values and 0 < only["bytes_down"] < 4 * values
    shutil.rmtree(tmp_path)
