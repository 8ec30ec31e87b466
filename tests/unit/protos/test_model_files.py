"""What a site may add to a model directory is a closed kind of file, and never takes another one's place."""

from __future__ import annotations

import pytest

from protos.errors import InvalidInput
from protos.model_files import FROZEN, check_file_name


@pytest.mark.parametrize(
    "name",
    [
        FROZEN,
        "config.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        "sentencepiece.bpe.model",
        "chat_template.jinja",
    ],
)
def test_configuration_tokenizer_and_frozen_tensors_are_allowed(name: str) -> None:
    assert check_file_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "", "..", ".json", "../config.json", "a/config.json", "config.json\n", "modeling.py", "pytorch_model.bin", "x",
        "model.safetensors", "adapter_model.safetensors", "silotune.json", "README.md", "Model.safetensors", "a" * 300,
    ],
)  # fmt: skip
def test_what_could_run_or_lies_elsewhere_or_is_an_exports_own_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="is not a file name"):
        check_file_name(name)
