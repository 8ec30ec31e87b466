from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from client_agent.models import inspect_directory
from client_agent.training import small_llama
from client_agent.training.small_llama import Pretraining, Sizes
from deploy.lab.make_llama import lay_out_as_hub_cache, texts

HUB_NAME = "ContactDoctor/Bio-Medical-Llama-3-8B"


def make(directory: Path, *, steps: int = 3, seed: int = 1) -> Path:
    small_llama.make(
        directory,
        texts=texts(rows=60),
        sizes=Sizes(vocabulary=400, hidden=32, layers=1),
        pretraining=Pretraining(steps=steps),
        seed=seed,
    )
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In a process of its own, as the lab does it."""
    directory = tmp_path_factory.mktemp("llama") / "made"
    words = ["--hidden=32", "--layers=1", "--vocabulary=400", "--rows=60", "--pretrain-steps=3", "--seed=1"]
    command = [sys.executable, "-m", "deploy.lab.make_llama", str(directory), *words, "--threads=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return directory


def test_the_real_classes_load_it_without_a_network(made: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(made, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(made, local_files_only=True)
    assert isinstance(model, LlamaForCausalLM) and tokenizer.is_fast
    text = "What are the symptoms of Bloom syndrome?\nShort stature – and é, 漢."
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids, skip_special_tokens=True) == text
    assert model(input_ids=torch.tensor([ids])).logits.shape == (1, len(ids), len(tokenizer))


def test_the_same_seed_gives_the_same_model_and_another_one_another(made: Path, tmp_path: Path) -> None:
    first = inspect_directory("made", made).digest
    assert inspect_directory("again", make(tmp_path / "again")).digest == first
    assert inspect_directory("other", make(tmp_path / "other", seed=2)).digest != first


def test_pretraining_teaches_it_the_text(made: Path, tmp_path: Path) -> None:
    def loss(directory: Path) -> float:
        model = AutoModelForCausalLM.from_pretrained(directory)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        ids = torch.tensor([tokenizer(texts(rows=1)[0])["input_ids"]])
        return model(input_ids=ids, labels=ids).loss.item()

    random = loss(make(tmp_path / "random", steps=0))
    assert loss(make(tmp_path / "taught", steps=40)) < random - 0.5


def test_a_hub_cache_answers_to_the_repositorys_name(made: Path, tmp_path: Path) -> None:
    revision = lay_out_as_hub_cache(made, cache=tmp_path, repository=HUB_NAME)
    # The code that would download it, with and without a revision.
    found = snapshot_download(HUB_NAME, cache_dir=tmp_path, local_files_only=True)
    assert found == snapshot_download(HUB_NAME, revision=revision, cache_dir=tmp_path, local_files_only=True)
    assert AutoModelForCausalLM.from_pretrained(found).config.architectures == ["LlamaForCausalLM"]
    assert AutoTokenizer.from_pretrained(found).is_fast
