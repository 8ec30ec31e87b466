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
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from client_agent.training.adapters import federated, leave_casts_to_autocast, with_adapters
from client_agent.training.kinds import Kind
from client_agent.training.parallel import ALONE, Group
from client_agent.training.quantization import compute_dtype, keep_layout, loading_options
from protos import jobspec
from protos.errors import InvalidInput

LOCAL_ONLY: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
# Names of the libraries for what the recipe calls so; "auto" leaves the choice to transformers.
ATTENTION = {"eager": "eager", "sdpa": "sdpa", "flash": "flash_attention_2"}


@dataclass(frozen=True)
class Model:
    network: nn.Module
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    # What the task at hand trains, else all of version 0; in canonical order; float32; each shares memory with a
    # parameter of `network`. Only `load_version` changes it.
    federated: dict[str, Tensor]
    # What version 0 holds.
    shapes: Mapping[str, tuple[int, ...]]
    # The processes that have it together.
    group: Group = ALONE

    @property
    def trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]


def build(
    spec: jobspec.JobSpec, *, task: Kind, base_model_path: Path, device: torch.device, group: Group = ALONE
) -> Model:
    """The base model with head and adapters, whose new weights follow from the job's seed alone.

    InvalidInput: the directory is no such model, or the recipe asks for layers, positions or targets that it lacks, or
    for software that this site lacks.
    """
    assert spec.base_model is not None
    name = spec.base_model.name
    options = loading_options(spec.base_model, local=spec.local, device=device, skip=task.never_quantized)
    if attention := ATTENTION.get(spec.base_model.attention):
        options["attn_implementation"] = attention
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
            base_model_path, config=config, **LOCAL_ONLY, use_safetensors=True, dtype=_dtype(spec),
            output_loading_info=True, ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        traceback.print_exc()
        if isinstance(error, ImportError) and spec.base_model.attention == "flash":
            raise InvalidInput(
                f"The base model {name!r} cannot be used with attention = {spec.base_model.attention!r} at this site.",
                hint='Install what the trainer\'s log asks for, or set attention = "auto" under [base_model].',
            ) from error
        raise InvalidInput(
            f"The base model {name!r} cannot be loaded for this task ({type(error).__name__}).",
            hint="It needs config.json, tokenizer files and safetensors weights; the trainer's log has the details.",
        ) from error
    _check_positions(network, max_length=task.max_length, name=name)
    missing = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
    task.check(network, missing=missing, name=name)
    keep_layout(network)
    if isinstance(spec.method, jobspec.Lora):
        network = with_adapters(network, spec=spec, peft_type=task.peft_type, missing=missing, name=name)
        if compute_dtype(spec.local, device=device) == torch.bfloat16:
            leave_casts_to_autocast(network)
    elif spec.method.freeze_embeddings:
        _freeze_embeddings(network, missing=missing)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if group.mesh and not options.get("quantization_config"):
        group.shard(network, device=device)
    else:
        # Own memory: the loaded tensors are views of the mapped file, at addresses aligned by chance. Quantised ones
        # are not: they were made here, on the device.
        for tensor in [*network.parameters(), *network.buffers()]:
            if tensor.is_floating_point() or not options.get("quantization_config"):
                tensor.data = tensor.data.to(device, copy=True)
    if spec.local.compile:
        if group.size > 1:
            raise InvalidInput(
                "This site trains with several processes, which have no compiled models.",
                hint="Set compile = false under [local] in the recipe, or processes = 1 under [device] in site.toml.",
            )
        _compile(network)
    tensors = federated(network)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Model(network, tokenizer, device, tensors, shapes, group)


def _dtype(spec: jobspec.JobSpec) -> torch.dtype:
    """Of the frozen weights. Where there are no adapters, (nearly) all are trained, and that is done in float32."""
    wants = spec.base_model.dtype if spec.base_model and isinstance(spec.method, jobspec.Lora) else "float32"
    return torch.bfloat16 if wants == "bfloat16" else torch.float32


def _compile(network: nn.Module) -> None:
    """Layer by layer, where transformers marks them: all of them then share one program. Names stay as they are."""
    layers: list[nn.Module] = [module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers or [network]:
        layer.compile(dynamic=True)


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
