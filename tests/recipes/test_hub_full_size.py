"""Hilmkil et al.'s recipe with the real classes: random weights in a local hub cache, two sites, one round."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
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

STUDY = Path(__file__).parents[2] / "deploy" / "recipes" / "hilmkil-2021"
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


def run_a_round(directory: Path, kind: str, config: PreTrainedConfig) -> dict[str, Any]:
    """metrics.json of one round of the recipe, from a model that lies in a hub cache under its name."""
    repository = FULL_SIZE[kind][0]
    made, cache = directory / "made", directory / "hub" / "hub"
    torch.manual_seed(1)
    AutoModel.from_config(config).save_pretrained(made)
    make_tokenizer(texts()[:60], vocabulary=400).save_pretrained(made)
    lay_out_as_hub_cache(made, cache=cache, repository=repository)
    shutil.rmtree(made)
    rows = [{"text": f"the film was {word}", "label": label} for word, label in LABELLED * 6]
    write(directory / "rows.parquet", rows, columns=("text", "label"))
    (directory / "lab.toml").write_text(
        f'recipe = "{STUDY}/recipe.toml"\nsites = 2\n[model]\nhub = "{repository}"\n'
        '[data]\nrows = "rows.parquet"\nvalidation = "rows.parquet"\n'
    )
    out = directory / "out"
    words = ("--rounds", "1", "--threads", "1", "--set", "task.max_length=16", "--set", "local.epochs=1")
    command = [str(Path(sys.executable).parent / "silotune"), "lab", "run", str(directory), "--out", str(out), *words]
    environment = {**os.environ, "HF_HOME": str(directory / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return found


LABELLED = [("wonderful", "positive"), ("terrible", "negative"), ("a joy", "positive"), ("a bore", "negative")]


def check(found: dict[str, Any]) -> None:
    (only,) = found["rounds"]
    assert [update["fate"] for update in only["updates"]] == ["ACCEPTED"] * 2
    assert {entry["version"] for entry in found["evaluations"] if entry["site"] == "house"} == {0, 1}


def test_a_model_is_taken_from_the_hub_cache_by_the_paper_s_name_and_trained_a_round(tmp_path: Path) -> None:
    check(run_a_round(tmp_path, "distilbert", SMALL))


# Each takes 30 to 45 CPU seconds; the largest has 2.7 GB of memory in all its processes, and 3 GB of disk.
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", FULL_SIZE)
def test_the_paper_s_models_train_a_round_at_full_size(kind: str, tmp_path: Path) -> None:
    _, config, parameters, has_pooler = FULL_SIZE[kind]
    check(run_a_round(tmp_path, kind, config))
    # Version 0 and what the round made of it; the other files are those of configuration and tokenizer.
    kept = (tmp_path / "out" / "coordinator" / "blobs" / "blobs").glob("*/*")
    versions = [file for file in kept if file.stat().st_size > parameters]
    assert len(versions) >= 2
    for version in versions:
        with safe_open(version, framework="np") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        assert sum(math.prod(shape) for shape in shapes.values()) == parameters
        assert any("pooler" in name for name in shapes) == has_pooler
    shutil.rmtree(tmp_path)
