"""Which files a site may add to a model directory beside the tensors: configuration and tokenizer, and the frozen part.

A site makes them and an operator's machine opens them, so nothing among them can be run, none has a directory part, and
none takes the place of a file that an export writes itself.
"""

from __future__ import annotations

import re

from protos.errors import InvalidInput

FROZEN = "frozen.safetensors"
EXPORT_MANIFEST = "silotune.json"
FULL_TENSORS, ADAPTER_TENSORS = "model.safetensors", "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
# What a base model is: weights, and what stands for the model besides them. A change of any of them changes its digest.
BASE_WEIGHTS = "*.safetensors"
BASE_INDEX = "model.safetensors.index.json"
BASE_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    BASE_INDEX,
)
BASE_MODEL_NAME = re.compile(r"(?=.{1,128}$)[A-Za-z0-9][A-Za-z0-9._\-]*(/[A-Za-z0-9][A-Za-z0-9._\-]*)*")
_RESERVED = {EXPORT_MANIFEST, FULL_TENSORS, ADAPTER_TENSORS, "readme.md"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,120}\.(json|txt|model|jinja|safetensors)")


def check_base_file(name: str) -> str:
    """`name` if it is one of the files of a base model. InvalidInput otherwise."""
    if name not in BASE_COMPANIONS and not (_NAME.fullmatch(name) and name.endswith(".safetensors")):
        raise InvalidInput(f"{name[:120]!r} is not a file of a base model.")
    return name


def check_file_name(name: str) -> str:
    """`name` if a model directory may have such a file. InvalidInput otherwise."""
    # Some file systems do not tell upper case from lower case.
    if not _NAME.fullmatch(name) or name.lower() in _RESERVED:
        raise InvalidInput(f"{name[:120]!r} is not a file name that a site may add to a model directory.")
    return name
