"""BLAKE3 of files, read in pieces: a mapped file would count its whole size as the agent's memory."""

from __future__ import annotations

from pathlib import Path

from blake3 import blake3

from protos.digests import new_hasher

PIECE_BYTES = 4 << 20


def hash_file(path: Path) -> blake3:
    """The hasher after all bytes of the file, ready for `.hexdigest()` or for more. Blocks while it reads."""
    hasher = new_hasher()
    piece = memoryview(bytearray(PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            hasher.update(piece[:count])
    return hasher
