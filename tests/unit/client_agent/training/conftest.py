"""A site in miniature: a random encoder of 32 units with a tokenizer of its own, a few rows, and tasks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AlbertConfig,
    AutoModel,
    BertConfig,
    DistilBertConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from client_agent.settings import DataSet
from client_agent.taskdir import TaskResult, TaskSpec, write_spec
from client_agent.training.prompts import ALPACA
from client_agent.training.small_llama import Pretraining, Sizes, make
from client_agent.training.tasks import Work
from client_agent.training.warm import Warm

LABELS = ("drug", "lab", "symptom")
WORDS = {"drug": "aspirin dose tablet", "lab": "sodium count blood", "symptom": "cough pain fever"}
FILLER = ["the", "patient", "has", "been", "given", "some", "more", "of", "it", "since", "monday"]
CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    "bert": BertConfig,
    "albert": AlbertConfig,
    "distilbert": DistilBertConfig,
    "roberta": RobertaConfig,
}


def make_base_model(directory: Path, *, architecture: str) -> Path:
    """An encoder without a head, as a hub would hold it: three layers, random weights."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLER, *" ".join(WORDS.values()).split()]
    wordpiece = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    wordpiece.pre_tokenizer = pre_tokenizers.Whitespace()
    wordpiece.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=wordpiece, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(directory)
    sizes: dict[str, Any] = {"vocab_size": len(words), "pad_token_id": 0, "max_position_embeddings": 40}
    if architecture == "distilbert":
        sizes |= {"dim": 32, "hidden_dim": 64, "n_heads": 4, "n_layers": 3}
    else:
        sizes |= {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    if architecture == "albert":
        sizes |= {"embedding_size": 16, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    torch.manual_seed(0)
    AutoModel.from_config(CONFIGS[architecture](**sizes)).save_pretrained(directory)
    return directory


def make_texts(label: str, *, rows: int, start: int = 0) -> list[str]:
    """Texts of different lengths in which one word in three tells the label."""
    texts = []
    for row in range(start, start + rows):
        words = [FILLER[(row * 5 + i) % len(FILLER)] for i in range(4 + row % 11)]
        words[row % len(words)] = WORDS[label].split()[row % 3]
        texts.append(" ".join([*words, str(row)]))
    return texts


@dataclass
class Site:
    """Runs tasks in this process as the worker does in its own."""

    directory: Path
    base_model: Path
    data_set: DataSet
    warm: Warm = field(default_factory=Warm)
    stages: list[tuple[str, int, int]] = field(default_factory=list)

    def recipe(self, **changes: Any) -> dict[str, Any]:
        return {
            "name": "tiny",
            "task": {"type": "classification", "labels": LABELS, "max_length": 24},
            "data": {"name": "notes"},
            "base_model": {"name": "tiny-encoder"},
            "method": {"type": "full"},
            "local": {"steps": 3, "batch_size": 8, "learning_rate": 1e-3},
            "rounds": 4,
            "seed": 11,
            **changes,
        }

    def task(self, kind: str, *, recipe: dict[str, Any], model: Path | None = None, **changes: Any) -> TaskSpec:
        fields: dict[str, Any] = {
            "task_id": "task-1",
            "job_id": "job-1",
            "round": 1,
            "kind": kind,
            "spec": recipe,
            "seed": 5,
            "split": "validation" if kind == "evaluate" else "",
            "model_path": str(model) if model else None,
            "base_model_path": str(self.base_model),
            "base_digest": "ab" * 32,
            "data_set": None if kind == "init" else self.data_set.model_dump(mode="json"),
            "device": "cpu",
            "threads": 1,
        }
        return TaskSpec(**{**fields, **changes})

    def write(self, name: str, task: TaskSpec) -> Path:
        write_spec(self.directory / name, task)
        return self.directory / name

    def run(self, name: str, task: TaskSpec, *, warm: Warm | None = None) -> tuple[Path, TaskResult]:
        """The task's directory and result; `warm` replaces what the site keeps in memory."""
        directory = self.write(name, task)
        kept = self.warm if warm is None else warm
        return directory, Work(task, directory, kept, self._report, time.monotonic()).run()

    def _report(self, stage: str, done: int, total: int, unit: str, metrics: dict[str, float]) -> None:
        self.stages.append((stage, done, total))


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = make_base_model(tmp_path_factory.mktemp(architecture), architecture=architecture)
        return made[architecture]

    return of


def make_instructions(*, rows: int, start: int = 0) -> list[dict[str, str]]:
    """Questions of different lengths, every third with an input, whose answers follow from one word."""
    found = []
    for row in range(start, start + rows):
        label = LABELS[row % 3]
        word = WORDS[label].split()[row % 2]
        found.append(
            {
                "instruction": f"What is {word} "
                + " ".join(FILLER[(row * 3 + i) % len(FILLER)] for i in range(row % 7)),
                "input": f"note {row}" if row % 3 == 0 else "",
                "output": f"It is a {label} like {WORDS[label]}." + " It is." * (row % 4),
            }
        )
    return found


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers and 64 units with random weights, as a hub would hold it."""
    directory = tmp_path_factory.mktemp("llama")
    texts = [text for row in make_instructions(rows=40) for text in (*row.values(), ALPACA.prompt)]
    sizes = Sizes(vocabulary=400, hidden=64, layers=2, heads=4, key_value_heads=2, positions=256)
    make(directory, texts=texts, sizes=sizes, pretraining=Pretraining(), seed=0)
    return directory


@pytest.fixture
def teaching_site(tmp_path: Path, language_model: Path) -> Site:
    """A site with a table of instructions. Its recipes name `causal_recipe`'s fields."""
    path = tmp_path / "instructions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_instructions(rows=40)))
    return Site(
        tmp_path, language_model, DataSet(path=str(path), instruction="instruction", validation=0.2, test=str(path))
    )


def causal_recipe(**changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "task": {"type": "causal-lm", "max_length": 96},
        "data": {"name": "notes"},
        "base_model": {"name": "tiny-llama"},
        "method": {"type": "lora", "rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]},
        "local": {"steps": 3, "batch_size": 8, "learning_rate": 1e-3},
        "evaluation": {"metric": "loss"},
        "rounds": 4,
        "seed": 11,
        **changes,
    }


@pytest.fixture
def site(tmp_path: Path, base_model: Callable[[str], Path]) -> Site:
    path = tmp_path / "notes.jsonl"
    rows = [{"text": text, "label": label} for label in LABELS for text in make_texts(label, rows=14)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Site(tmp_path, base_model("bert"), DataSet(path=str(path), validation=0.3, test=str(path)))


def texts_of(label: str, *, rows: int, start: int = 0) -> list[str]:
    """Texts of three words, of which two tell the label; 99 different ones."""
    words = WORDS[label].split()
    return [f"{words[row % 3]} {FILLER[row % 11]} {words[row // 3 % 3]}" for row in range(start, start + rows)]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def encoder(base_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that learns in a few dozen steps: its random weights are large enough for words to reach the head."""
    path = tmp_path_factory.mktemp("encoder")
    for file in base_model("bert").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    fields = json.loads((path / "config.json").read_text())
    torch.manual_seed(0)
    AutoModel.from_config(BertConfig(**{**fields, "initializer_range": 0.2})).save_pretrained(path)
    return path


@pytest.fixture
def house(site: Site, encoder: Path) -> Site:
    """With 84 labelled rows, about a third of them for validation."""
    rows = [{"text": text, "label": label} for label in LABELS for text in texts_of(label, rows=28)]
    path = write_rows(site.directory / "house.jsonl", rows)
    return replace(site, base_model=encoder, data_set=DataSet(path=str(path), validation=0.33))
