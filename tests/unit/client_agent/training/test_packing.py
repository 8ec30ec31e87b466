"""Rows packed into one sequence: kept apart with any attention, refused where they cannot be, and counted as rows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from client_agent.taskdir import UPDATE, TooManyEpochs
from client_agent.training.causal import CausalLanguageModel
from protos import jobspec
from protos.errors import InvalidInput
from tests.unit.client_agent.training.conftest import Site, causal_recipe


def test_packing_is_refused_where_rows_would_see_one_another(teaching_site: Site) -> None:
    task = jobspec.CausalLm(type="causal-lm", packing=True)
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "num_hidden_layers": 1}
    recurrent = MambaForCausalLM(MambaConfig(hidden_size=32, state_size=4, **sizes))
    with pytest.raises(InvalidInput, match="'base' lets packed rows see one another"):
        CausalLanguageModel(task).check(recurrent, missing=(), name="base")
    for attention in ("sdpa", "eager"):
        config = GPT2Config(n_embd=32, n_head=2, attn_implementation=attention, bos_token_id=1, eos_token_id=1, **sizes)
        CausalLanguageModel(task).check(GPT2LMHeadModel(config), missing=(), name="base")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_sliding_window_sees_the_tokens_of_its_own_row_alone(attention: str) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=4, attn_implementation=attention,
    )  # fmt: skip
    network = MistralForCausalLM(config).eval()
    CausalLanguageModel(jobspec.CausalLm(type="causal-lm", packing=True)).check(network, missing=(), name="base")
    one, other = torch.randint(50, (1, 9)), torch.randint(50, (1, 7))
    positions = torch.cat([torch.arange(9), torch.arange(7)])[None]
    with torch.no_grad():
        packed = network(input_ids=torch.cat([one, other], dim=1), position_ids=positions, use_cache=False).logits
        apart = [network(input_ids=ids, use_cache=False).logits for ids in (one, other)]
        wide = MistralForCausalLM(MistralConfig(**{**config.to_dict(), "sliding_window": None})).eval()
        wide.load_state_dict(network.state_dict())
        unlike = wide(input_ids=one, use_cache=False).logits
    torch.testing.assert_close(packed, torch.cat(apart, dim=1), rtol=1e-4, atol=1e-5)
    # The window counts: without it the last tokens see more.
    assert not torch.allclose(unlike[:, -1], apart[0][:, -1], rtol=1e-2)


def test_packing_is_refused_where_a_layer_carries_on_from_row_to_row_also_with_flash_attention() -> None:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }  # fmt: skip
    kinds = ["conv", "full_attention"]
    hybrid = Lfm2ForCausalLM(Lfm2Config(**sizes, layer_types=kinds))
    plain = MistralForCausalLM(MistralConfig(**sizes, sliding_window=None))
    kind = CausalLanguageModel(jobspec.CausalLm(type="causal-lm", packing=True))
    for attention in ("sdpa", "eager", "flash_attention_2"):
        hybrid.config._attn_implementation = plain.config._attn_implementation = attention
        with pytest.raises(InvalidInput, match="'base' lets packed rows see one another"):
            kind.check(hybrid, missing=(), name="base")
        kind.check(plain, missing=(), name="base")


def test_packed_sequences_are_counted_in_epochs_over_the_rows_and_too_many_are_declined(teaching_site: Site) -> None:
    site = teaching_site
    task = {"type": "causal-lm", "max_length": 160, "packing": True}
    recipe = causal_recipe(task=task, local={"steps": 4, "batch_size": 8, "learning_rate": 1e-3})
    init, _ = site.run("init", site.task("init", recipe=recipe))
    train = site.task("train", recipe=recipe, model=init / UPDATE)
    _, result = site.run("unbounded", train)
    (tokens,) = site.warm.splits.values()
    # Of rows these 32 would be about one epoch; they are sequences that hold several.
    assert len(tokens) <= 16 < 24 < result.examples
    epochs = 4 / math.ceil(len(tokens) / 8)
    site.run("allowed", replace(train, max_epochs=epochs))
    with pytest.raises(TooManyEpochs, match=rf"4 steps are {epochs:.1f} epochs over its {result.examples} rows"):
        site.run("declined", replace(train, max_epochs=epochs - 0.1))
