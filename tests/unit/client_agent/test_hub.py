"""Base models by hub name and revision, from a cache laid out as huggingface_hub does, without any network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from client_agent import cli
from client_agent.home import Home
from client_agent.models import Models

COMMIT = "c0ffee00" * 5


def hub_cache(directory: Path) -> Path:
    """For HF_HOME: one repository with a small Llama in several files of weights, whose main branch is COMMIT."""
    repository = directory / "hub" / "models--org--Tiny-Llama"
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(repository / "snapshots" / COMMIT, max_shard_size="8KB")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return directory


def add_from_hub(
    home: Path, *, cache: Path, revision: str, repository: str = "org/Tiny-Llama"
) -> subprocess.CompletedProcess[str]:
    # A process of its own: the library reads its environment once.
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    command = ["model", "add", "llama", "--hub", repository, "--revision", revision, "--home", str(home)]
    return subprocess.run(
        [sys.executable, "-m", "client_agent.cli", *command, "--format", "json"],
        env=environment, capture_output=True, text=True, check=False, cwd=Path(cli.__file__).parents[1],
    )  # fmt: skip


def test_a_model_of_the_hub_is_found_in_its_cache_and_its_commit_is_remembered(tmp_path: Path) -> None:
    ended = add_from_hub(tmp_path / "home", cache=hub_cache(tmp_path), revision="main")
    assert ended.returncode == 0, ended.stderr
    added: dict[str, Any] = json.loads(ended.stdout)["data"]
    assert (added["hub"], added["revision"]) == ("org/Tiny-Llama", COMMIT)
    model = Models(Home(tmp_path / "home").models_file).current("llama")
    assert (model.digest, model.hub, model.revision) == (added["digest"], "org/Tiny-Llama", COMMIT)
    # It is the model: a trainer loads it from where it lies.
    loaded = LlamaForCausalLM.from_pretrained(added["directory"], local_files_only=True)
    assert loaded.num_parameters() == added["parameters"]


def test_a_name_that_no_repository_can_have_is_a_sentence(tmp_path: Path) -> None:
    ended = add_from_hub(tmp_path / "home", cache=tmp_path, revision="main", repository="org/Tiny Llama")
    assert ended.returncode == 3
    assert json.loads(ended.stdout)["data"]["message"] == "'org/Tiny Llama' is not the id of a hub repository."


def test_a_revision_that_no_cache_holds_is_not_replaced_by_another_one(tmp_path: Path) -> None:
    ended = add_from_hub(tmp_path / "home", cache=hub_cache(tmp_path), revision="v2")
    assert ended.returncode == 7
    assert "org/Tiny-Llama could not be downloaded" in json.loads(ended.stdout)["data"]["message"]
