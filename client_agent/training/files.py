"""What the trainer writes into a task directory: tensors that travel, and the other files of a model directory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save
from torch import Tensor

from client_agent.training.kinds import Kind
from client_agent.training.model import Model
from protos.model_files import FROZEN
from protos.tensors import make_header


def write_tensors(tensors: Mapping[str, Tensor], *, path: Path) -> None:
    """A safetensors file in canonical order, one tensor in memory at a time; whole or not at all, and on disk."""
    header, layout = make_header((name, "F32", tuple(tensor.shape)) for name, tensor in tensors.items())
    temporary = path.with_suffix(".new")
    with temporary.open("wb") as file:
        file.write(header)
        for spec in layout.tensors:
            values = tensors[spec.name].detach().cpu().contiguous().reshape(-1)
            file.write(values.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def write_model_files(model: Model, *, task: Kind, directory: Path) -> None:
    """Beside the federated tensors, all that makes them a model directory that Hugging Face opens.

    config.json and tokenizer; adapter_config.json where there are adapters; else the frozen tensors, where there are.
    """
    directory.mkdir(exist_ok=True)
    network = model.network
    plain: Any = network.get_base_model() if isinstance(network, PeftModel) else network
    plain.config.architectures = [type(plain).__name__]
    plain.config.save_pretrained(directory)
    # Whoever uses the model with `truncation=True` then cuts texts where they were cut in training.
    longest, model.tokenizer.model_max_length = model.tokenizer.model_max_length, task.max_length
    model.tokenizer.save_pretrained(directory)
    model.tokenizer.model_max_length = longest
    if isinstance(network, PeftModel):
        network.peft_config["default"].save_pretrained(str(directory))
    elif frozen := _frozen(model):
        # Not `save_file`, whose error on a full disk is none of the operating system's.
        (directory / FROZEN).write_bytes(save(frozen, metadata={"format": "pt"}))


def _frozen(model: Model) -> dict[str, Tensor]:
    """Parameters and persistent buffers that are not federated, tied ones under their first name."""
    known = {tensor.data_ptr() for tensor in model.federated.values()}
    frozen = {}
    for name, tensor in model.network.state_dict().items():
        if tensor.data_ptr() not in known:
            known.add(tensor.data_ptr())
            frozen[name] = tensor.cpu().contiguous()
    return frozen
