from __future__ import annotations

import os
from pathlib import Path

import pytest

from client_agent.hashing import PIECE_BYTES, hash_file
from protos.digests import digest_of


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, PIECE_BYTES + 17])
def test_a_file_has_the_digest_of_its_bytes(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    assert hash_file(tmp_path / "file").hexdigest() == digest_of(content)
