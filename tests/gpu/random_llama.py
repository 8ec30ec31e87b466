"""A Llama of any size with random weights, in 4 bits or bfloat16, made on its device: nothing is downloaded.

It begins on the meta device and comes into being tensor by tensor, so that neither the machine nor the GPU ever holds
more than the finished model and one layer's weight: no copy in float32, none on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import bitsandbytes
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers import AutoHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

WEIGHT_SPREAD = 0.02  # Llama's own initializer_range


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int


LLAMA_3_8B = Shape(hidden=4096, intermediate=14336, layers=32, heads=32, key_value_heads=8, vocabulary=128256)
TINY = Shape(hidden=64, intermediate=128, layers=2, heads=4, key_value_heads=2, vocabulary=512)


def make_network(
    shape: Shape, *, quantization: str, compute: torch.dtype, device: torch.device, seed: int = 0
) -> LlamaForCausalLM:
    """The frozen base as `from_pretrained` would give it. `quantization` is "none" (bfloat16), "nf4" or "fp4"."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads,
        rms_norm_eps=1e-5, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        network = LlamaForCausalLM(config).to(torch.bfloat16)
    if quantization != "none":
        bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quantization, bnb_4bit_compute_dtype=compute)
        replace_with_bnb_linear(network, modules_to_not_convert=["lm_head"], quantization_config=bits)
        # What PEFT, Trainer and SFTTrainer know a quantised model by.
        marked: Any = network
        marked.is_loaded_in_4bit, marked.is_quantized = True, True
        marked.quantization_method, marked.config.quantization_config = QuantizationMethod.BITS_AND_BYTES, bits
        marked.hf_quantizer = AutoHfQuantizer.from_config(bits)
    generator = torch.Generator(device).manual_seed(seed)
    for module in network.modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            setattr(module, name, _filled(empty, module=module, generator=generator))
    # Its buffers are computed, not loaded.
    network.model.rotary_emb = type(network.model.rotary_emb)(config).to(device)
    network.requires_grad_(False)
    return network.eval()


def _filled(empty: nn.Parameter, *, module: nn.Module, generator: torch.Generator) -> nn.Parameter:
    shape = empty.shape if not isinstance(module, nn.Linear) else (module.out_features, module.in_features)
    values = torch.ones(shape, dtype=torch.bfloat16, device=generator.device)
    if len(shape) > 1:
        values.normal_(0, WEIGHT_SPREAD, generator=generator)
    if not isinstance(empty, bitsandbytes.nn.Params4bit):
        return nn.Parameter(values, requires_grad=False)
    return bitsandbytes.nn.Params4bit(
        values, requires_grad=False, quant_type=empty.quant_type, compress_statistics=empty.compress_statistics,
        blocksize=empty.blocksize, module=module,
    ).to(generator.device)  # fmt: skip


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Of as many words as the model knows, for code that wants a tokenizer though the rows are tokens already."""
    words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(3, vocabulary))]
    whole = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
