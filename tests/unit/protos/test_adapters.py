"""What travels in a LoRA job is one function of the recipe, the version, the round and the site."""

from __future__ import annotations

from typing import Any

import pytest

from protos import jobspec
from protos.adapters import split_name, update_tensors, with_controls
from protos.tensors import Layout, make_header

M, N, R = 6, 4, 3
LAYER = "base_model.model.layers.0.self_attn.q_proj"
HEAD = "base_model.model.score.weight"


def spec(rule: str, **method: Any) -> jobspec.JobSpec:
    return jobspec.parse(
        {
            "name": "letters",
            "rounds": 4,
            "task": {"type": "classification", "labels": ["a", "b"]},
            "data": {"name": "letters"},
            "base_model": {"name": "minilm"},
            "local": {"steps": 1},
            "method": {"type": "lora", "rank": R, **method},
            "aggregation": {"rule": rule},
        }
    )


def version(*factors: str) -> Layout:
    shapes = {
        "lora_A": (R, N),
        "lora_B": (M, R),
        "lora_R": (R, R),
        "fold_A": (5, N),
        "fold_B": (M, 5),
    }
    named = [(f"{LAYER}.{factor}.weight", "F32", shapes[factor]) for factor in factors]
    return make_header([*named, (HEAD, "F32", (2, N))])[1]


def travels(rule: str, *factors: str, round_number: int = 1, site: str = "oslo", **method: Any) -> dict[str, Any]:
    found = update_tensors(spec(rule, **method), version(*factors), round_number=round_number, site=site)
    return {split_name(name)[1] or "head": shape for name, _, shape in found}


@pytest.mark.parametrize("rule", ["mean", "svd", "flora", "fedex"])
def test_both_factors_and_the_head_travel_and_what_is_folded_does_not(rule: str) -> None:
    found = travels(rule, "lora_A", "lora_B", "fold_A", "fold_B")
    assert found == {"lora_A": (R, N), "lora_B": (M, R), "head": (2, N)}


def test_ffa_sends_b_alone() -> None:
    assert travels("ffa-lora", "lora_A", "lora_B", round_number=2) == {"lora_B": (M, R), "head": (2, N)}


def test_rolora_sends_b_in_odd_rounds_and_a_in_even_ones() -> None:
    assert travels("rolora", "lora_A", "lora_B", round_number=1) == {"lora_B": (M, R), "head": (2, N)}
    assert travels("rolora", "lora_A", "lora_B", round_number=2) == {"lora_A": (R, N), "head": (2, N)}


def test_fed_sb_sends_the_small_matrix() -> None:
    assert travels("fed-sb", "lora_A", "lora_B", "lora_R") == {"lora_R": (R, R), "head": (2, N)}


def test_a_site_of_lower_rank_sends_the_leading_part() -> None:
    assert travels("mean", "lora_A", "lora_B", ranks={"oslo": 2}) == {
        "lora_A": (2, N),
        "lora_B": (M, 2),
        "head": (2, N),
    }
    assert travels("fed-sb", "lora_A", "lora_B", "lora_R", ranks={"oslo": 2})["lora_R"] == (2, 2)
    assert travels("mean", "lora_A", "lora_B", site="bergen", ranks={"oslo": 2})["lora_A"] == (R, N)


def test_a_full_job_sends_everything_whatever_it_is_called() -> None:
    full = jobspec.parse({**spec("mean").model_dump(mode="json"), "method": {"type": "full"}})
    assert len(update_tensors(full, version("lora_A", "fold_A"), round_number=1, site="oslo")) == 3


def test_a_tensor_whose_name_only_looks_like_a_factor_belongs_to_no_adapter() -> None:
    assert split_name("classifier.lora_A.bias") == ("classifier.lora_A.bias", "")
    assert split_name("lora_Another.weight") == ("lora_Another.weight", "")


@pytest.mark.parametrize("method", [{"type": "full"}, {"type": "lora", "rank": R}])
def test_scaffold_has_a_control_beside_each_tensor_that_travels_down_alone(method: dict[str, Any]) -> None:
    fields = spec("mean").model_dump(mode="json")
    local = {"steps": 1, "optimizer": "sgd"}
    recipe = jobspec.parse({**fields, "local": local, "method": method, "aggregation": {"rule": "scaffold"}})
    plain = version("lora_A", "lora_B").named
    found = with_controls(recipe, plain)
    assert {name: shape for name, _, shape in found} == {
        **{name: shape for name, _, shape in plain},
        **{f"control.{name}": shape for name, _, shape in plain},
    }
    assert found == sorted(found)
    assert update_tensors(recipe, make_header(found)[1], round_number=1, site="oslo") == plain
    assert with_controls(spec("mean"), plain) == plain
    # It is no factor of an adapter.
    assert split_name(f"control.{LAYER}.lora_A.weight") == (f"control.{LAYER}.lora_A.weight", "")
