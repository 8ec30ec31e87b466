from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from coordinator import export
from coordinator.client import OperatorClient, load_profile
from protos import jobspec, tensors
from protos.errors import AlreadyExists, CorruptData, InvalidInput, NotFound, Unavailable
from protos.v1 import manifest_pb2, operator_pb2

FIELDS = {
    "name": "questions",
    "task": {"type": "classification", "labels": ["cause", "symptom"]},
    "data": {"name": "passages"},
    "base_model": {"name": "minilm"},
    "local": {"steps": 2},
    "rounds": 5,
}
SYNTHETIC = {"name": "noise", "task": {"type": "synthetic"}, "local": {"steps": 2}, "rounds": 5}


def tensor_file(values: dict[str, np.ndarray]) -> bytes:
    header, layout = tensors.make_header((name, "F32", value.shape) for name, value in values.items())
    return header + b"".join(values[spec.name].tobytes() for spec in layout.tensors)


def ramp(*shape: int, start: float = 0.0) -> np.ndarray:
    return (np.arange(np.prod(shape), dtype=np.float32) + np.float32(start)).reshape(shape)


def offer(
    door: Any, *, fields: dict[str, Any] = FIELDS, version: int = 3, model: bytes = b"", files: dict[str, bytes]
) -> operator_pb2.GetModelResponse:
    """Makes the coordinator hold this version, and returns what it says about it."""
    model = model or tensor_file({"head.weight": ramp(2, 3), "body.weight": ramp(400, 3000)})
    door.models[version] = operator_pb2.GetModelResponse(
        job_id="j1",
        version=version,
        model=door.add_blob(model),
        files=[manifest_pb2.FileRef(name=name, blob=door.add_blob(content)) for name, content in files.items()],
        base_digest="b" * 64,
        spec_json=jobspec.parse(fields).canonical_json,
    )
    return door.models[version]


@pytest.fixture
def take(door: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`silotune model export` into tmp_path/model, or a directory of that name elsewhere."""
    monkeypatch.setattr(export.time, "sleep", lambda _: None)

    def run(*, version: int | None = None, force: bool = False, name: str = "model") -> Path:
        with OperatorClient(load_profile(door.profile())) as client:
            export.export(
                client, job="j1", version=version, directory=tmp_path / name, force=force, show_progress=False
            )
        return tmp_path / name

    return run


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_federated_and_frozen_tensors_become_one_file(door: Any, take: Any):
    frozen = tensor_file({"aaa.frozen": ramp(5, start=7), "zzz.frozen": ramp(2, 2, start=9)})
    offer(door, files={"config.json": b"{}", "frozen.safetensors": frozen})
    directory = take()
    assert names_in(directory) == ["README.md", "config.json", "model.safetensors", "silotune.json"]
    loaded = load_file(directory / "model.safetensors")
    assert sorted(loaded) == ["aaa.frozen", "body.weight", "head.weight", "zzz.frozen"]
    np.testing.assert_array_equal(loaded["body.weight"], ramp(400, 3000))
    np.testing.assert_array_equal(loaded["zzz.frozen"], ramp(2, 2, start=9))


def test_a_version_without_frozen_tensors_is_written_byte_for_byte(door: Any, take: Any):
    told = offer(door, files={"config.json": b"{}"})
    directory = take()
    assert (directory / "model.safetensors").read_bytes() == door.blobs[told.model.digest]
    facts = json.loads((directory / "silotune.json").read_text())
    assert facts["files"]["model.safetensors"]["digest"] == told.model.digest == facts["version_digest"]


def test_frozen_buffers_may_be_of_any_type(tmp_path: Path):
    (tmp_path / "federated").write_bytes(tensor_file({"weight": ramp(3)}))
    save_file({"position_ids": np.arange(5), "mask": np.array([True, False])}, tmp_path / "frozen")
    export.join([tmp_path / "federated", tmp_path / "frozen"], target=tmp_path / "joined")
    loaded = load_file(tmp_path / "joined")
    assert {name: value.tolist() for name, value in loaded.items()} == {
        "mask": [True, False],
        "position_ids": [0, 1, 2, 3, 4],
        "weight": [0.0, 1.0, 2.0],
    }


def joined_with(tmp_path: Path, entries: Any) -> None:
    """Joins a sound file with one of 8 bytes of data below this table of contents."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    (tmp_path / "sound").write_bytes(tensor_file({"weight": ramp(3)}))
    (tmp_path / "frozen").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    export.join([tmp_path / "sound", tmp_path / "frozen"], target=tmp_path / "joined")


@pytest.mark.parametrize(
    "offsets",
    [[[0, 99]], [[8, 0]], [[-8, 0]], [[0, 8], [0, 8]], [[4, 8]], [[0, 4]], [["0", "8"]], [[0.0, 8.0]], [[8]], [None]],
)
def test_a_frozen_file_whose_header_lies_is_refused(tmp_path: Path, offsets: list[Any]):
    entries = {f"t{n}": {"dtype": "U8", "shape": [8], "data_offsets": each} for n, each in enumerate(offsets)}
    with pytest.raises(CorruptData, match="frozen"):
        joined_with(tmp_path, entries)
    assert not (tmp_path / "joined").exists()


@pytest.mark.parametrize("entries", [b"no json", b"[" * 100_000, [], 3, None, {"t": 5}, {"t": {}}])
def test_a_frozen_file_without_a_table_of_contents_is_refused(tmp_path: Path, entries: Any):
    with pytest.raises(CorruptData, match="frozen is not a table of tensors"):
        joined_with(tmp_path, entries)


def test_an_adapter_keeps_its_name(door: Any, take: Any):
    offer(door, fields={**FIELDS, "method": {"type": "lora"}}, files={"adapter_config.json": b"{}"})
    directory = take()
    assert names_in(directory) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "silotune.json"]


