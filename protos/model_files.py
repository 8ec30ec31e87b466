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
_RESERVED = {EXPORT_MANIFEST, FULL_TENSORS, ADAPTER_TENSORS, "readme.md"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,120}\.(json|txt|model|jinja|safetensors)")


def check_file_name(name: str) -> str:
    """`name` if a model directory may have such a file. InvalidInput otherwise."""
    # Some file systems do not tell upper case from lower case.
    if not _NAME.fullmatch(name) or name.lower() in _RESERVED:
        raise InvalidInput(f"{name[:120]!r} is not a file name that a site may add to a model directory.")
    return name
