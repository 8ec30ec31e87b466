"""The linear layers of real models, as an agent reports them."""

from __future__ import annotations

from coordinator.traffic import Linear, Shapes

# 32 layers of 4096, 8 of 32 heads for keys and values, a vocabulary of 128,256; the output layer has its own weights.
LLAMA_3_8B = Shapes(
    parameters=8_030_261_248,
    hidden_size=4096,
    layers=32,
    vocabulary=128_256,
    linear=(
        Linear("lm_head", 128_256, 4096, 1),
        Linear("model.layers.*.mlp.down_proj", 4096, 14_336, 32),
        Linear("model.layers.*.mlp.gate_proj", 14_336, 4096, 32),
        Linear("model.layers.*.mlp.up_proj", 14_336, 4096, 32),
        Linear("model.layers.*.self_attn.k_proj", 1024, 4096, 32),
        Linear("model.layers.*.self_attn.o_proj", 4096, 4096, 32),
        Linear("model.layers.*.self_attn.q_proj", 4096, 4096, 32),
        Linear("model.layers.*.self_attn.v_proj", 1024, 4096, 32),
    ),
)
