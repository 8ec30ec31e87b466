"""LoRA jobs at a site: what each rule trains, what a site of lower rank does, and rounds of them with real models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from client_agent.taskdir import FILES, UPDATE
from client_agent.training.loading import check_tensors, load_version
from client_agent.training.model import Model
from client_agent.training.warm import Warm
from coordinator.adapter_export import is_plain, write_plain_adapter
from coordinator.aggregation.combine import Combined, Input, combine, read_header
from coordinator.aggregation.lora_rules import fresh_a
from protos.adapters import split_name, trained_factors, update_tensors
from protos.digests import digest_of
from protos.errors import InvalidInput
from protos.jobspec import JobSpec, parse
from protos.tensors import Layout
from tests.unit.client_agent.training.conftest import Site, causal_recipe

RULES = ["mean", "ffa-lora", "rolora", "svd", "flora", "fedex", "fed-sb"]
EXACT = ["ffa-lora", "rolora", "flora", "fedex", "fed-sb"]


def recipe_of(site: Site, rule: str, **method: Any) -> dict[str, Any]:
    lora = {"type": "lora", "rank": 4, "alpha": 8, "targets": ["query", "value"], "dropout": 0.1, **method}
    local = {"steps": 3, "batch_size": 8, "learning_rate": 0.02}
    base = {"name": "tiny-encoder", "layers": 1}
    return site.recipe(method=lora, aggregation={"rule": rule}, base_model=base, local=local)


def spec_of(recipe: dict[str, Any]) -> JobSpec:
    return parse(recipe)


def layout_of(path: Path) -> Layout:
    return read_header(path)[1]


def round_of(
    site: Site, recipe: dict[str, Any], *, number: int, version: Path, weights: dict[str, float], warm: Warm
) -> Combined:  # fmt: skip
    """Trains at each site and combines into version-<number> beside."""
    parts = []
    for name, weight in weights.items():
        task = site.task("train", recipe=recipe, model=version, round=number, site=name, seed=number * 7)
        path = site.run(f"{name}-{number}", task, warm=warm)[0] / UPDATE
        parts.append(Input(name, path, digest_of(path.read_bytes()), weight))
    return combine(
        parts, output=site.directory / f"version-{number}", previous=version,
        previous_digest=digest_of(version.read_bytes()), spec=spec_of(recipe), round_number=number,
    )  # fmt: skip


def logits(model: Model) -> torch.Tensor:
    torch.manual_seed(0)
    ids = torch.randint(4, 20, (3, 9))
    with torch.no_grad():
        return model.network.eval()(input_ids=ids).logits


def warm_model(warm: Warm) -> Model:
    (model,) = warm.models.values()
    return model


@pytest.mark.parametrize("rule", RULES)
def test_two_rounds_of_a_rule_with_sites_of_different_ranks(site: Site, rule: str) -> None:
    recipe = recipe_of(site, rule, ranks={"small": 2})
    spec, warm = spec_of(recipe), Warm()
    version = site.run("init", site.task("init", recipe=recipe), warm=warm)[0] / UPDATE
    for number in (1, 2):
        before = load_file(version)
        result = round_of(
            site, recipe, number=number, version=version, weights={"large": 0.7, "small": 0.3}, warm=warm
        )  # fmt: skip
        for name in ("large", "small"):
            wanted = update_tensors(spec, layout_of(version), round_number=number, site=name)
            assert layout_of(site.directory / f"{name}-{number}" / UPDATE).named == wanted
            update = load_file(site.directory / f"{name}-{number}" / UPDATE)
            moved = {name for name, part in update.items() if not torch.equal(part, cut(before[name], part))}
            assert moved == set(update)
        version = site.directory / f"version-{number}"
        assert 0 <= result.metrics["aggregation_error"] < 1
        # The trainer takes what the coordinator has made.
        _, measured = site.run("look", site.task("evaluate", recipe=recipe, model=version, site="small"), warm=warm)
        assert measured.metrics["loss"] > 0
        after = load_file(version)
        trained = trained_factors(spec, round_number=number)
        fixed = [name for name in before if split_name(name)[1] not in ("", *trained, "fold_A", "fold_B")]
        assert all(torch.equal(before[name], after[name]) for name in fixed)


@pytest.mark.parametrize("rule", EXACT)
def test_an_exact_rule_gives_a_model_whose_weights_are_the_mean_of_the_sites(site: Site, rule: str) -> None:
    recipe, warm = recipe_of(site, rule), Warm()
    version = site.run("init", site.task("init", recipe=recipe), warm=warm)[0] / UPDATE
    for number in (1, 2):
        result = round_of(site, recipe, number=number, version=version, weights={"a": 0.7, "b": 0.3}, warm=warm)
        assert result.metrics["aggregation_error"] < 1e-5
        wanted = None
        for name, weight in (("a", 0.7), ("b", 0.3)):
            whole = load_file(version) | load_file(site.directory / f"{name}-{number}" / UPDATE)
            part = weight * weight_of(whole)
            wanted = part if wanted is None else wanted + part
        version = site.directory / f"version-{number}"
        found = weight_of(load_file(version))
        assert torch.linalg.norm(found - wanted) <= 1e-5 * torch.linalg.norm(wanted)


def cut(whole: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    return whole[tuple(slice(n) for n in part.shape)]


def weight_of(version: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the adapters of a version add to the base model's weights, but for the scale; all layers in a row."""
    found = []
    for name in sorted(version):
        layer, factor = split_name(name)
        if factor == "lora_B":
            b, a = version[name].double(), version[f"{layer}.lora_A.weight"].double()
            total = b @ version[f"{layer}.lora_R.weight"].double() @ a if f"{layer}.lora_R.weight" in version else b @ a
            if f"{layer}.fold_B.weight" in version:
                total += version[f"{layer}.fold_B.weight"].double() @ version[f"{layer}.fold_A.weight"].double()
            found.append(total.reshape(-1))
    return torch.cat(found)


