"""A small Llama with a tokenizer of its own, made from texts: a base model for trials and tests without a hub.

It has the classes and the files of the real ones (LlamaForCausalLM, a fast byte-level BPE tokenizer, safetensors), so
what runs on it runs on them. The same texts, sizes and seed give the same model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from client_agent.training.train import prepare

# Llama 3's own, so that recipes, templates and exports meet the names that they will meet there.
BEGIN, END, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"
WARM_UP_STEPS = 20


@dataclass(frozen=True)
class Sizes:
    """The default has 0.9 million parameters, of which the embeddings are 0.5."""

    vocabulary: int = 4096
    hidden: int = 128
    layers: int = 2
    heads: int = 4
    key_value_heads: int = 2
    positions: int = 1024


@dataclass(frozen=True)
class Pretraining:
    """Next-token prediction on the texts, end to end; 0 steps leave the weights random."""

    steps: int = 0
    batch_size: int = 16
    length: int = 128
    learning_rate: float = 3e-3


def make(
    directory: Path,
    *,
    texts: Sequence[str],
    sizes: Sizes,
    pretraining: Pretraining,
    seed: int,
    threads: int = 1,
    on_step: Callable[[int, int, float], None] = lambda done, total, loss: None,
) -> None:
    """Writes a model directory that AutoModelForCausalLM and AutoTokenizer load. `on_step(done, total, loss)`."""
    prepare(device=torch.device("cpu"), threads=threads)
    tokenizer = make_tokenizer(texts, vocabulary=sizes.vocabulary)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden,
        intermediate_size=sizes.hidden * 3,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_value_heads,
        max_position_embeddings=sizes.positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    if pretraining.steps:
        _pretrain(model, tokenizer=tokenizer, texts=texts, how=pretraining, seed=seed, on_step=on_step)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def make_tokenizer(texts: Sequence[str], *, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (as Llama 3) of at most `vocabulary` tokens, which puts BEGIN before every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, bpe.token_to_id(BEGIN))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BEGIN, eos_token=END, pad_token=PAD)


def _pretrain(
    model: LlamaForCausalLM,
    *,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    how: Pretraining,
    seed: int,
    on_step: Callable[[int, int, float], None],
) -> None:
    end = tokenizer.eos_token_id
    stream = torch.tensor([token for ids in tokenizer(list(texts))["input_ids"] for token in (*ids, end)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=how.learning_rate)
    warm = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP_STEPS) * (1 - 0.9 * step / how.steps)
    )
    draw = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(how.steps):
        starts = torch.randint(len(stream) - how.length, (how.batch_size, 1), generator=draw)
        rows = stream[starts + torch.arange(how.length + 1)]
        logits = model(input_ids=rows[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warm.step()
        on_step(step + 1, how.steps, loss.item())
    model.eval()
