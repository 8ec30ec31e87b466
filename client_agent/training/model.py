"""The model at a site: a base model from a local directory, the task's head, adapters, and the tensors that travel.

`Model.federated` is the whole boundary: names and tensors that share memory with the model's parameters, so a version
is loaded by copying into them and an update is written from them, while everything else stays as it was loaded. What
the base model lacks (a new head, sometimes a pooler) starts random and is always among them. The frozen rest therefore
comes from the base model alone: a warm model differs from a newly loaded one by its federated tensors only.
"""

from __future__ import annotations

import traceback
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from client_agent.training.classification import TextClassification
from protos import jobspec
from protos.errors import CorruptData, InvalidInput

LOCAL_ONLY: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class Model:
    network: nn.Module
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    # In canonical order; float32; each shares memory with a trainable parameter of `network`.
    federated: Mapping[str, Tensor]

    @property
    def trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]


def build(spec: jobspec.JobSpec, *, task: TextClassification, base_model_path: Path, device: torch.device) -> Model:
    """The base model with head and adapters, whose new weights follow from the job's seed alone.

    InvalidInput: the directory is no such model, or the recipe asks for layers, positions or targets that it lacks.
    """
    name = spec.base_model.name if spec.base_model else ""
    # What the base model lacks is dealt with below; the library's report of it would be most of the log.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(base_model_path, **LOCAL_ONLY)
        _cut_layers(config, spec, name=name)
        task.configure(config)
        tokenizer = AutoTokenizer.from_pretrained(base_model_path, **LOCAL_ONLY)
        torch.manual_seed(spec.seed)
        network, loading = task.model_class.from_pretrained(
            base_model_path, config=config, **LOCAL_ONLY, use_safetensors=True, dtype=torch.float32,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        traceback.print_exc()
        raise InvalidInput(
            f"The base model {name!r} cannot be loaded for this task ({type(error).__name__}).",
            hint="It needs config.json, tokenizer files and safetensors weights; the trainer's log has the details.",
        ) from error
    _check_positions(network, max_length=task.max_length, name=name)
    missing = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
    if isinstance(spec.method, jobspec.Lora):
        network = _with_adapters(network, method=spec.method, task=task, missing=missing, name=name)
    elif spec.method.freeze_embeddings:
        _freeze_embeddings(network, missing=missing)
    # Own memory: the loaded tensors are views of the mapped file, at addresses aligned by chance.
    for tensor in [*network.parameters(), *network.buffers()]:
        tensor.data = tensor.data.to(device, copy=True)
    return Model(network, tokenizer, device, _federated(network))


def _federated(network: nn.Module) -> dict[str, Tensor]:
    if isinstance(network, PeftModel):
        tensors = get_peft_model_state_dict(network, save_embedding_layers=False)
    else:
        tensors = {name: tensor.detach() for name, tensor in network.named_parameters() if tensor.requires_grad}
    return dict(sorted(tensors.items()))


def _cut_layers(config: PreTrainedConfig, spec: jobspec.JobSpec, *, name: str) -> None:
    layers = spec.base_model.layers if spec.base_model else None
    if layers is None:
        return
    have = getattr(config, "num_hidden_layers", None)
    if have is None or layers > have:
        raise InvalidInput(
            f"The recipe keeps {layers} layers, but the base model {name!r} has {have or 'none to choose from'}.",
            hint="Correct layers under [base_model] in the recipe.",
        )
    config.num_hidden_layers = layers
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = config.layer_types[:layers]


def _check_positions(network: PreTrainedModel, *, max_length: int, name: str) -> None:
    for path, module in network.named_modules():
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its kin begin to count after the padding token's id.
            first = module.padding_idx + 1 if module.padding_idx is not None else 0
            if max_length > module.num_embeddings - first:
                raise InvalidInput(
                    f"The recipe's max_length is {max_length}, but the base model {name!r} has "
                    f"{module.num_embeddings - first} positions.",
                    hint="Lower max_length under [task] in the recipe.",
                )


def _freeze_embeddings(network: PreTrainedModel, *, missing: Collection[str]) -> None:
    encoder: Any = network.base_model
    frozen = set(getattr(encoder, "embeddings", encoder.get_input_embeddings()).parameters())
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(parameter not in frozen or name in missing)


def _with_adapters(
    network: PreTrainedModel, *, method: jobspec.Lora, task: TextClassification, missing: Collection[str], name: str
) -> PeftModel:
    """Adapters on the targets; the head and whatever else the base model lacks is trained and federated whole."""
    new_modules = set()
    for key in missing:
        top, owner = key.partition(".")[0], key.rpartition(".")[0]
        new_modules.add(owner if top == network.base_model_prefix else top)
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,  # type: ignore[arg-type]
        lora_dropout=method.dropout,
        target_modules="all-linear" if method.targets == ("all-linear",) else list(method.targets),
        modules_to_save=sorted(new_modules) or None,
        task_type=task.peft_type,
    )
    try:
        adapted = get_peft_model(network, config)
    except ValueError as error:
        linear = sorted({path.rpartition(".")[2] for path, m in network.named_modules() if isinstance(m, nn.Linear)})
        raise InvalidInput(
            f"The base model {name!r} has no layers named {', '.join(method.targets)} that can take an adapter.",
            hint=f"Choose targets under [method] in the recipe from: {', '.join(linear)}.",
        ) from error
    # adapter_config.json shall name the base model, not the site's path, and have one content: sets have no order.
    written: Any = adapted.peft_config["default"]
    written.base_model_name_or_path = name
    written.target_modules = sorted(written.target_modules)
    return adapted


def check_tensors(path: Path, *, expected: Mapping[str, Tensor]) -> None:
    """InvalidInput unless the file holds these names and shapes in float32; CorruptData: it is no tensor file."""
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            shapes = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in found.items()}
    except SafetensorError as error:
        raise CorruptData("The received model is not a tensor file.") from error
    hint = "This site's base model or its software differs from the one that built version 0."
    for name in sorted(expected.keys() ^ shapes.keys()):
        lacks = "lacks a tensor that this site's has" if name in expected else "has a tensor that this site's lacks"
        raise InvalidInput(f"The received model {lacks}: {name!r}.", hint=hint)
    for name, tensor in expected.items():
        if shapes[name] != ("F32", tuple(tensor.shape)):
            dtype, shape = shapes[name]
            raise InvalidInput(
                f"Tensor {name!r} of the received model is {dtype} {list(shape)}, not F32 {list(tensor.shape)}.",
                hint=hint,
            )


def load_version(model: Model, *, path: Path) -> None:
    """Puts a version into the model, in place and tensor by tensor; nothing changes unless all of it fits."""
    check_tensors(path, expected=model.federated)
    with safe_open(path, framework="pt") as file:
        for name, tensor in model.federated.items():
            tensor.copy_(file.get_tensor(name))


def update_norm(model: Model, *, path: Path) -> float:
    """The Euclidean distance of the model from the version at `path`; not finite when the training diverged."""
    total = 0.0
    with safe_open(path, framework="pt") as file:
        for name, tensor in model.federated.items():
            difference = tensor.cpu() - file.get_tensor(name)
            total += float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
    return total**0.5
