"""How a row of instructions becomes a prompt and its completion. Templates are data: they are filled, never run.

Where the prompt ends decides what is learnt, and what a model is given when it is to answer. So both come from one
place, and `boundary_ids` sees to it that the tokens of the prompt are in training exactly those that generation begins
with.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from client_agent.training.data import Instruction
from protos import jobspec
from protos.errors import InvalidInput
from protos.recipe_tasks import PromptTemplate

# As FlowerTune writes it (adap/flower, examples/flowertune-llm-medical), which knows no input; for rows that have one,
# the words of Alpaca (Taori et al. 2023) in the same form.
ALPACA = PromptTemplate(
    prompt=(
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n### Instruction:\n{instruction}\n### Input:\n{input}\n"
        "### Response:"
    ),
    prompt_without_input=(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "### Instruction:\n{instruction}\n### Response:"
    ),
)


class Template(Protocol):
    @property
    def adds_special_tokens(self) -> bool:
        """Whether the tokenizer puts its own beginning before the prompt, and an end is to follow the completion. A
        chat template writes both itself."""
        ...

    def prompt(self, row: Instruction) -> str: ...

    def completion(self, row: Instruction) -> str:
        """What follows the prompt, without anything between them."""
        ...


@dataclass(frozen=True)
class Filled:
    """A template with {instruction} and {input}."""

    template: PromptTemplate
    before_output: str = ""
    adds_special_tokens: bool = True

    def prompt(self, row: Instruction) -> str:
        has_input = bool(row.input.strip()) or self.template.prompt_without_input is None
        text = self.template.prompt if has_input else self.template.prompt_without_input
        return fill(text or "", {"instruction": row.instruction, "input": row.input if row.input.strip() else ""})

    def completion(self, row: Instruction) -> str:
        return self.before_output + row.output


@dataclass(frozen=True)
class Chat:
    """The tokenizer's own template: the instruction, with its input below it, is the user's turn."""

    tokenizer: PreTrainedTokenizerBase
    adds_special_tokens: bool = False

    def prompt(self, row: Instruction) -> str:
        return self._rendered([self._turn(row)], add_generation_prompt=True)

    def completion(self, row: Instruction) -> str:
        prompt = self.prompt(row)
        whole = self._rendered([self._turn(row), {"role": "assistant", "content": row.output}])
        if not whole.startswith(prompt):
            raise InvalidInput(
                "The chat template of the base model's tokenizer does not go on from the prompt that it makes.",
                hint="Choose another template under [task] in the recipe.",
            )
        return whole.removeprefix(prompt)

    def _turn(self, row: Instruction) -> dict[str, str]:
        return {"role": "user", "content": f"{row.instruction}\n{row.input}" if row.input.strip() else row.instruction}

    def _rendered(self, turns: list[dict[str, str]], **how: Any) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, **how))
        except Exception as error:
            # A template is a program that came with the model, and may fail in any way. Its text may quote a row.
            raise InvalidInput(
                f"The chat template of the base model's tokenizer fails ({type(error).__name__}).",
                hint="Choose another template under [task] in the recipe.",
            ) from None


def template_of(task: jobspec.CausalLm, *, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The recipe's template. InvalidInput: it is the tokenizer's, which has none."""
    if isinstance(task.template, PromptTemplate):
        return Filled(task.template)
    if task.template == "alpaca":
        # The space belongs to the completion: with the word after it it is one token.
        return Filled(ALPACA, before_output=" ")
    if not tokenizer.chat_template:
        raise InvalidInput(
            "The recipe asks for the tokenizer's chat template, but the base model's tokenizer has none.",
            hint='Set template = "alpaca", or write one, under [task] in the recipe.',
        )
    return Chat(tokenizer)


def fill(template: str, values: dict[str, str]) -> str:
    """The template with each {field} replaced once: what a value holds is never taken for a field."""
    parts = string.Formatter().parse(template)
    return "".join(text + (values[field] if field is not None else "") for text, field, _, _ in parts)


def prompt_ids(prompts: Sequence[str], *, tokenizer: PreTrainedTokenizerBase, special: bool) -> list[list[int]]:
    """What a model is given, in training and when it is to answer."""
    return _ids(prompts, tokenizer=tokenizer, special=special)


def boundary_ids(
    prompts: Sequence[str], completions: Sequence[str], *, tokenizer: PreTrainedTokenizerBase, special: bool
) -> tuple[list[list[int]], list[list[int]]]:
    """The tokens of each prompt, as `prompt_ids`, and those of its completion.

    Both texts are tokenised together, because some tokenizers write the beginning of a text in another way. Where a
    token would reach over the boundary they are tokenised apart: it would stand in no prompt that a model is given.
    """
    before = prompt_ids(prompts, tokenizer=tokenizer, special=special)
    whole = _ids([p + c for p, c in zip(prompts, completions, strict=True)], tokenizer=tokenizer, special=special)
    apart = _ids(completions, tokenizer=tokenizer, special=False)
    after = []
    for first, both, alone in zip(before, whole, apart, strict=True):
        after.append(both[len(first) :] if both[: len(first)] == first else alone)
    return before, after


def _ids(texts: Sequence[str], *, tokenizer: PreTrainedTokenizerBase, special: bool) -> list[list[int]]:
    encoded = tokenizer(
        list(texts), add_special_tokens=special, padding=False, truncation=False,
        return_attention_mask=False, return_token_type_ids=False, verbose=False,
    )  # fmt: skip
    found: list[list[int]] = encoded["input_ids"]
    if special:
        # Some tokenizers put an end behind every text.
        found = [ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids for ids in found]
    return found
