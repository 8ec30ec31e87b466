from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from client_agent.models import Models
from protos.errors import AlreadyExists, InvalidInput, NotFound
from tests.unit.client_agent.work_to_do import model_bytes


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A base model of 50,000 parameters or so."""
    path = tmp_path / "minilm"
    path.mkdir()
    (path / "model.safetensors").write_bytes(model_bytes(0.2))
    (path / "config.json").write_text(json.dumps({"hidden_size": 64, "num_hidden_layers": 2}))
    (path / "tokenizer.json").write_text("{}")
    return path


def test_a_model_is_known_by_name_with_its_facts(tmp_path: Path, directory: Path) -> None:
    models = Models(tmp_path / "models.json")
    added = models.add("org/minilm", directory)
    assert models.all() == [added]
    assert models.current("org/minilm") == added
    assert (added.hidden_size, added.layers) == (64, 2)
    assert added.parameters == pytest.approx(50_000, rel=0.01)
    assert added.directory == str(directory)


def test_the_digest_depends_on_weights_config_and_tokenizer_and_on_nothing_else(
    tmp_path: Path, directory: Path
) -> None:
    models = Models(tmp_path / "models.json")
    before = models.add("minilm", directory).digest
    (directory / "README.md").write_text("nothing that is loaded")
    (directory / "modeling.py").write_text("raise SystemExit")
    assert models.add("minilm", directory).digest == before
    (directory / "tokenizer.json").write_text('{"changed": true}')
    assert models.current("minilm").digest != before


def test_a_changed_file_is_found_by_its_size_or_time(tmp_path: Path, directory: Path) -> None:
    models = Models(tmp_path / "models.json")
    before = models.add("minilm", directory)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    os.utime(weights, ns=(0, 0))
    changed = models.current("minilm")
    assert changed.digest != before.digest
    assert models.all() == [changed]


def test_a_name_does_not_silently_change_its_meaning(tmp_path: Path, directory: Path) -> None:
    models = Models(tmp_path / "models.json")
    models.add("minilm", directory)
    (directory / "config.json").write_text('{"hidden_size": 65}')
    with pytest.raises(AlreadyExists, match="another digest"):
        models.add("minilm", directory)


def test_a_directory_without_safetensors_is_refused_with_the_reason(tmp_path: Path, directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(InvalidInput, match=r"holds no \.safetensors weights") as error:
        Models(tmp_path / "models.json").add("minilm", directory)
    assert "may run code" in error.value.hint


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("model.safetensors", b"not a tensor file", "not a safetensors file"),
        ("config.json", b"{", "is not JSON"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, directory: Path, name: str, content: bytes, reason: str) -> None:
    (directory / name).write_bytes(content)
    with pytest.raises(InvalidInput, match=reason):
        Models(tmp_path / "models.json").add("minilm", directory)


def test_a_missing_model_says_how_to_add_it(tmp_path: Path) -> None:
    with pytest.raises(NotFound) as error:
        Models(tmp_path / "models.json").current("minilm")
    assert "silotune-agent model add minilm" in error.value.hint


def test_a_name_that_climbs_out_of_the_home_is_no_name(tmp_path: Path, directory: Path) -> None:
    for name in ("../minilm", "a/../../b", "", "a b"):
        with pytest.raises(InvalidInput, match="not a model name"):
            Models(tmp_path / "models.json").add(name, directory)
