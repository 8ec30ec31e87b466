"""Instruction tuning of a decoder: everything of the trainer that depends on the task `causal-lm`, in one place.

The loss is on the completion alone, and its mean is over the completion tokens of the whole batch, however that is cut
into parts. Logits, which at a vocabulary of 128,000 would be most of a step's memory, are computed for these tokens
only: what goes into the output layer is picked out just before it.
"""

from __future__ import annotations

import inspect
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from client_agent.settings import DataSet
from client_agent.training.data import Instructions, read_instructions
from client_agent.training.prompts import boundary_ids, template_of
from client_agent.training.tables import Split
from protos import jobspec
from protos.errors import InvalidInput, SiteConfigInvalid

ENCODED_ROWS = 512
# Above it the number would not fit, and means nothing.
HIGHEST_LOG_PERPLEXITY = 700.0


@dataclass(frozen=True)
class CausalTokens:
    """Tokenised rows in flat tensors. A sequence is one row, or with packing as many as fit into it."""

    ids: Tensor  # int32 [tokens of all sequences]
    learnt: Tensor  # bool, as ids: the tokens of completions
    starts: Tensor  # int64 [sequences + 1], into ids
    # int32, as ids: each token's place in its row. None: each sequence is one row, so the model counts by itself.
    positions: Tensor | None
    pad_id: int
    examples: int
    skipped: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Tensor:
        return self.starts.diff()

    @property
    def content(self) -> tuple[Tensor, ...]:
        return (self.ids, self.learnt, self.starts)

    def target_count(self, rows: Tensor) -> int:
        return int(self._targets[rows].sum())

    @cached_property
    def _targets(self) -> Tensor:
        """int64 [sequences]"""
        sequence = torch.arange(len(self)).repeat_interleave(self.lengths)
        return torch.zeros(len(self), dtype=torch.int64).index_add_(0, sequence, self.learnt.long())

    def batch(self, rows: Tensor, *, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        """The model's inputs [len(rows), longest of them], padded on the right, and the targets [2, completion tokens].

        A target is the place of the token before it in the flattened batch, and the token. There is no attention mask:
        what stands on the right is seen by nothing that is looked at.
        """
        starts, lengths = self.starts[rows], self.lengths[rows]
        columns = torch.arange(int(lengths.max()))
        mask = columns < lengths[:, None]
        places = (starts[:, None] + columns).clamp(max=len(self.ids) - 1)
        ids = self.ids[places].long().where(mask, self.pad_id)
        inputs = {"input_ids": ids}
        if self.positions is not None:
            # The padding is a row of its own.
            inputs["position_ids"] = self.positions[places].long().where(mask, columns - lengths[:, None])
        targets = (self.learnt[places] & mask).flatten().nonzero().squeeze(1)
        pairs = torch.stack([targets - 1, ids.flatten()[targets]])
        return {name: tensor.to(device) for name, tensor in inputs.items()}, pairs.to(device)


@dataclass
class CausalScores:
    """Adds up what all metrics of a language model follow from, batch by batch."""

    loss_sum: float = 0.0
    tokens: int = 0

    def add(self, logits: Tensor, targets: Tensor, *, loss_sum: float) -> None:
        self.loss_sum += loss_sum
        self.tokens += len(targets)

    def metrics(self) -> dict[str, float]:
        """loss, per completion token, and perplexity, its exponential."""
        loss = self.loss_sum / self.tokens
        return {"loss": loss, "perplexity": math.exp(min(loss, HIGHEST_LOG_PERPLEXITY))}


@dataclass(frozen=True)
class CausalLanguageModel:
    """Rows of instructions, and the completions to learn."""

    task: jobspec.CausalLm

    # What transformers and PEFT call it.
    model_class: ClassVar[Any] = AutoModelForCausalLM
    peft_type: ClassVar[str] = "CAUSAL_LM"
    # So few, because an evaluation computes the logits of all of them at once.
    evaluation_rows: ClassVar[int] = 16
    # transformers spares the output layer, whatever it is called.
    never_quantized: ClassVar[tuple[str, ...]] = ()

    @property
    def max_length(self) -> int:
        return self.task.max_length

    def configure(self, config: PreTrainedConfig) -> None:
        have = getattr(config, "max_position_embeddings", None)
        if isinstance(have, int) and self.max_length > have:
            raise InvalidInput(
                f"The recipe's max_length is {self.max_length}, but the base model has {have} positions.",
                hint="Lower max_length under [task] in the recipe.",
            )

    def check(self, network: Any, *, missing: Collection[str], name: str) -> None:
        """InvalidInput: the loaded model is no language model, or cannot keep packed rows apart."""
        # An encoder that was trained to fill gaps loads without a fault.
        looks_ahead = any(getattr(module, "is_causal", True) is False for module in network.get_decoder().modules())
        if missing or looks_ahead or network.get_output_embeddings() is None:
            lacks = min(missing, default="attention that looks back only" if looks_ahead else "an output layer")
            raise InvalidInput(
                f"The base model {name!r} is no causal language model: it lacks {lacks}.",
                hint="Name a decoder with its output layer (its architecture ends in ForCausalLM).",
            )
        # Flash attention is told where rows end, and could not be tried before the model is on its GPU. What a layer
        # of another kind carries on from token to token knows no ends.
        apart = self.task.packing and (not _is_hybrid(network) if _is_flash(network) else _keeps_rows_apart(network))
        if self.task.packing and not apart:
            raise InvalidInput(
                f"The base model {name!r} lets packed rows see one another with this attention.",
                hint='Set packing = false under [task], or attention = "sdpa" under [base_model], in the recipe.',
            )

    def read(self, data_set: DataSet, *, name: str, split: Split) -> Instructions:
        return read_instructions(data_set, name=name, split=split)

    def encode(
        self, rows: Instructions, *, tokenizer: PreTrainedTokenizerBase, on_rows: Callable[[int, int], None]
    ) -> CausalTokens:
        """The rows as tokens, cut to max_length. `on_rows(done, total)` is called before each part; it may raise.

        A row whose prompt leaves no room for a token of its completion is skipped and counted. SiteConfigInvalid when
        that is so for all of them; InvalidInput when the template does not go with the tokenizer.
        """
        template = template_of(self.task, tokenizer=tokenizer)
        ends = template.adds_special_tokens
        if ends and tokenizer.eos_token_id is None:
            raise InvalidInput(
                "The base model's tokenizer has no token that ends a text, so an answer would never end.",
                hint="Name an eos_token in the base model's tokenizer_config.json.",
            )
        end = [tokenizer.eos_token_id] if ends else []
        parts: list[Tensor] = []
        lengths: list[tuple[int, int]] = []  # of each row that is kept, and of its prompt
        for start in range(0, len(rows), ENCODED_ROWS):
            on_rows(start, len(rows))
            part = rows.rows[start : start + ENCODED_ROWS]
            pairs = boundary_ids(
                [template.prompt(row) for row in part], [template.completion(row) for row in part],
                tokenizer=tokenizer, special=template.adds_special_tokens,
            )  # fmt: skip
            cut = [
                ((prompt + answer + end)[: self.max_length], len(prompt)) for prompt, answer in zip(*pairs, strict=True)
            ]
            fit = [(ids, prompt) for ids, prompt in cut if 0 < prompt < len(ids)]
            parts.append(torch.tensor([token for ids, _ in fit for token in ids], dtype=torch.int32))
            lengths += [(len(ids), prompt) for ids, prompt in fit]
        if not lengths:
            raise SiteConfigInvalid(
                f"All {len(rows)} prompts leave no room for an answer within max_length = {self.max_length}.",
                hint="Raise max_length under [task] in the recipe, or look at the data set's columns.",
            )
        sizes, prompts = torch.tensor(lengths).T
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        tokens = CausalTokens(
            ids=torch.cat(parts), learnt=_inside(sizes) >= prompts.repeat_interleave(sizes), starts=_starts(sizes),
            positions=None, pad_id=pad_id, examples=len(sizes), skipped=rows.skipped + len(rows) - len(sizes),
        )  # fmt: skip
        return _packed(tokens, length=self.max_length) if self.task.packing else tokens

    def predict(self, network: Any, inputs: dict[str, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [n, vocabulary] before each completion token, and these tokens [n]."""
        places, tokens = targets
        if "position_ids" in inputs and _is_flash(network):
            # It keeps rows apart in one long sequence only.
            inputs = {name: tensor.reshape(1, -1) for name, tensor in inputs.items()}
        picking = network.get_output_embeddings().register_forward_pre_hook(
            lambda module, args: (args[0].flatten(0, 1).index_select(0, places)[None],)
        )
        try:
            return network(**inputs, use_cache=False).logits[0], tokens
        finally:
            picking.remove()

    def new_scores(self) -> CausalScores:
        return CausalScores()


def _is_flash(network: Any) -> bool:
    return str(network.config._attn_implementation).startswith("flash")


def _is_hybrid(network: Any) -> bool:
    """Whether some of its layers are no attention that is written out: recurrences, convolutions, linear attention."""
    kinds = getattr(network.config, "layer_types", None) or ()
    return network._is_stateful or any(not kind.endswith("attention") or kind.startswith("linear") for kind in kinds)


def _packed(tokens: CausalTokens, *, length: int) -> CausalTokens:
    """The rows in sequences of at most `length` tokens, each where it leaves the least room (best fit, decreasing)."""
    lengths = tokens.lengths.tolist()
    sequences: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens that still fit, sequence), sorted
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        place = bisect_left(room, (lengths[row], 0))
        free, sequence = room.pop(place) if place < len(room) else (length, len(sequences))
        if sequence == len(sequences):
            sequences.append([])
        sequences[sequence].append(row)
        insort(room, (free - lengths[row], sequence))
    order = torch.tensor([row for rows in sequences for row in rows])
    # Token by token: where it stood.
    sizes = tokens.lengths[order]
    inside = _inside(sizes)
    places = tokens.starts[order].repeat_interleave(sizes) + inside
    whole = torch.tensor([sum(lengths[row] for row in rows) for rows in sequences])
    return replace(
        tokens, ids=tokens.ids[places], learnt=tokens.learnt[places], starts=_starts(whole),
        positions=inside.to(torch.int32),
    )  # fmt: skip


def _starts(sizes: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(dim=0)])


def _inside(sizes: Tensor) -> Tensor:
    """0, 1, 2 ... anew for each of the pieces of these sizes."""
    return torch.arange(int(sizes.sum())) - _starts(sizes)[:-1].repeat_interleave(sizes)


@torch.no_grad()
def _keeps_rows_apart(network: nn.Module) -> bool:
    """Whether a row's logits are the same whatever stands before it in its sequence: tried, not looked up."""
    if "position_ids" not in inspect.signature(network.forward).parameters:
        return False
    device = next(network.parameters()).device
    ids = torch.tensor([[1, 2, 3, 1, 2], [3, 3, 1, 1, 2]], device=device)
    positions = torch.tensor([[0, 1, 2, 0, 1]] * 2, device=device)
    one, other = network.eval()(input_ids=ids, position_ids=positions, use_cache=False).logits.float()[:, 3:]
    return bool(torch.allclose(one, other, rtol=0.0, atol=1e-4 * float(one.std())))
