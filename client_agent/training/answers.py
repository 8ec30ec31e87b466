"""What a model answered to a question with options, by the rule of the study, and how sure the figures are.

The rule is that of Flower's medical evaluation (adap/flower, benchmarks/flowertune-llm/evaluation/medical), kept to the
letter because figures that are to be compared must be counted alike: it takes the first letter of anything for an
answer ("Aspirin" is A), and knows "maybe" only when nothing else was said. Plain Python, for files as for tasks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from protos.proportions import mcnemar, wilson

Kind = Literal["boolean", "mcq"]
# The options of each benchmark: words, or letters of which a question has as many as it has options.
KINDS: dict[str, Kind] = {"pubmedqa": "boolean", "medmcqa": "mcq", "medqa": "mcq"}
FORMS: dict[Kind, tuple[str, ...]] = {"boolean": ("yes", "no", "maybe"), "mcq": ("a", "b", "c", "d", "e")}
# What the rule takes for an answer whatever the kind; all else is compared as it was written.
_PLAIN = ("a", "b", "c", "d", "e", "yes", "no")
_DOUBLED = (("yesyes", "yes"), ("nono", "no"), ("yesno", "yes"), ("noyes", "no"))


@dataclass(frozen=True)
class Answer:
    """One answer: whether it is right, whether it is one of the options at all, and whether it is nothing but that."""

    right: bool
    parseable: bool
    exact: bool


def extract(output: str, *, kind: Kind) -> str:
    """The answer that the rule finds in a model's output; the lower-case output itself where it finds none."""
    output = output.lower()
    found = output
    if "\n##" in found:
        found = found.split("\n##")[1].split("\n")[0].strip()
    found = re.sub(" +", " ", re.sub("[^a-z0-9]", " ", found).strip())
    if kind == "mcq":
        found = found[:1]
    else:
        for doubled, once in _DOUBLED:
            if doubled in found:
                found = found.replace(doubled, once)
                break
    return found if found in _PLAIN else output


def judge(output: str, *, gold: str, kind: Kind) -> Answer:
    """An output against the right answer, a letter or a word in either case."""
    found, gold = extract(output, kind=kind), gold.lower()
    right = found == gold
    return Answer(right, right or found in FORMS[kind], output.lower() in FORMS[kind])


@dataclass(frozen=True)
class Score:
    """Counts of a list of answers, and the shares that follow from them."""

    questions: int
    correct: int
    parseable: int
    exact: int

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Score:
        return cls(
            len(answers),
            sum(a.right for a in answers),
            sum(a.parseable for a in answers),
            sum(a.exact for a in answers),
        )

    @property
    def accuracy(self) -> float:
        return self.correct / self.questions

    @property
    def unparseable(self) -> float:
        """The share of answers that are none of the options; they are all wrong."""
        return (self.questions - self.parseable) / self.questions

    @property
    def parseable_accuracy(self) -> float:
        """0 when there is no such answer."""
        return self.correct / self.parseable if self.parseable else 0.0

    @property
    def exact_format(self) -> float:
        return self.exact / self.questions

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the accuracy. Wilson's stays between 0 and 1 and holds for few questions."""
        return wilson(self.correct, self.questions)


@dataclass(frozen=True)
class Change:
    """From one list of answers to another to the same questions. Where the answer could be read both times, what
    changed is knowledge; where it could be read only once, format."""

    questions: int
    gained: int
    lost: int
    # Of these, where one of the two answers is none of the options.
    gained_by_format: int
    lost_by_format: int
    # Questions whose answers are options both times, and how many of them are right the first and the second time.
    both_parseable: int
    both_correct: tuple[int, int]

    @classmethod
    def between(cls, before: Sequence[Answer], after: Sequence[Answer]) -> Change:
        pairs = list(zip(before, after, strict=True))
        gained = [(a, b) for a, b in pairs if b.right and not a.right]
        lost = [(a, b) for a, b in pairs if a.right and not b.right]
        both = [(a, b) for a, b in pairs if a.parseable and b.parseable]
        return cls(
            questions=len(pairs),
            gained=len(gained),
            lost=len(lost),
            gained_by_format=sum(not a.parseable for a, _ in gained),
            lost_by_format=sum(not b.parseable for _, b in lost),
            both_parseable=len(both),
            both_correct=(sum(a.right for a, _ in both), sum(b.right for _, b in both)),
        )

    @property
    def total(self) -> float:
        """The change of the accuracy: `format` + `knowledge`."""
        return (self.gained - self.lost) / self.questions

    @property
    def format(self) -> float:
        return (self.gained_by_format - self.lost_by_format) / self.questions

    @property
    def knowledge(self) -> float:
        return self.total - self.format

    @property
    def p_value(self) -> float:
        return mcnemar(self.gained, self.lost)