def test_what_stands_between_or_beside_the_factors_becomes_part_of_a_plain_adapter(door: Any, take: Any):
    random = np.random.default_rng(3)
    shapes = {
        "m.q.lora_A.weight": (2, 5), "m.q.lora_B.weight": (4, 2), "m.q.fold_A.weight": (3, 5),
        "m.q.fold_B.weight": (4, 3), "m.v.lora_A.weight": (2, 5), "m.v.lora_B.weight": (4, 2), "score": (2, 4),
    }  # fmt: skip
    version = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    fields = {**FIELDS, "method": {"type": "lora", "rank": 2, "alpha": 6}, "aggregation": {"rule": "fedex"}}
    offer(door, fields=fields, model=tensor_file(version), files={"adapter_config.json": b'{"r": 2, "lora_alpha": 6}'})
    directory = take()
    found = load_file(directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text())
    assert found.keys() == {name for name in shapes if "fold" not in name}
    assert np.array_equal(found["score"], version["score"])
    for layer in ("m.q", "m.v"):
        b, a = found[f"{layer}.lora_B.weight"], found[f"{layer}.lora_A.weight"]
        rank, alpha = (
            config["rank_pattern"].get(layer, config["r"]),
            config["alpha_pattern"].get(layer, config["lora_alpha"]),
        )
        wanted = version[f"{layer}.lora_B.weight"] @ version[f"{layer}.lora_A.weight"]
        if layer == "m.q":
            wanted = wanted + version["m.q.fold_B.weight"] @ version["m.q.fold_A.weight"]
        assert rank == a.shape[0] == b.shape[1]
        assert np.allclose(alpha / rank * b @ a, 3 * wanted, atol=1e-5)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_controls_of_scaffold_stay_behind(door: Any, take: Any, method: str, frozen: bool):
    model = {"body.weight": ramp(4, 3), "head.weight": ramp(2, 3)}
    version = {**model, **{f"control.{name}": ramp(*values.shape) for name, values in model.items()}}
    files = {"frozen.safetensors": tensor_file({"words.weight": ramp(3)})} if frozen and method == "full" else {}
    fields = {
        **FIELDS, "method": {"type": method}, "local": {"steps": 2, "optimizer": "sgd"},
        "aggregation": {"rule": "scaffold"},
    }  # fmt: skip
    offer(door, fields=fields, model=tensor_file(version), files=files)
    found = load_file(take() / ("model.safetensors" if method == "full" else "adapter_model.safetensors"))
    assert found.keys() == model.keys() | ({"words.weight"} if files else set())
    for name, values in model.items():
        assert np.array_equal(found[name], values)


