"""Makes the shipped samples for instruction tuning: `medquad_alpaca` and `questions`.

    python -m deploy.data.make_samples SOURCE [--out DIRECTORY]

SOURCE holds medquad/{train,test}.parquet (instruction, input, output, client, qtype, focus, id) and
{pubmedqa,medqa,medmcqa}/test.parquet (id, question, context, options, answer, answer_text).

MedQuAD in Alpaca form stands in for the flashcards of the FlowerTune study, whose origin is unclear and which therefore
cannot be shipped. An answer is cut after the last sentence that ends within its first WORDS words, so that a small
model sees whole completions. Rows for training, for the small base model and held-out rows are about different
conditions.

Every choice is a SHA-256 of the row's id or focus: the same source gives the same rows in the same order anywhere.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from deploy.data.make_medquad import draw, site_name, without_questions

WORDS = 48
# The two largest institutes have thousands of rows; this many keep the sample below a megabyte.
MOST_ROWS = 2000
# Part of the conditions that only the small base model and its tokenizer learn from.
BASE_SHARE = 0.3
VALIDATION_ROWS, TEST_ROWS = 300, 500
QUESTION_ROWS = {"pubmedqa": 100, "medqa": 100, "medmcqa": 200}
ALPACA, QUESTIONS = "medquad_alpaca", "questions"
ALPACA_COLUMNS = ("instruction", "input", "output", "client", "qtype", "focus", "id")
QUESTION_COLUMNS = ("id", "question", "context", "options", "answer", "answer_text")

_SENTENCE_END = re.compile(r"[.!]$")


def cut(answer: str) -> str:
    """The whole sentences within the first WORDS words of an answer; empty when not even one ends there.

    Questions that it opens with are left out: GARD repeats the one that was asked at the head of most answers.
    """
    words = without_questions(answer).split()[:WORDS]
    while words and not _SENTENCE_END.search(words[-1]):
        words.pop()
    return " ".join(words)


def make(source: Path, *, out: Path) -> dict[str, int]:
    """Writes the files; the number of rows by file."""
    rows, held_out = (_alpaca(source / "medquad" / f"{name}.parquet") for name in ("train", "test"))
    base = [row for row in rows if draw(f"base {row['focus'].casefold()}") < BASE_SHARE]
    sites = [row for row in rows if draw(f"base {row['focus'].casefold()}") >= BASE_SHARE]
    # Stock sentences stand in many answers word for word; a held-out row with one of them would be no test.
    seen = {row["output"] for row in rows}
    fresh = list({row["output"]: row for row in held_out if row["output"] not in seen}.values())
    # By condition, so that none is in both.
    fresh.sort(key=lambda row: draw(row["focus"].casefold()))
    files = {
        f"{ALPACA}/train.parquet": _at_most(sites, MOST_ROWS),
        f"{ALPACA}/base.parquet": _at_most(base, MOST_ROWS // 2),
        f"{ALPACA}/validation.parquet": fresh[:VALIDATION_ROWS],
        f"{ALPACA}/test.parquet": [
            row for row in fresh[VALIDATION_ROWS:] if row["focus"] != fresh[VALIDATION_ROWS - 1]["focus"]
        ][:TEST_ROWS],
    }
    for name, chosen in files.items():
        write(out / name, chosen, columns=ALPACA_COLUMNS)
    counts = {name: len(chosen) for name, chosen in files.items()}
    for name, most in QUESTION_ROWS.items():
        questions = pyarrow.parquet.read_table(source / name / "test.parquet").to_pylist()
        chosen = sorted(questions, key=lambda row: draw(str(row["id"])))[:most]
        write(out / QUESTIONS / f"{name}.parquet", chosen, columns=QUESTION_COLUMNS)
        counts[f"{QUESTIONS}/{name}.parquet"] = len(chosen)
    return counts


def write(path: Path, rows: Iterable[Mapping[str, Any]], *, columns: tuple[str, ...]) -> None:
    """A Parquet file that is the same, byte for byte, whenever the rows are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist([{name: row[name] for name in columns} for row in rows])
    pyarrow.parquet.write_table(table, path, compression="zstd", compression_level=19)


def _alpaca(path: Path) -> list[dict[str, Any]]:
    rows = [
        {**row, "client": site_name(row["client"]), "focus": row["focus"] or "", "output": cut(row["output"])}
        for row in pyarrow.parquet.read_table(path).to_pylist()
    ]
    return sorted((row for row in rows if row["output"]), key=lambda row: draw(row["id"]))


def _at_most(rows: Iterable[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """The first `most` rows of each institute."""
    counted: Counter[str] = Counter()
    chosen = []
    for row in rows:
        counted[row["client"]] += 1
        if counted[row["client"]] <= most:
            chosen.append(row)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    for name, count in make(arguments.source, out=arguments.out).items():
        print(f"{count:6} rows  {arguments.out / name}")


if __name__ == "__main__":
    main()
