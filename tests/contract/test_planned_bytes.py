"""What a plan says of bytes, against the files of real models: reported by the agent, read by the coordinator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from client_agent import facts
from client_agent.home import Home
from client_agent.models import Models
from client_agent.settings import SiteSettings
from client_agent.training.adapters import federated, with_adapters
from coordinator.plan import Site, sites_of
from coordinator.traffic import version_tensors
from protos import jobspec
from protos.tensors import make_header
from protos.v1 import operator_pb2


def reported(home: Home, directory: Path, recipe: jobspec.JobSpec) -> Site:
    """What the coordinator knows of a site that holds the model in `directory`."""
    home.create()
    Models(home.models_file).add("tiny", directory)
    agent = facts.agent_info(home, SiteSettings(), gpu="", rows={})
    (site,) = sites_of(recipe, [operator_pb2.SiteView(name="st-olav", state="ENROLLED", agent=agent)])
    return site


def recipe_of(task: dict[str, Any], **tables: Any) -> jobspec.JobSpec:
    fields = {
        "name": "j",
        "task": task,
        "data": {"name": "notes"},
        "base_model": {"name": "tiny"},
        "local": {"steps": 1},
        "evaluation": {"metric": "loss"},
        "rounds": 2,
        **tables,
    }
    return jobspec.parse(fields)


def real_tensors(network: PreTrainedModel | PeftModel) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, "F32", tuple(tensor.shape)) for name, tensor in federated(network).items()]


def small_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("rule", ["mean", "fed-sb"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["all-linear"], ["0.mlp.down_proj"]])
def test_a_language_models_adapters_are_foreseen_to_the_byte(tmp_path: Path, rule: str, targets: list[str]) -> None:
    network = small_llama()
    network.save_pretrained(tmp_path / "model")
    method = {"type": "lora", "rank": 4, "targets": targets}
    recipe = recipe_of({"type": "causal-lm"}, method=method, aggregation={"rule": rule})
    site = reported(Home(tmp_path / "home"), tmp_path / "model", recipe)
    real = with_adapters(network, spec=recipe, peft_type="CAUSAL_LM", missing=(), name="tiny")
    assert version_tensors(recipe, site.shapes) == real_tensors(real)


def test_a_language_model_that_is_trained_whole_is_foreseen_but_for_names(tmp_path: Path) -> None:
    network = small_llama()
    network.save_pretrained(tmp_path / "model")
    recipe = recipe_of({"type": "causal-lm"})
    site = reported(Home(tmp_path / "home"), tmp_path / "model", recipe)
    planned = make_header(version_tensors(recipe, site.shapes))[1]
    assert planned.data_bytes == make_header(real_tensors(network))[1].data_bytes


def test_a_classifiers_values_are_foreseen_exactly_and_its_names_nearly(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=40,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "model")
    task = {"type": "classification", "labels": ["a", "b", "c"]}
    recipe = recipe_of(task, method={"type": "lora", "rank": 4})
    site = reported(Home(tmp_path / "home"), tmp_path / "model", recipe)
    network = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=3)
    head = ("classifier.weight", "classifier.bias")
    real = with_adapters(network, spec=recipe, peft_type="SEQ_CLS", missing=head, name="tiny")
    planned, written = make_header(version_tensors(recipe, site.shapes))[1], make_header(real_tensors(real))[1]
    assert planned.data_bytes == written.data_bytes
    assert abs(planned.file_bytes - written.file_bytes) <= 5 * len(written.tensors) + 8