def test_an_adapter_without_a_readable_configuration_is_refused(door: Any, take: Any):
    fields = {**FIELDS, "method": {"type": "lora", "rank": 1}, "aggregation": {"rule": "fedex"}}
    version = tensor_file({"q.lora_A.weight": ramp(1, 2), "q.lora_B.weight": ramp(2, 1)})
    for files in ({}, {"adapter_config.json": b"[1]"}, {"adapter_config.json": b"{"}):
        offer(door, fields=fields, model=version, files=files)
        with pytest.raises(CorruptData, match=r"adapter_config\.json"):
            take(force=True)


def test_a_synthetic_model_has_no_card(door: Any, take: Any):
    offer(door, fields=SYNTHETIC, files={})
    assert names_in(take()) == ["model.safetensors", "silotune.json"]


def test_two_files_may_have_the_same_bytes(door: Any, take: Any):
    offer(door, files={"config.json": b"{}", "special_tokens_map.json": b"{}"})
    directory = take()
    assert (directory / "config.json").read_text() == (directory / "special_tokens_map.json").read_text() == "{}"


def test_a_lost_connection_is_taken_up_where_it_broke(door: Any, take: Any):
    told = offer(door, files={})
    offsets: list[int] = []
    door.on_read = lambda digest, offset: offsets.append(offset)
    broken = iter([False, False, True])

    def on_frame(frame: bytes) -> bytes:
        if next(broken, False):
            raise ConnectionError
        return frame

    door.on_frame = on_frame
    directory = take()
    assert offsets == [0, 2 << 20]
    assert (directory / "model.safetensors").read_bytes() == door.blobs[told.model.digest]


def test_an_interrupted_export_goes_on_without_being_forced(door: Any, take: Any):
    offer(door, files={})
    offsets: list[int] = []
    door.on_read = lambda digest, offset: offsets.append(offset)
    first = iter([True])

    def on_frame(frame: bytes) -> bytes:
        if next(first, False):
            return frame
        raise ConnectionError

    door.on_frame = on_frame
    with pytest.raises(Unavailable):
        take()
    assert offsets == [0, *[1 << 20] * export.ATTEMPTS]
    offsets.clear()
    door.on_frame = None
    assert "model.safetensors" in names_in(take())
    assert offsets == [1 << 20]


def test_bytes_that_do_not_match_their_digest_are_thrown_away(door: Any, take: Any):
    told = offer(door, files={})
    good = door.blobs[told.model.digest]
    door.blobs[told.model.digest] = good[:-1] + b"\xff"
    with pytest.raises(CorruptData, match="does not match its digest"):
        take()
    door.blobs[told.model.digest] = good
    assert (take() / "model.safetensors").read_bytes() == good


def test_a_directory_with_something_else_in_it_is_left_alone(door: Any, take: Any, tmp_path: Path):
    offer(door, files={})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("years of work")
    with pytest.raises(AlreadyExists, match="is not empty and not an earlier export"):
        take(force=True)
    assert names_in(tmp_path / "model") == ["thesis.txt"]


def test_an_earlier_export_is_replaced_only_by_force(door: Any, take: Any):
    offer(door, version=2, files={"config.json": b"{}", "vocab.txt": b"a"})
    take()
    offer(door, version=3, files={"config.json": b'{"new": 1}'})
    with pytest.raises(AlreadyExists, match="holds version 2 of job j1"):
        take()
    directory = take(force=True)
    assert names_in(directory) == ["README.md", "config.json", "model.safetensors", "silotune.json"]
    assert (directory / "config.json").read_text() == '{"new": 1}'


def test_a_round_can_be_chosen(door: Any, take: Any):
    offer(door, version=0, files={"config.json": b"0"})
    offer(door, version=3, files={"config.json": b"3"})
    assert (take(version=0, name="first") / "config.json").read_text() == "0"
    assert (take(name="best") / "config.json").read_text() == "3"
    with pytest.raises(NotFound):
        take(version=9, name="none")


@pytest.mark.parametrize(
    "name", ["../escape.json", "modeling.py", "pytorch_model.bin", "silotune.json", "model.safetensors"]
)
def test_a_file_that_no_model_needs_is_refused(door: Any, take: Any, tmp_path: Path, name: str):
    offer(door, files={name: b"import os"})
    with pytest.raises(InvalidInput, match="is not a file name"):
        take()
    assert not (tmp_path / "model").exists()


