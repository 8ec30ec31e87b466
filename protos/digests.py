"""BLAKE3 names of blobs, specs and base models."""

from __future__ import annotations

import re
from collections.abc import Iterable

from blake3 import blake3

from protos.errors import InvalidInput

DIGEST = re.compile(r"[0-9a-f]{64}")


def new_hasher() -> blake3:
    """A streaming BLAKE3; `.update(buffer)` any number of times, then `.hexdigest()`."""
    return blake3()


def digest_of(data: bytes) -> str:
    return blake3(data).hexdigest()


def check_digest(text: str) -> str:
    """`text` if it has the form of a digest; InvalidInput otherwise."""
    if not DIGEST.fullmatch(text):
        raise InvalidInput(f"{text[:80]!r} is not a digest: 64 lower-case hexadecimal digits are expected.")
    return text


def base_model_digest(files: Iterable[tuple[str, int, str]]) -> str:
    """Names a base model by its content: BLAKE3 over the sorted lines `path NUL size NUL digest`.

    `files` are the weights, config, tokenizer and chat template: (relative path, bytes, digest).
    """
    hasher = blake3()
    for path, size, digest in sorted(files):
        hasher.update(f"{path}\0{size}\0{digest}\n".encode())
    return hasher.hexdigest()
