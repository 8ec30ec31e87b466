"""Makes the shipped sample `deploy/data/clinc150`: what people ask an assistant, and which of ten domains it is about.

    python -m deploy.data.make_intents SOURCE [--out DIRECTORY]

SOURCE holds train.parquet and test.parquet of CLINC150 with the columns text, label_name (the intent) and client (the
domain). The sample is for the recipes' twins: sentences are short, so that a study of many sites fits on two cores.

Every choice is a SHA-256 of the sentence: the same source gives the same rows in the same order anywhere.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet

from deploy.data.make_medquad import draw
from deploy.data.make_samples import write

CLINC150 = "clinc150"
COLUMNS = ("text", "label", "intent")
# Rows of each domain. What no site and no test has, small base models may read: without its labels.
TRAIN_ROWS, VALIDATION_ROWS, TEST_ROWS, BASE_ROWS = 200, 50, 100, 600


def make(source: Path, *, out: Path) -> dict[str, int]:
    """Writes the files; the number of rows by file."""
    rows, held_out = (_rows(source / f"{name}.parquet") for name in ("train", "test"))
    tested = {row["text"] for row in held_out}
    rows = [row for row in rows if row["text"] not in tested]
    train, rows = _take(rows, TRAIN_ROWS)
    validation, rows = _take(rows, VALIDATION_ROWS)
    base, _ = _take(rows, BASE_ROWS)
    test, _ = _take(held_out, TEST_ROWS)
    files = {"train": train, "validation": validation, "test": test, "test_all": held_out, "base": base}
    for name, chosen in files.items():
        write(out / f"{name}.parquet", chosen, columns=COLUMNS[:1] if name == "base" else COLUMNS)
    return {f"{name}.parquet": len(chosen) for name, chosen in files.items()}


def _rows(path: Path) -> list[dict[str, Any]]:
    read = pyarrow.parquet.read_table(path).to_pylist()
    once = {row["text"]: {"text": row["text"], "label": row["client"], "intent": row["label_name"]} for row in read}
    return sorted(once.values(), key=lambda row: draw(row["text"]))


def _take(rows: list[dict[str, Any]], most: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The first `most` rows of each domain, and the others."""
    counted: Counter[str] = Counter()
    taken: list[dict[str, Any]] = []
    left: list[dict[str, Any]] = []
    for row in rows:
        counted[row["label"]] += 1
        (taken if counted[row["label"]] <= most else left).append(row)
    return taken, left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / CLINC150)
    arguments = parser.parse_args()
    for name, count in make(arguments.source, out=arguments.out).items():
        print(f"{count:6} rows  {arguments.out / name}")


if __name__ == "__main__":
    main()
