"""A digest names content, and nothing but content."""

from __future__ import annotations

import pytest

from protos import digests
from protos.errors import InvalidInput

FILES = [("config.json", 10, "a" * 64), ("model.safetensors", 20, "b" * 64)]


def test_a_digest_is_blake3() -> None:
    assert digests.digest_of(b"") == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"


def test_a_stream_has_the_digest_of_its_whole() -> None:
    hasher = digests.new_hasher()
    for piece in (b"ab", memoryview(b"cd"), bytearray(b"")):
        hasher.update(piece)
    assert hasher.hexdigest() == digests.digest_of(b"abcd")


@pytest.mark.parametrize("text", ["", "a" * 63, "a" * 65, "A" * 64, "g" * 64, "a" * 64 + "\n", "../" + "a" * 61])
def test_a_text_of_another_form_is_no_digest(text: str) -> None:
    with pytest.raises(InvalidInput, match="is not a digest"):
        digests.check_digest(text)


def test_a_base_model_has_one_name_in_any_order_of_its_files() -> None:
    assert digests.base_model_digest(FILES) == digests.base_model_digest(reversed(FILES))
    assert digests.base_model_digest(FILES) == "291026081f7613da007636e480a0fadde9628c8928073386fd550c70edb5557c"


@pytest.mark.parametrize("changed", [("config.json", 10, "c" * 64), ("config.json", 11, "a" * 64), ("c", 10, "a" * 64)])
def test_any_change_of_a_file_gives_another_name(changed: tuple[str, int, str]) -> None:
    assert digests.base_model_digest([changed, FILES[1]]) != digests.base_model_digest(FILES)
