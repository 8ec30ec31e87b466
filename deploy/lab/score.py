"""Files of answers, one JSON object with `gold` and `output` on each line: how good they are, and how two differ."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client_agent.training.answers import FORMS, KINDS, Answer, Change, Score, judge
from protos.errors import InvalidInput

_GZIP = b"\x1f\x8b"
SHOWN_CHARACTERS = 40


@dataclass(frozen=True)
class Answers:
    """The answers in a file, in its order, and the right ones in lower case."""

    golds: list[str]
    answers: list[Answer]
    # The line of each: blank ones are left out.
    lines: list[int]


def read_answers(path: Path, *, benchmark: str) -> Answers:
    """InvalidInput names the file, the line and what is wrong with it, or says that there is no answer at all."""
    kind = KINDS[benchmark]
    found = Answers([], [], [])
    for number, fields in _objects(path):
        where = f"{path}, line {number}"
        for key in ("gold", "output"):
            if key not in fields:
                raise InvalidInput(f"{where}: there is no {key!r}.", hint='Each line needs "gold" and "output".')
            if not isinstance(fields[key], str):
                raise InvalidInput(f"{where}: {key!r} is {_shown(fields[key])}, not a text.")
        gold = fields["gold"].lower()
        if gold not in FORMS[kind]:
            raise InvalidInput(
                f"{where}: the right answer is {_shown(fields['gold'])}, which is no option of {benchmark}.",
                hint=f"Its options are {', '.join(FORMS[kind])}. Is it another benchmark's file?",
            )
        found.golds.append(gold)
        found.answers.append(judge(fields["output"], gold=gold, kind=kind))
        found.lines.append(number)
    if not found.answers:
        raise InvalidInput(f"{path} holds no answers.", hint='Each line is a JSON object with "gold" and "output".')
    return found


def score(path: Path, *, benchmark: str) -> Score:
    return Score.of(read_answers(path, benchmark=benchmark).answers)


def compare(first: Path, second: Path, *, benchmark: str) -> tuple[Score, Score, Change]:
    """Both files' scores, and what changed. InvalidInput unless they answer the same questions in the same order."""
    before, after = read_answers(first, benchmark=benchmark), read_answers(second, benchmark=benchmark)
    if len(before.golds) != len(after.golds):
        raise InvalidInput(
            f"{first} has {len(before.golds)} answers and {second} has {len(after.golds)}.",
            hint="Only answers to the same questions in the same order can be compared.",
        )
    for row, (left, right) in enumerate(zip(before.golds, after.golds, strict=True)):
        if left != right:
            raise InvalidInput(
                f"The right answer is {left!r} in line {before.lines[row]} of {first}, "
                f"and {right!r} in line {after.lines[row]} of {second}.",
                hint="Only answers to the same questions in the same order can be compared.",
            )
    return Score.of(before.answers), Score.of(after.answers), Change.between(before.answers, after.answers)


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        packed = path.suffix == ".gz" or file.peek(2)[:2] == _GZIP
        source: Iterable[bytes] = gzip.GzipFile(fileobj=file) if packed else file
        number = 0
        try:
            for number, line in enumerate(source, start=1):
                if line.strip():
                    yield number, _object(line, where=f"{path}, line {number}")
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            after = f" after line {number}" if number else ""
            raise InvalidInput(f"{path} is not a whole gzip file{after}.", hint="Make or fetch it again.") from error


def _object(line: bytes, *, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{where}: this is not valid JSON.", hint="Each line is one JSON object.") from error
    if not isinstance(fields, dict):
        raise InvalidInput(f"{where}: this is not a JSON object.", hint="Each line is one JSON object.")
    return fields


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