def test_a_tensor_that_is_federated_and_frozen_is_refused(door: Any, take: Any):
    offer(door, files={"frozen.safetensors": tensor_file({"head.weight": ramp(2, 3)})})
    with pytest.raises(CorruptData, match=r"'head.weight' is both federated and frozen"):
        take()


LOAD = """
import sys
import numpy as np
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoConfig, AutoModelForSequenceClassification

whole, report = AutoModelForSequenceClassification.from_pretrained("whole", output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"], report
base = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained("adapter"))
adapted = get_peft_model_state_dict(PeftModel.from_pretrained(base, "adapter"))
for loaded, name in ((dict(whole.named_parameters()), "whole.npz"), (adapted, "adapter.npz")):
    expected = np.load(name)
    assert sorted(loaded) == sorted(expected), sorted(loaded)
    for key in expected:
        np.testing.assert_array_equal(loaded[key].detach().numpy(), expected[key], err_msg=key)
assert not [name for name in sys.modules if name.split(".")[0] in ("coordinator", "protos", "client_agent")]
"""
HIDDEN, LABELS = 8, 2
CONFIG = {
    "model_type": "bert",
    "vocab_size": 20,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": HIDDEN,
    "max_position_embeddings": 16,
}
ADAPTER_CONFIG = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": 2, "target_modules": ["query"]}


def tiny_bert() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(trained, frozen) tensors of a one-layer BERT classifier whose embeddings were frozen."""
    layer = "bert.encoder.layer.0"
    linears = [f"{layer}.attention.self.{name}" for name in ("query", "key", "value")]
    linears += [f"{layer}.{name}.dense" for name in ("attention.output", "intermediate", "output")]
    norms = [f"{layer}.{name}.LayerNorm" for name in ("attention.output", "output")]
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.weight": (HIDDEN, HIDDEN) for name in [*linears, "bert.pooler.dense"]
    }
    shapes |= {f"{name}.weight": (HIDDEN,) for name in norms}
    shapes |= {f"{name}.bias": (HIDDEN,) for name in [*linears, *norms, "bert.pooler.dense"]}
    shapes |= {"classifier.weight": (LABELS, HIDDEN), "classifier.bias": (LABELS,)}
    rows = {"word_embeddings": 20, "position_embeddings": 16, "token_type_embeddings": 2}
    frozen = {f"bert.embeddings.{name}.weight": (count, HIDDEN) for name, count in rows.items()}
    frozen |= {f"bert.embeddings.LayerNorm.{name}": (HIDDEN,) for name in ("weight", "bias")}
    random = np.random.default_rng(1)
    return tuple(  # type: ignore[return-value]
        {name: random.standard_normal(shape, dtype=np.float32) for name, shape in part.items()}
        for part in (shapes, frozen)
    )


def tiny_adapter() -> dict[str, np.ndarray]:
    random = np.random.default_rng(2)
    query = "base_model.model.bert.encoder.layer.0.attention.self.query"
    shapes = {
        f"{query}.lora_A.weight": (2, HIDDEN),
        f"{query}.lora_B.weight": (HIDDEN, 2),
        "base_model.model.classifier.weight": (LABELS, HIDDEN),
        "base_model.model.classifier.bias": (LABELS,),
    }
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def test_transformers_and_peft_open_what_was_exported(door: Any, take: Any, tmp_path: Path):
    config = json.dumps(CONFIG).encode()
    trained, frozen = tiny_bert()
    offer(door, model=tensor_file(trained), files={"config.json": config, "frozen.safetensors": tensor_file(frozen)})
    take(name="whole")
    np.savez(tmp_path / "whole.npz", **trained, **frozen)

    adapter = tiny_adapter()
    files = {"config.json": config, "adapter_config.json": json.dumps(ADAPTER_CONFIG).encode()}
    offer(door, fields={**FIELDS, "method": {"type": "lora", "rank": 2}}, model=tensor_file(adapter), files=files)
    take(name="adapter")
    np.savez(tmp_path / "adapter.npz", **adapter)

    # In a process that has no silotune.
    subprocess.run([sys.executable, "-c", LOAD], check=True, cwd=tmp_path)
