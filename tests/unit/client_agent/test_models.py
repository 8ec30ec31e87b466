from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from client_agent.models import LinearLayers, Models
from protos.errors import AlreadyExists, InvalidInput, NotFound
from protos.tensors import make_header
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


def lay_out(directory: Path, shapes: dict[str, tuple[int, ...]], *, config: dict[str, int]) -> Path:
    """A model directory with tensors of these shapes."""
    directory.mkdir(parents=True)
    header, layout = make_header((name, "F32", shape) for name, shape in shapes.items())
    (directory / "model.safetensors").write_bytes(header + bytes(layout.data_bytes))
    (directory / "config.json").write_text(json.dumps(config))
    return directory


SHAPES = {
    "model.embed_tokens.weight": (100, 8),
    "model.layers.0.mlp.up_proj.weight": (16, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.1.mlp.up_proj.weight": (16, 8),
    "model.layers.1.self_attn.q_proj.weight": (8, 8),
    "lm_head.weight": (100, 8),
}


def test_the_linear_layers_are_known_by_path_and_shape(tmp_path: Path) -> None:
    model = Models(tmp_path / "models.json").add("m", lay_out(tmp_path / "m", SHAPES, config={"vocab_size": 100}))
    assert model.linear == (
        LinearLayers("lm_head", 100, 8, 1),
        LinearLayers("model.layers.*.mlp.up_proj", 16, 8, 2),
        LinearLayers("model.layers.*.self_attn.q_proj", 8, 8, 2),
    )
    assert model.vocabulary == 100
    assert Models(tmp_path / "models.json").all() == [model]


def test_an_entry_of_the_release_before_gets_its_layers_and_keeps_its_digest(tmp_path: Path) -> None:
    file = tmp_path / "models.json"
    model = Models(file).add("m", lay_out(tmp_path / "m", SHAPES, config={"vocab_size": 100}))
    entry = json.loads(file.read_text())["m"]
    for name in ("linear", "vocabulary", "hub", "revision"):
        del entry[name]
    file.write_text(json.dumps({"m": {**entry, "digest": "e" * 64}}))
    assert Models(file).all() == [replace(model, digest="e" * 64)]
    assert "linear" in json.loads(file.read_text())["m"]


def test_an_old_entry_whose_directory_is_gone_is_still_listed(tmp_path: Path) -> None:
    file = tmp_path / "models.json"
    Models(file).add("m", lay_out(tmp_path / "m", SHAPES, config={}))
    entry = json.loads(file.read_text())["m"]
    del entry["linear"], entry["vocabulary"]
    file.write_text(json.dumps({"m": {**entry, "directory": str(tmp_path / "gone")}}))
    assert [model.linear for model in Models(file).all()] == [()]


def test_a_model_of_which_a_shard_is_missing_is_refused(tmp_path: Path) -> None:
    directory = lay_out(tmp_path / "m", SHAPES, config={})
    shards = dict.fromkeys(SHAPES, "model.safetensors") | {"model.norm.weight": "model-00002-of-00002.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(InvalidInput, match="lacks model-00002-of-00002"):
        Models(tmp_path / "models.json").add("m", directory)


def test_where_a_model_came_from_is_remembered_for_as_long_as_it_is_the_same(tmp_path: Path) -> None:
    directory = lay_out(tmp_path / "m", SHAPES, config={})
    models = Models(tmp_path / "models.json")
    models.add("m", directory, hub="org/m", revision="c0ffee")
    os.utime(directory / "config.json", ns=(0, 0))
    assert (models.current("m").hub, models.current("m").revision) == ("org/m", "c0ffee")
    (directory / "config.json").write_text('{"hidden_size": 9}')
    assert (models.current("m").hub, models.current("m").revision) == ("", "")


def test_a_missing_model_says_how_to_add_it(tmp_path: Path) -> None:
    with pytest.raises(NotFound) as error:
        Models(tmp_path / "models.json").current("minilm")
    assert "silotune-agent model add minilm" in error.value.hint


def test_a_name_that_climbs_out_of_the_home_is_no_name(tmp_path: Path, directory: Path) -> None:
    for name in ("../minilm", "a/../../b", "", "a b"):
        with pytest.raises(InvalidInput, match="not a model name"):
            Models(tmp_path / "models.json").add(name, directory)
