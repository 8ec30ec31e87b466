"""Three small encoders made from texts, with what sets BERT, ALBERT and DistilBERT apart: for trials without a hub.

They have the classes and the files of the real ones. "bert" (Devlin et al. 2018, arXiv:1810.04805) has a pooler that a
task about sentences has trained. "albert" (Lan et al. 2019, arXiv:1909.11942) shares one layer's weights among all its
layers, and has such a pooler too. "distilbert" (Sanh et al. 2019, arXiv:1910.01108) begins as every second layer of
such a "bert" and is taught by it to predict masked words. It has no pooler: whoever classifies with it puts two new
layers on it. Where its teacher has had no task about sentences either, what it says at the first token means little.

The task about sentences is to say with the pooler what a public sentence encoder says of the text: the largest
directions of its answers (Reimers and Gurevych 2020, arXiv:2004.09813). BERT's and ALBERT's own tasks, and telling
which parts of texts belong together, teach a model of this size too little in minutes. The same texts, sizes and seed
give the same model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.functional import cosine_embedding_loss, cross_entropy, kl_div, log_softmax, mse_loss, normalize
from transformers import (
    AlbertConfig,
    AlbertForPreTraining,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForPreTraining,
    DistilBertConfig,
    DistilBertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from client_agent.training.train import prepare
from protos.errors import InvalidInput

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
IGNORED = -100
# Of the tokens, as BERT does it: what is predicted, and of these what stays hidden, and what another token replaces.
MASKED, HIDDEN, REPLACED = 0.15, 0.8, 0.1
WARM_UP_STEPS = 50
# DistilBERT's own: the temperature, and the weights of teacher's words, right words and directions of hidden states.
TEMPERATURE, TEACHER, WORDS, DIRECTION = 2.0, 5.0, 2.0, 1.0

# How far what the pooler is to say is from 0 before it is squeezed between -1 and 1, near which the real ones' answers
# lie; and how its errors weigh beside those of words.
SAID_SPREAD, SENTENCES = 1.5, 5.0
# ALBERT's one layer has the gradients of all: at the rate of the others it learns nothing.
ALBERT_SLOWER = 2

# The spread of new layers, as in the configurations of all three.
NEW_LAYERS = 0.02
# Batches that are sorted together.
STRETCH = 16
ROWS_AT_ONCE = 128

# Inputs [rows, tokens], words to predict [rows, tokens] (IGNORED: none), and what the pooler is to say [rows, hidden].
Batch = tuple[dict[str, Tensor], Tensor, Tensor]
OnStep = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Sizes:
    """The "bert" of the default has 0.5 million parameters, of which the embeddings are half."""

    vocabulary: int = 4096
    hidden: int = 64
    layers: int = 4
    heads: int = 4
    positions: int = 128

    @property
    def spread(self) -> float:
        """Of the weights before pre-training: a layer passes on as much of its input as one of 768 with 0.02 does."""
        return 0.02 * (768 / self.hidden) ** 0.5


@dataclass(frozen=True)
class Pretraining:
    """Steps with AdamW on texts; 0 steps leave the weights random."""

    steps: int = 0
    batch_size: int = 64
    length: int = 24
    learning_rate: float = 2e-3


def make(
    directory: Path,
    *,
    kind: str,
    texts: Sequence[str],
    sizes: Sizes,
    pretraining: Pretraining,
    seed: int,
    sentence_encoder: Path | None = None,
    threads: int = 1,
    on_step: OnStep = lambda done, total, loss: None,
) -> None:
    """Writes a model directory that AutoModelForSequenceClassification and AutoTokenizer load.

    `kind` is "bert", "albert" or "distilbert". The last needs its "bert" first, so it takes twice the steps.
    `sentence_encoder` is a directory; without it the pooler stays random, because words are predicted without it. Of a
    "distilbert" it is the teacher's.
    `on_step(done, total, loss)`. InvalidInput: there are too few texts for one batch.
    """
    prepare(device=torch.device("cpu"), threads=threads)
    tokenizer = make_tokenizer(texts, vocabulary=sizes.vocabulary)
    torch.manual_seed(seed)
    said = torch.zeros(len(texts), sizes.hidden)
    if sentence_encoder is not None and pretraining.steps:
        said = answers(texts, sentence_encoder=sentence_encoder, length=pretraining.length, values=sizes.hidden)
    read = Reading(texts, said, tokenizer=tokenizer, how=pretraining, seed=seed)
    model: PreTrainedModel
    if kind == "albert":
        model = AlbertForPreTraining(_albert(sizes))
        slower = replace(pretraining, learning_rate=pretraining.learning_rate / ALBERT_SLOWER)
        _pretrain(model, read.batches(), how=slower, on_step=on_step)
    else:
        model = BertForPreTraining(_bert(sizes))
        _pretrain(model, read.batches(), how=pretraining, on_step=on_step)
    if kind == "distilbert":
        model = _distilled(model, read, sizes=sizes, how=pretraining, on_step=on_step)
    # What is put on it later begins as on the real ones.
    model.config.initializer_range = NEW_LAYERS
    encoder: Any = model.base_model
    encoder.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def make_tokenizer(texts: Sequence[str], *, vocabulary: int) -> PreTrainedTokenizerFast:
    """WordPiece of at most `vocabulary` tokens, upper and lower case apart, as the "cased" models have it.

    They are all letters and the most frequent words: the library's own trainer has another order in each process.
    """
    normalizer, splitter = normalizers.BertNormalizer(lowercase=False), pre_tokenizers.BertPreTokenizer()
    counts = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    letters = sorted({letter for word in counts for letter in word})
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    tokens = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *words][:vocabulary]
    pieces = Tokenizer(models.WordPiece({token: number for number, token in enumerate(tokens)}, unk_token="[UNK]"))
    pieces.normalizer = normalizer
    pieces.pre_tokenizer = splitter
    pieces.decoder = decoders.WordPiece()
    pieces.post_processor = processors.BertProcessing(
        ("[SEP]", SPECIAL.index("[SEP]")), ("[CLS]", SPECIAL.index("[CLS]"))
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


@torch.no_grad()
def answers(texts: Sequence[str], *, sentence_encoder: Path, length: int, values: int) -> Tensor:
    """What it says of each text [texts, values]: its largest directions, mixed, and squeezed between -1 and 1."""
    encoder = AutoModel.from_pretrained(sentence_encoder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(sentence_encoder, local_files_only=True)
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    found = torch.zeros(len(texts), encoder.config.hidden_size)
    for start in range(0, len(order), ROWS_AT_ONCE):
        rows = order[start : start + ROWS_AT_ONCE]
        inputs = tokenizer(
            [texts[row] for row in rows], truncation=True, max_length=length, padding=True, return_tensors="pt"
        )
        real = inputs["attention_mask"].unsqueeze(-1)
        found[rows] = normalize((encoder(**inputs).last_hidden_state * real).sum(1) / real.sum(1), dim=1)
    centred = found - found.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    mixed, _ = torch.linalg.qr(torch.randn(values, values))
    largest = centred @ directions[:values].T
    return torch.tanh(largest @ mixed[: largest.shape[1]] * (SAID_SPREAD / largest.pow(2).mean().sqrt()))


@dataclass(frozen=True)
class Reading:
    """Batches of texts with words to predict and what the pooler is to say, without end."""

    texts: Sequence[str]
    said: Tensor
    tokenizer: PreTrainedTokenizerFast
    how: Pretraining
    seed: int

    def batches(self) -> Iterator[Batch]:
        size = self.how.batch_size
        if len(self.texts) < size:
            raise InvalidInput(f"There are only {len(self.texts)} texts, and a batch has {size}.")
        draw = torch.Generator().manual_seed(self.seed)
        while True:
            order = torch.randperm(len(self.texts), generator=draw).tolist()
            for start in range(0, len(order) - size + 1, size * STRETCH):
                # Texts of like length together: less padding.
                stretch = sorted(order[start : start + size * STRETCH], key=lambda row: len(self.texts[row]))
                for place in range(0, len(stretch) - size + 1, size):
                    yield self._batch(stretch[place : place + size], draw=draw)

    def _batch(self, rows: list[int], *, draw: torch.Generator) -> Batch:
        encoded = self.tokenizer(
            [self.texts[row] for row in rows], truncation=True, max_length=self.how.length, padding=True,
            return_tensors="pt", return_token_type_ids=False,
        )  # fmt: skip
        ids, words = self._masked(encoded["input_ids"], draw=draw)
        return {"input_ids": ids, "attention_mask": encoded["attention_mask"]}, words, self.said[rows]

    def _masked(self, ids: Tensor, *, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        def chance(share: float) -> Tensor:
            return torch.rand(ids.shape, generator=draw) < share

        words = len(SPECIAL)
        chosen = chance(MASKED) & (ids >= words)
        targets = ids.where(chosen, IGNORED)
        hidden = chosen & chance(HIDDEN)
        replaced = chosen & ~hidden & chance(REPLACED / (1 - HIDDEN))
        others = torch.randint(words, len(self.tokenizer), ids.shape, generator=draw)
        ids = ids.masked_fill(hidden, self.tokenizer.mask_token_id)
        return ids.where(~replaced, others), targets


def _bert(sizes: Sizes) -> BertConfig:
    return BertConfig(
        vocab_size=sizes.vocabulary, hidden_size=sizes.hidden, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, intermediate_size=4 * sizes.hidden,
        max_position_embeddings=sizes.positions, initializer_range=sizes.spread,
    )  # fmt: skip


def _albert(sizes: Sizes) -> AlbertConfig:
    return AlbertConfig(
        vocab_size=sizes.vocabulary, embedding_size=sizes.hidden // 2, hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, intermediate_size=4 * sizes.hidden,
        max_position_embeddings=sizes.positions, initializer_range=sizes.spread, classifier_dropout_prob=0.1,
        pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip


def _distilbert(sizes: Sizes) -> DistilBertConfig:
    return DistilBertConfig(
        vocab_size=sizes.vocabulary, dim=sizes.hidden, n_layers=sizes.layers // 2, n_heads=sizes.heads,
        hidden_dim=4 * sizes.hidden, max_position_embeddings=sizes.positions, initializer_range=sizes.spread,
    )  # fmt: skip


def _pretrain(model: Any, batches: Iterator[Batch], *, how: Pretraining, on_step: OnStep) -> None:
    def loss_of(batch: Batch) -> Tensor:
        inputs, targets, said = batch
        found = model.base_model(**inputs)
        asked = targets != IGNORED
        # Only where a word is to be predicted: over a whole vocabulary this costs more than all layers.
        predict = model.predictions if isinstance(model, AlbertForPreTraining) else model.cls.predictions
        words = predict(found.last_hidden_state[asked])
        # In parts of what it would be with a pooler that says nothing.
        missed = mse_loss(found.pooler_output, said) / said.pow(2).mean() if said.any() else 0.0
        return cross_entropy(words, targets[asked]) + SENTENCES * missed

    _steps(model, batches, loss_of=loss_of, how=how, on_step=on_step)


def _distilled(
    teacher: Any, read: Reading, *, sizes: Sizes, how: Pretraining, on_step: OnStep
) -> DistilBertForMaskedLM:
    """Half of the teacher's layers, taught by it with Sanh et al.'s three losses. No pooler, no token types."""
    student = DistilBertForMaskedLM(_distilbert(sizes))
    student.load_state_dict(_half_of(teacher.state_dict(), layers=sizes.layers), strict=False)
    teacher.eval()

    def loss_of(batch: Batch) -> Tensor:
        inputs, targets, _ = batch
        asked = targets != IGNORED
        with torch.no_grad():
            theirs = teacher.bert(**inputs).last_hidden_state
            taught = teacher.cls.predictions(theirs[asked])
        ours = student.distilbert(**inputs).last_hidden_state
        words = student.vocab_layer_norm(student.activation(student.vocab_transform(ours[asked])))
        said = student.vocab_projector(words)
        real = inputs["attention_mask"].bool()
        at, to = (log_softmax(logits / TEMPERATURE, dim=-1) for logits in (said, taught))
        return (
            TEACHER * TEMPERATURE**2 * kl_div(at, to, log_target=True, reduction="batchmean")
            + WORDS * cross_entropy(said, targets[asked])
            + DIRECTION * cosine_embedding_loss(ours[real], theirs[real], torch.ones(int(real.sum())))
        )

    _steps(student, read.batches(), loss_of=loss_of, how=how, on_step=on_step)
    return student


def _half_of(teacher: dict[str, Tensor], *, layers: int) -> dict[str, Tensor]:
    """A DistilBertForMaskedLM's tensors from a BertForPreTraining's: every second layer under the student's names."""
    names = {
        "attention.self.query": "attention.q_lin",
        "attention.self.key": "attention.k_lin",
        "attention.self.value": "attention.v_lin",
        "attention.output.dense": "attention.out_lin",
        "attention.output.LayerNorm": "sa_layer_norm",
        "intermediate.dense": "ffn.lin1",
        "output.dense": "ffn.lin2",
        "output.LayerNorm": "output_layer_norm",
    }
    tensors = {
        f"distilbert.embeddings.{name}": teacher[f"bert.embeddings.{name}"]
        for name in ("word_embeddings.weight", "position_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias")
    }
    for place, layer in enumerate(range(0, layers // 2 * 2, 2)):
        for theirs, ours in names.items():
            for part in ("weight", "bias"):
                source = teacher[f"bert.encoder.layer.{layer}.{theirs}.{part}"]
                tensors[f"distilbert.transformer.layer.{place}.{ours}.{part}"] = source
    head = "cls.predictions"
    return tensors | {
        "vocab_transform.weight": teacher[f"{head}.transform.dense.weight"],
        "vocab_transform.bias": teacher[f"{head}.transform.dense.bias"],
        "vocab_layer_norm.weight": teacher[f"{head}.transform.LayerNorm.weight"],
        "vocab_layer_norm.bias": teacher[f"{head}.transform.LayerNorm.bias"],
        "vocab_projector.weight": teacher["bert.embeddings.word_embeddings.weight"],
        "vocab_projector.bias": teacher[f"{head}.bias"],
    }


def _steps(
    model: Any,
    batches: Iterator[Batch],
    *,
    loss_of: Callable[[Batch], Tensor],
    how: Pretraining,
    on_step: OnStep,
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=how.learning_rate, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP_STEPS) * (1 - 0.95 * step / max(1, how.steps))
    )
    model.train()
    for step, batch in enumerate(islice(batches, how.steps)):
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        on_step(step + 1, how.steps, loss.item())
    model.eval()