@pytest.mark.parametrize("rule", ["rolora", "flora", "fedex", "fed-sb"])
def test_a_warm_trainer_gives_the_bytes_of_a_cold_one_whatever_it_did_before(site: Site, rule: str) -> None:
    recipe, warm = recipe_of(site, rule, ranks={"small": 2}), Warm()
    version = site.run("init", site.task("init", recipe=recipe), warm=warm)[0] / UPDATE
    round_of(site, recipe, number=1, version=version, weights={"large": 0.5, "small": 0.5}, warm=warm)
    one = site.directory / "version-1"
    round_of(site, recipe, number=2, version=one, weights={"large": 0.5, "small": 0.5}, warm=warm)
    for name, number, start in (("large", 2, one), ("small", 1, version)):
        task = site.task("train", recipe=recipe, model=start, round=number, site=name)
        hot, _ = site.run("hot", task, warm=warm)
        cold, _ = site.run("cold", task, warm=Warm())
        assert (hot / UPDATE).read_bytes() == (cold / UPDATE).read_bytes()


@pytest.mark.parametrize("rule", ["mean", "fed-sb", "fedex"])
def test_a_site_of_lower_rank_works_with_the_whole_model(site: Site, rule: str) -> None:
    recipe, warm = recipe_of(site, rule, ranks={"small": 1}), Warm()
    spec = spec_of(recipe)
    version = site.run("init", site.task("init", recipe=recipe), warm=warm)[0] / UPDATE
    round_of(site, recipe, number=1, version=version, weights={"large": 0.6, "other": 0.4}, warm=warm)
    version = site.directory / "version-1"
    model = warm_model(warm)
    load_version(model, path=version, spec=spec, round_number=2, site=None)
    whole = logits(model)
    load_version(model, path=version, spec=spec, round_number=2, site="small")
    assert torch.allclose(logits(model), whole, atol=1e-6)
    pairs = [tensor for name, tensor in model.federated.items() if split_name(name)[1]]
    assert all(1 in tensor.shape for tensor in pairs)
    # And what it trains is all that its optimizer gets.
    assert sum(p.numel() for p in model.trainable) == sum(t.numel() for t in model.federated.values())


@pytest.mark.parametrize("scale", ["alpha/rank", "rslora"])
def test_plain_peft_gives_an_adapter_the_scale_that_it_was_trained_with(site: Site, scale: str) -> None:
    recipe = recipe_of(site, "mean", scale=scale, dropout=0.0)
    init, _ = site.run("init", site.task("init", recipe=recipe))
    update, _ = site.run("train", site.task("train", recipe=recipe, model=init / UPDATE))
    out = init / FILES
    (out / "adapter_model.safetensors").write_bytes((update / UPDATE).read_bytes())
    base = AutoModelForSequenceClassification.from_pretrained(site.base_model, config=AutoConfig.from_pretrained(out))
    network = PeftModel.from_pretrained(base, out).eval()
    scales = {module.scaling["default"] for module in network.modules() if isinstance(module, LoraLayer)}
    assert scales == {spec_of(recipe).method.factor}
    model = warm_model(site.warm)
    assert torch.equal(logits(replace(model, network=network)), logits(model))


@pytest.mark.parametrize("rule", ["flora", "fedex", "fed-sb", "one layer without a fold"])
def test_an_export_is_a_plain_adapter_that_peft_loads_and_merges(site: Site, rule: str) -> None:
    spare = rule.startswith("one")
    recipe, warm = recipe_of(site, "fedex" if spare else rule, ranks={"small": 2}), Warm()
    init, _ = site.run("init", site.task("init", recipe=recipe), warm=warm)
    version = init / UPDATE
    for number in (1, 2):
        round_of(site, recipe, number=number, version=version, weights={"large": 0.6, "small": 0.4}, warm=warm)
        version = site.directory / f"version-{number}"
    if spare:
        tensors = {name: part for name, part in load_file(version).items() if "query.fold" not in name}
        save_file(tensors, version)
    method, model = spec_of(recipe).method, warm_model(warm)
    load_version(model, path=version, spec=spec_of(recipe), round_number=2, site=None)
    out = init / FILES
    assert not is_plain(spec_of(recipe))
    write_plain_adapter(
        version, config=out / "adapter_config.json", method=method, target=out / "adapter_model.safetensors"
    )  # fmt: skip
    base = AutoModelForSequenceClassification.from_pretrained(site.base_model, config=AutoConfig.from_pretrained(out))
    network: Any = PeftModel.from_pretrained(base, out).eval()
    wanted = logits(model)
    assert torch.allclose(logits(replace(model, network=network)), wanted, atol=1e-5)
    assert torch.allclose(logits(replace(model, network=network.merge_and_unload())), wanted, atol=1e-5)
    # What has been added is not nothing.
    start = AutoModelForSequenceClassification.from_pretrained(site.base_model, config=AutoConfig.from_pretrained(out))
    start.classifier.load_state_dict(network.classifier.state_dict())
    assert not torch.allclose(logits(replace(model, network=start)), wanted, atol=1e-5)


