"""A frozen base model in 4 or 8 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), through bitsandbytes.

PEFT's `prepare_model_for_kbit_training` is not needed: it turns everything that is not quantised into float32, which
costs gigabytes where a vocabulary is large; here that has the recipe's dtype, and what is trained is float32 anyway.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from protos import jobspec
from protos.errors import InvalidInput


def loading_options(
    base: jobspec.BaseModelRef, *, local: jobspec.Local, device: torch.device, skip: Sequence[str]
) -> dict[str, Any]:
    """What `from_pretrained` needs for it; nothing for a base model that is not quantised. `skip` names modules that
    are not.

    InvalidInput: bitsandbytes is not there.
    """
    if base.quantization == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InvalidInput(
            f"The recipe wants the base model in {base.quantization}, but this site's trainer lacks bitsandbytes.",
            hint="Install silotune[agent] at the site, or set quantization under [base_model] in the recipe to none.",
        )
    from transformers import BitsAndBytesConfig

    if base.quantization == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(skip) or None)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=list(skip) or None,
            bnb_4bit_quant_type=base.quantization,
            bnb_4bit_use_double_quant=base.double_quantization,
            bnb_4bit_compute_dtype=compute_dtype(local, device=device),
        )
    return {"quantization_config": config, "device_map": {"": str(device)}}


def compute_dtype(local: jobspec.Local, *, device: torch.device) -> torch.dtype:
    """What matrices are multiplied in: bfloat16 on a GPU unless the recipe says float32."""
    return torch.bfloat16 if device.type == "cuda" and local.precision != "float32" else torch.float32


def keep_layout(network: nn.Module) -> None:
    """On some CPUs a look at a 4-bit model would pack its weights anew, and training go on with other roundings."""
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
