"""Questions with options: read from a site's table, and put to a model word for word as the study's harness does.

The prompts are those of Flower's medical evaluation (adap/flower, benchmarks/flowertune-llm/evaluation/medical), whose
instructions are Meditron's (epfLLM/meditron, evaluation/instructions.json), so that figures can be compared. They are
not the prompt that a job trains with: neither was the study's.

Nothing here imports torch, as in tables.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from client_agent.settings import DataSet
from client_agent.training.answers import FORMS, KINDS
from client_agent.training.tables import Record, Source, Split, path_of, records, shorten
from protos.errors import SiteConfigInvalid

_MEDITRON = (
    "basic and clinical science, medical knowledge, and mechanisms underlying health, disease, patient care, and modes "
    "of therapy"
)
INSTRUCTIONS = {
    "pubmedqa": "As an expert doctor in clinical science and medical knowledge, can you tell me if the following "
    "statement is correct? Answer yes, no, or maybe.",
    "medqa": "You are a medical doctor taking the US Medical Licensing Examination. You need to demonstrate your "
    f"understanding of {_MEDITRON}. Show your ability to apply the knowledge essential for medical practice. For the "
    "following multiple-choice question, select one correct answer from A to E. Base your answer on the current and "
    "standard practices referenced in medical guidelines.",
    "medmcqa": "You are a medical doctor answering realworld medical entrance exam questions. Based on your "
    f"understanding of {_MEDITRON}, answer the following multiple-choice question. Select one correct answer from A to "
    "D. Base your answer on the current and standard practices referenced in medical guidelines.",
}
PROMPT = "<|im_start|>question\n{instruction}\n{body}\nThe answer is:\n<|im_end|>\n<|im_start|>answer\n"


@dataclass(frozen=True)
class Question:
    """A question as a model gets it: the whole prompt, the answers that count, and the right one of them."""

    prompt: str
    options: tuple[str, ...]
    gold: str


def read_questions(data_set: DataSet, *, name: str, split: Split) -> list[Question]:
    """All questions of the benchmark `name`, in the file's order: `validation` parts nothing off, as nobody trains on
    them. For the split "test" those of `test`.

    SiteConfigInvalid: the first thing that is wrong, or no question, or a name that no benchmark has.
    """
    if data_set.question is None:
        raise SiteConfigInvalid(
            f"Data set {name!r} is no table of questions.",
            hint=f"Set question under [data.{name}] in site.toml to the column with the questions.",
        )
    columns = {
        "question": data_set.question,
        "context": data_set.context,
        "options": data_set.options,
        "answer": data_set.answer,
    }
    path = path_of(data_set, name=name, split="test" if split == "test" else "train")
    source = Source(data_set, name, path, columns, optional=frozenset({"context"}))
    if name not in KINDS:
        raise source.wrong(
            "holds questions, but no benchmark has its name.", hint=f"The benchmarks are {', '.join(KINDS)}."
        )
    found = [_question(record, source=source) for record in records(source) if record.values]
    if not found:
        raise source.wrong("has no questions.", hint=f"See path under [data.{name}] in site.toml.")
    return found


def _question(record: Record, *, source: Source) -> Question:
    asked = source.text(record, "question")
    if not asked.strip():
        raise source.wrong("there is no question.", row=record.row)
    texts = _options(record, source=source)
    right = _place(record, source=source, options=len(texts))
    if KINDS[source.name] == "boolean":
        options = tuple(text.lower() for text in texts)
        unfit = not set(options) <= set(FORMS["boolean"])
        body = f"{source.text(record, 'context')}\n{asked}"
    else:
        options = tuple(letter.upper() for letter in FORMS["mcq"][: len(texts)])
        unfit = len(texts) > len(options)
        listed = "\n".join(f"{letter}. {text}" for letter, text in zip(options, texts, strict=False))
        body = f"Question: {asked}{'' if asked.endswith(('?', '.')) else '?'}\n\nOptions:\n{listed}"
    if unfit:
        forms = ", ".join(FORMS[KINDS[source.name]])
        raise source.wrong(f"these are not the options of this benchmark, {forms}.", row=record.row)
    prompt = PROMPT.format(instruction=INSTRUCTIONS[source.name], body=body)
    return Question(prompt, options, options[right])


def _place(record: Record, *, source: Source, options: int) -> int:
    found = source.decoded(record, "answer")
    if isinstance(found, str) and found.strip().isdecimal():
        found = int(found)
    if isinstance(found, int) and not isinstance(found, bool) and 0 <= found < options:
        return found
    seen = shorten(str(found))
    raise source.wrong(
        f"the answer {seen} in column {source.columns['answer']!r} is not the place of an option, 0 to {options - 1}.",
        row=record.row,
        seen=seen,
    )


def _options(record: Record, *, source: Source) -> tuple[str, ...]:
    """A list; in CSV, which has none, its JSON."""
    found: Any = source.decoded(record, "options")
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except (ValueError, RecursionError):
            found = None
    if not isinstance(found, list) or len(found) < 2 or not all(isinstance(option, str) for option in found):
        raise source.wrong(
            f"column {source.columns['options']!r} does not hold a list of two texts or more.",
            row=record.row,
            hint='In CSV a list is written as JSON: ["yes", "no"].',
        )
    return tuple(found)