def test_fed_sb_begins_as_the_base_model_between_its_leading_directions(site: Site) -> None:
    recipe = recipe_of(site, "fed-sb")
    init, _ = site.run("init", site.task("init", recipe=recipe))
    version = load_file(init / UPDATE)
    base = load_file(site.base_model / "model.safetensors")
    layer = "encoder.layer.0.attention.self.query"
    a, b, r = (version[f"base_model.model.bert.{layer}.lora_{factor}.weight"] for factor in "ABR")
    assert not r.any()
    assert torch.allclose(a @ a.T, torch.eye(4), atol=1e-5)
    assert torch.allclose(b.T @ b, torch.eye(4), atol=1e-5)
    _, s, _ = torch.linalg.svd(base[f"{layer}.weight"])
    assert torch.allclose((b.T @ base[f"{layer}.weight"] @ a.T).diagonal(), s[:4], rtol=1e-2)


@pytest.mark.parametrize("rule", ["fedex", "fed-sb"])
def test_a_base_model_in_4_bits_stays_as_it_is_under_every_rule(teaching_site: Site, rule: str) -> None:
    site, warm = teaching_site, Warm()
    base = {"name": "tiny-llama", "quantization": "nf4"}
    lora = {"type": "lora", "rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"], "ranks": {"small": 2}}
    local = {"steps": 2, "batch_size": 4, "learning_rate": 0.01}
    recipe = causal_recipe(base_model=base, method=lora, local=local, aggregation={"rule": rule})
    version = site.run("init", site.task("init", recipe=recipe), warm=warm)[0] / UPDATE
    frozen = packed(warm_model(warm))
    for number in (1, 2):
        result = round_of(
            site, recipe, number=number, version=version, weights={"large": 0.6, "small": 0.4}, warm=warm
        )  # fmt: skip
        start, version = version, site.directory / f"version-{number}"
    assert result.metrics["aggregation_error"] < (1e-5 if rule == "fedex" else 1)
    now = packed(warm_model(warm))
    assert frozen
    assert all(torch.equal(frozen[name], now[name]) for name in frozen)
    task = site.task("train", recipe=recipe, model=start, round=2, site="small")
    hot, _ = site.run("hot", task, warm=warm)
    cold, _ = site.run("cold", task, warm=Warm())
    assert (hot / UPDATE).read_bytes() == (cold / UPDATE).read_bytes()


def packed(model: Model) -> dict[str, torch.Tensor]:
    found = model.network.state_dict()
    return {name: tensor.clone() for name, tensor in found.items() if tensor.dtype == torch.uint8}


def test_a_fold_that_fits_no_layer_is_refused_before_anything_changes(site: Site) -> None:
    recipe, warm = recipe_of(site, "fedex"), Warm()
    version = site.run("init", site.task("init", recipe=recipe), warm=warm)[0] / UPDATE
    good = load_file(version)
    layer = "base_model.model.bert.encoder.layer.0.attention.self.query"
    site.run("look", site.task("evaluate", recipe=recipe, model=version), warm=warm)
    model = warm_model(warm)
    for fold in (
        {f"{layer}.fold_A.weight": torch.zeros(3, 32)},
        {f"{layer}.fold_B.weight": torch.zeros(32, 3)},
        {f"{layer}.fold_A.weight": torch.zeros(3, 32), f"{layer}.fold_B.weight": torch.zeros(32, 2)},
        {f"{layer}.fold_A.weight": torch.zeros(3, 31), f"{layer}.fold_B.weight": torch.zeros(32, 3)},
        {"elsewhere.fold_A.weight": torch.zeros(3, 32), "elsewhere.fold_B.weight": torch.zeros(32, 3)},
    ):
        save_file({**good, **fold}, site.directory / "bad")
        with pytest.raises(InvalidInput, match="fold"):
            check_tensors(site.directory / "bad", expected=model.shapes)


def test_a_fresh_factor_has_the_spread_that_peft_gives_it() -> None:
    ours = fresh_a((400, 300), seed=[1])
    theirs = nn.init.kaiming_uniform_(torch.empty(400, 300), a=5**0.5).numpy()
    assert np.abs(ours).max() == pytest.approx(np.abs(theirs).max(), rel=1e-3)
    assert ours.std() == pytest.approx(theirs.std(), rel=1e-2)
