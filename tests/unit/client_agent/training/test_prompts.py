"""Where a prompt ends and its completion begins, in characters and in tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from client_agent.training.causal import CausalLanguageModel
from client_agent.training.data import Instruction, Instructions
from client_agent.training.prompts import fill, prompt_ids, template_of
from client_agent.training.small_llama import END
from protos import jobspec
from protos.errors import InvalidInput

BARE = Instruction("What is aspirin?", "", "It is a drug.")
WITH_INPUT = Instruction("What is it?", "aspirin", "It is a drug.")
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATES: dict[str, Any] = {
    "alpaca": "alpaca",
    "chat": "chat",
    "own": {"prompt": "Q: {instruction} {input}\nA: "},
    # The last letters of the prompt and the first of an answer are one token for many a tokenizer.
    "own that ends in a word": {
        "prompt": "{instruction} Iti",
        "prompt_without_input": "{instruction} {instruction} It",
    },
}


@pytest.fixture
def tokenizer(language_model: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="session")
def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: a text begins with a space that nobody wrote."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    bpe.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    texts = [BARE.instruction, BARE.output, "### Response: It is", "Below is an instruction"] * 5
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", END], show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token=END, chat_template=CHAT
    )


def task_of(name: str) -> jobspec.CausalLm:
    return jobspec.CausalLm(type="causal-lm", template=TEMPLATES[name])


def test_alpaca_is_what_the_study_writes(tokenizer: PreTrainedTokenizerBase) -> None:
    template = template_of(task_of("alpaca"), tokenizer=tokenizer)
    assert template.prompt(BARE) + template.completion(BARE) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "### Instruction:\nWhat is aspirin?\n### Response: It is a drug."
    )
    assert template.prompt(WITH_INPUT).endswith("\n### Instruction:\nWhat is it?\n### Input:\naspirin\n### Response:")


def test_the_study_s_mask_and_ours_cover_the_same_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """It learns what follows the ids of "### Response:" in the whole text, tokenised at once; we, the end as well."""
    template = template_of(task_of("alpaca"), tokenizer=tokenizer)
    whole = tokenizer(template.prompt(BARE) + template.completion(BARE))["input_ids"]
    marker = tokenizer("\n### Response:", add_special_tokens=False)["input_ids"][2:]
    first = next(i for i in range(len(whole)) if whole[i : i + len(marker)] == marker) + len(marker)
    tokens = encoded("alpaca", tokenizer)
    assert tokens.ids.tolist() == [*whole, tokenizer.eos_token_id]
    assert tokens.learnt.tolist() == [i >= first for i in range(len(whole) + 1)]


def encoded(name: str, tokenizer: PreTrainedTokenizerBase, row: Instruction = BARE) -> Any:
    kind = CausalLanguageModel(task_of(name))
    return kind.encode(Instructions([row], 0), tokenizer=tokenizer, on_rows=lambda *_: None)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("row", [BARE, WITH_INPUT], ids=["bare", "with input"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_training_begins_where_generation_does_and_learns_the_answer_and_its_end(
    name: str, row: Instruction, kind: str, tokenizer: PreTrainedTokenizerBase, sentencepiece: PreTrainedTokenizerFast
) -> None:
    used = tokenizer if kind == "bytes" else sentencepiece
    template = template_of(task_of(name), tokenizer=used)
    (given,) = prompt_ids([template.prompt(row)], tokenizer=used, special=template.adds_special_tokens)
    tokens = encoded(name, used, row)
    learnt = tokens.ids[tokens.learnt].tolist()
    assert tokens.ids[~tokens.learnt].tolist() == given
    assert tokens.learnt.tolist() == sorted(tokens.learnt.tolist())
    assert learnt[-1] == used.eos_token_id
    assert learnt.count(used.eos_token_id) == 1
    assert used.decode(learnt[:-1]).strip() == row.output
    if kind == "bytes":
        assert used.decode(learnt[:-1]) == template.completion(row).removesuffix(END)


def test_a_chat_without_a_template_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    with pytest.raises(InvalidInput, match="tokenizer has none"):
        template_of(task_of("chat"), tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (
            "{% if add_generation_prompt %}<|think|>{% endif %}{{ messages[-1].content }}",
            "does not go on from the prompt",
        ),
        ("{{ raise_exception('no ' + messages[0].content) }}", "fails"),
    ],
)
def test_a_chat_template_that_does_not_do_is_explained_without_the_row(
    tokenizer: PreTrainedTokenizerBase, template: str, says: str
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(InvalidInput, match=says) as caught:
        encoded("chat", tokenizer)
    assert "aspirin" not in str(caught.value)


def test_what_a_row_holds_is_never_filled_in_again() -> None:
    values = {"instruction": "{input} {0.__class__} {{x}} %s", "input": "{instruction}"}
    assert fill("{{a}} {instruction}|{input}", values) == "{a} {input} {0.__class__} {{x}} %s|{instruction}"


def test_an_answer_that_spells_out_its_end_has_one_end_only(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = encoded("alpaca", tokenizer, Instruction("x", "", f"It is{END}"))
    assert tokens.ids.tolist().count(tokenizer.eos_token_id) == 1
