"""The memory estimate for Llama-3-8B, against the arithmetic by hand."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.footprint import Footprint, footprint
from protos import jobspec
from tests.unit.coordinator.shapes import LLAMA_3_8B

# All linear layers but the output; with the embeddings, the output layer and the norms that is all there is.
INNER = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14_336 * 4096)
REST = 8_030_261_248 - INNER
ADAPTERS = 13_631_488
TOKENS = 16 * 512


def needs(
    *, on_gpu: bool = True, gpus: int = 1, micro_batch: int = 16, fold: int = 0, **tables: dict[str, Any]
) -> Footprint:
    base = {"name": "llama", "dtype": "bfloat16", **tables.get("base_model", {})}
    local = {"steps": 10, "batch_size": 16, **tables.get("local", {})}
    method = {"type": "lora", "rank": 32, "targets": ["q_proj", "v_proj"], **tables.get("method", {})}
    recipe = jobspec.parse(
        {
            "name": "j",
            "task": {"type": "causal-lm", "max_length": 512},
            "data": {"name": "d"},
            "base_model": base,
            "method": method,
            "local": local,
            "aggregation": tables.get("aggregation", {}),
            "evaluation": {"metric": "loss"},
            "rounds": 2,
        }
    )
    return footprint(
        recipe, LLAMA_3_8B, on_gpu=on_gpu, gpus=gpus, site="st-olav", micro_batch=micro_batch, rows=1000, fold=fold
    )


@pytest.mark.parametrize(
    ("base", "weights"),
    [
        ({}, 2 * (INNER + REST)),
        ({"quantization": "nf4"}, INNER * (0.5 + 4 / 64) + 2 * REST + 2 * 14_336 * 4096),
        (
            {"quantization": "nf4", "double_quantization": True},
            INNER * (0.5 + 1 / 64 + 4 / (64 * 256)) + 2 * REST + 2 * 14_336 * 4096,
        ),
        ({"quantization": "int8"}, INNER + 2 * REST + 2 * 14_336 * 4096),
        # Multiplied in bfloat16: the copies are kept for the way back.
        ({"dtype": "float32"}, 4 * (INNER + REST) + 2 * INNER),
    ],
)
def test_weights_by_how_they_lie_in_memory(base: dict[str, Any], weights: float):
    assert needs(base_model=base).weights == pytest.approx(weights, rel=1e-9)


def test_what_is_trained_has_its_gradient_and_two_moments():
    assert needs().trained == ADAPTERS * (4 + 4 + 8)
    assert needs(local={"optimizer": "sgd"}).trained == ADAPTERS * (4 + 4)
    # A lies still in this rule, and has neither.
    assert needs(aggregation={"rule": "ffa-lora"}).trained == ADAPTERS * 4 + 5_242_880 * 12
    assert needs(method={"ranks": {"st-olav": 8}}).trained == ADAPTERS * 4 + ADAPTERS // 4 * 12


def test_what_is_folded_is_kept_and_has_no_gradient():
    flora = {"aggregation": {"rule": "flora"}}
    pair = ADAPTERS // 32
    assert needs(fold=640, **flora).trained - needs(**flora).trained == 640 * pair * 4
    assert needs(fold=640, **flora).disk - needs(**flora).disk == pytest.approx(4 * 640 * pair * 4, rel=1e-3)


def test_activations_with_and_without_checkpointing():
    layer = 2 * TOKENS * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14_336))
    assert needs().activations == 32 * layer
    checkpointed = needs(local={"gradient_checkpointing": True}).activations
    assert checkpointed == layer + 32 * 2 * TOKENS * 4096
    assert needs(micro_batch=1).activations == 2 * layer


def test_logits_are_vocabulary_wide_for_each_token_of_a_completion():
    assert needs().logits == TOKENS // 2 * 128_256 * (2 + 2)


def test_several_gpus_share_what_is_not_quantised():
    assert needs(gpus=4).weights == needs().weights // 4
    assert needs(gpus=4).trained == needs().trained
    nf4 = {"quantization": "nf4"}
    assert needs(gpus=4, base_model=nf4).weights == needs(base_model=nf4).weights


def test_the_qlora_of_the_study_fits_a_card_of_24_gigabytes():
    qlora = needs(base_model={"quantization": "nf4"}, local={"gradient_checkpointing": True})
    assert 12e9 < qlora.device < 20e9


def test_on_a_cpu_values_have_four_bytes_and_everything_is_the_machines_memory():
    on_cpu = needs(on_gpu=False, base_model={"dtype": "float32"})
    assert on_cpu.weights == 4 * (INNER + REST)
    assert on_cpu.logits == TOKENS // 2 * 128_256 * (4 + 4)
    assert on_cpu.host == 1000 * 512 * 4


def test_what_keeps_sites_together_takes_one_more_copy_of_what_is_trained():
    sgd = {"optimizer": "sgd"}
    plain = needs(local=sgd)
    assert needs(local={**sgd, "proximal": 0.1}).trained - plain.trained == 4 * ADAPTERS
    scaffold = needs(local=sgd, aggregation={"rule": "scaffold"})
    assert scaffold.trained - plain.trained == 4 * ADAPTERS
    # Four versions that are twice as large, and the site's own state; but for names.
    assert scaffold.disk - plain.disk == pytest.approx(5 * 4 * ADAPTERS, rel=0.001)
