"""Makes the shipped sample `deploy/data/medquad` from MedQuAD.

    python -m deploy.data.make_medquad SOURCE [--out DIRECTORY]

SOURCE holds train.parquet and test.parquet with the columns id, client (the NIH institute), qtype (the kind of
question), focus (the condition asked about) and output (the answer); no focus is in both files.

The task: tell from a passage of an answer which kind of question it answers. Two things would give the answer away or
let a model learn diseases by heart instead, so `passage` removes them: the condition's name, and the question itself,
which one institute (GARD) repeats at the head of most of its answers.

Every choice is a SHA-256 of the row's id or focus: the same source gives the same rows in the same order anywhere.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

# Eight kinds of question are frequent enough to be learnt and tested.
LABEL_COUNT = 8
# The two largest institutes have thousands of rows; this many keep the sample small and the institutes comparable.
MOST_ROWS = 1200
# More than the demo's model reads, so that a longer text length can be tried.
WORDS = 72
MASK = "[the condition]"
# Part of the house agent's held-out conditions that selects the best round; the others are tested on once.
VALIDATION_SHARE = 1 / 3
SITES, VALIDATION, TEST = "sites", "house/validation.parquet", "house/test.parquet"

_QUESTION = re.compile(r"[^.?!]{1,300}\?\s+")


class Row(NamedTuple):
    id: str
    site: str
    focus: str
    label: str
    text: str


def passage(answer: str, *, focus: str) -> str:
    """The head of an answer without the questions that it opens with, the condition's name masked."""
    text = without_questions(answer)
    # "Attention deficit disorder (ADD)" is mostly written without what is in brackets.
    for name in dict.fromkeys((focus.strip(), re.sub(r"\s*\([^)]*\)\s*$", "", focus).strip())):
        if name:
            text = re.sub(r"\s+".join(map(re.escape, name.split())), MASK, text, flags=re.IGNORECASE)
    return " ".join(text.split()[:WORDS])


def without_questions(answer: str) -> str:
    """An answer, its white space made plain, without the questions that it opens with."""
    text = " ".join(answer.split())
    while question := _QUESTION.match(text):
        text = text[question.end() :]
    return text


def site_name(institute: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", institute.lower()).strip("-")


def make(source: Path, *, out: Path) -> dict[str, int]:
    """Writes the files; the number of rows by file."""
    train, held_out = _read(source / "train.parquet"), _read(source / "test.parquet")
    labels = [label for label, _ in sorted(Counter(row.label for row in train).items(), key=lambda e: (-e[1], e[0]))]
    labels = labels[:LABEL_COUNT]
    by_site: dict[str, list[Row]] = defaultdict(list)
    for row in sorted((row for row in train if row.label in labels), key=lambda row: draw(row.id)):
        if len(by_site[row.site]) < MOST_ROWS:
            by_site[row.site].append(row)
    files = {f"{SITES}/{site}.parquet": rows for site, rows in sorted(by_site.items())}
    # A stock sentence that stands in some site's rows word for word, or twice among these, would be no test.
    seen = {row.text for rows in by_site.values() for row in rows}
    held_out = [row for row in held_out if row.label in labels and row.text not in seen]
    held_out = sorted({row.text: row for row in held_out}.values(), key=lambda row: draw(row.id))
    files[VALIDATION] = [row for row in held_out if draw(row.focus.casefold()) < VALIDATION_SHARE]
    files[TEST] = [row for row in held_out if draw(row.focus.casefold()) >= VALIDATION_SHARE]
    for name, rows in files.items():
        _write(out / name, rows)
    return {name: len(rows) for name, rows in files.items()}


def _read(path: Path) -> list[Row]:
    found = [
        Row(
            id=row["id"],
            site=site_name(row["client"]),
            focus=row["focus"] or "",
            label=row["qtype"],
            text=passage(row["output"], focus=row["focus"] or ""),
        )
        for row in pyarrow.parquet.read_table(path).to_pylist()
    ]
    return [row for row in found if row.text]


def _write(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = ("text", "label", "focus", "id")
    table = pyarrow.table({name: pyarrow.array([getattr(row, name) for row in rows], "string") for name in columns})
    pyarrow.parquet.write_table(table, path, compression="zstd", compression_level=19)


def draw(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "medquad")
    arguments = parser.parse_args()
    for name, count in make(arguments.source, out=arguments.out).items():
        print(f"{count:6} rows  {arguments.out / name}")


if __name__ == "__main__":
    main()
