"""Turns public data sets, in the files in which they are published, into the tables that the recipes name.

    python -m deploy.recipes.prepare imdb --from downloads/imdb --to deploy/recipes/hilmkil-2021/data/imdb

Knows imdb, ag-news, yelp-full, cola and sst2. --from is the folder with the publisher's files, as the hub has them
(Parquet) or as CSV, TSV or JSON lines, or one such file, of which a part is then held out. What comes of it is
train.parquet, validation.parquet and test.parquet with the columns text and label, the label in words. Where the
publisher's test rows have no labels (GLUE), its validation rows are the test, as in most papers; validation rows are a
share of the training rows that their text decides.

Nothing is downloaded, and nothing of it may be shipped: of most of these sets the licence does not permit it.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from deploy.data.make_medquad import draw
from protos.errors import InvalidInput, SilotuneError

SPLITS = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}
FORMATS = (".parquet", ".csv", ".tsv", ".jsonl", ".json")
# Of a set that is published in one file.
TEST_SHARE = 0.2
MOST_CHARACTERS = 1 << 24


@dataclass(frozen=True)
class Published:
    """How a set is published. Columns are taken by name, or by place where a file has no line of names."""

    labels: tuple[str, ...]
    # Names that the text's columns have in one publication or another; the parts of one are joined by a blank.
    text: tuple[tuple[str, ...], ...] = (("text",), ("sentence",))
    label: tuple[str, ...] = ("label",)
    places: tuple[str, ...] = ("label", "text")


SETS = {
    "imdb": Published(("negative", "positive"), (("text",), ("review",)), ("label", "sentiment"), ("text", "label")),
    "ag-news": Published(
        ("World", "Sports", "Business", "Sci/Tech"),
        (("text",), ("title", "description")),
        ("label", "class index", "class"),
        ("label", "title", "description"),
    ),
    "yelp-full": Published(("1 star", "2 stars", "3 stars", "4 stars", "5 stars"), (("text",),), ("label", "stars")),
    "cola": Published(("unacceptable", "acceptable"), places=("source", "label", "mark", "sentence")),
    "sst2": Published(("negative", "positive"), places=("sentence", "label")),
}

Row = Mapping[str, Any]


def prepare(name: str, *, source: Path, out: Path, validation_share: float, rows: int | None = None) -> dict[str, int]:
    """Writes the tables; the number of rows by file. InvalidInput: the source is not this set.

    Of the training rows it takes `rows`, in an order of its own; None: all, in theirs.
    """
    published = SETS[name]
    files = _files(source)
    read = {split: _labelled(paths, published=published, name=name) for split, paths in files.items()}
    found = _in_words({split: rows for split, rows in read.items() if rows}, published=published, name=name)
    if not found.get("train"):
        raise InvalidInput(f"{source} has no training rows with labels.", hint=_WANTED)
    if source.is_file():
        found = _parted(found["train"], other="test", share=TEST_SHARE)
    if "test" not in found:
        if "validation" not in found:
            raise InvalidInput(f"{source} has no test rows with labels.", hint=_WANTED)
        found["test"] = found.pop("validation")
    if "validation" not in found and validation_share:
        found |= _parted(found["train"], other="validation", share=validation_share)
    if rows is not None:
        found["train"] = sorted(found["train"], key=lambda row: draw(f"rows {row['text']}"))[:rows]
    found = {split: taken for split, taken in found.items() if taken}
    for split, taken in found.items():
        out.mkdir(parents=True, exist_ok=True)
        table = pyarrow.Table.from_pylist(taken)
        pyarrow.parquet.write_table(table, out / f"{split}.parquet", compression="zstd")
    return {f"{split}.parquet": len(found[split]) for split in SPLITS if split in found}


_WANTED = f"The files' names must say train, test or validation and end in one of {', '.join(FORMATS)}."


def _files(source: Path) -> dict[str, list[Path]]:
    """The files of each split; all that there are below a folder, and a single file as if it were for training."""
    if source.is_file():
        return {"train": [source]}
    if not source.is_dir():
        raise InvalidInput(f"{source} does not exist.")
    found: dict[str, list[Path]] = {}
    for path in sorted(source.rglob("*")):
        # GLUE's folders have more than what is labelled, and a hub's cache keeps its files under other names too.
        words = set(re.split(r"[^a-z]+", path.stem.lower()))
        split = next((split for split, names in SPLITS.items() if words & set(names)), None)
        if split and path.suffix.lower() in FORMATS and path.is_file():
            found.setdefault(split, []).append(path)
    if not found:
        raise InvalidInput(f"{source} holds no files of a data set.", hint=_WANTED)
    return found


def _labelled(paths: Sequence[Path], *, published: Published, name: str) -> list[tuple[str, str]]:
    """Texts and labels as they are. Rows with label -1, GLUE's sign for one that is kept secret, are left out."""
    found = []
    for path in paths:
        # Test rows are often published without the column.
        required = "test" not in path.name.lower()
        for number, row in enumerate(_rows(path, places=published.places), start=1):
            fields = {str(key).strip().lower(): value for key, value in row.items()}
            parts = next((parts for parts in published.text if all(part in fields for part in parts)), None)
            column = next((column for column in published.label if column in fields), None)
            if parts is None or (column is None and required):
                raise InvalidInput(
                    f"{path}, row {number}, has the columns {', '.join(fields)}: {name} is not published so.",
                    hint=f"Text: {' or '.join(' and '.join(parts) for parts in published.text)}; "
                    f"label: {' or '.join(published.label)}.",
                )
            label = str(fields.get(column or "", -1)).strip()
            text = " ".join(str(fields[part]).strip() for part in parts)
            if text and label != "-1":
                found.append((text, label))
    return found


def _in_words(
    found: Mapping[str, Sequence[tuple[str, str]]], *, published: Published, name: str
) -> dict[str, list[dict[str, str]]]:
    """The rows with the labels' names. InvalidInput: there is a label that the set does not have."""
    given = {label for rows in found.values() for _, label in rows}
    known = {label.casefold(): label for label in published.labels}
    if all(label.isdigit() for label in given):
        # Yelp's and AG's own CSV files count from 1, the hub's tables from 0.
        first = int("0" not in given)
        known = {str(place): label for place, label in enumerate(published.labels, start=first)}
    if unknown := sorted(label for label in given if label.casefold() not in known):
        raise InvalidInput(
            f"{unknown[0]!r} is no label of {name}, which has {', '.join(published.labels)}.",
            hint="Is it another data set?",
        )
    return {
        split: [{"text": text, "label": known[label.casefold()]} for text, label in rows]
        for split, rows in found.items()
    }


def _rows(path: Path, *, places: Sequence[str]) -> Iterator[Row]:
    """The rows of a file as they are. InvalidInput: it cannot be read."""
    try:
        if path.suffix == ".parquet":
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
            return
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix in (".json", ".jsonl"):
                yield from (json.loads(line) for line in file if line.strip())
            else:
                yield from _separated(file, tabs=path.suffix == ".tsv", places=places)
    except (UnicodeDecodeError, ValueError, csv.Error, pyarrow.ArrowException) as error:
        raise InvalidInput(f"{path} cannot be read: {error}.") from error


def _separated(file: Any, *, tabs: bool, places: Sequence[str]) -> Iterator[Row]:
    csv.field_size_limit(MOST_CHARACTERS)
    lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(file)
    first = next(lines, [])
    named = any(word.strip().lower() in _NAMES for word in first)
    names = first if named else list(places)
    for words in ([] if named else [first]), lines:
        for line in words:
            yield dict(zip(names, line, strict=False))


_NAMES = {"text", "sentence", "review", "label", "sentiment", "stars", "class index", "title", "description"}


def _parted(rows: Sequence[dict[str, str]], *, other: str, share: float) -> dict[str, list[dict[str, str]]]:
    """The rows in two: what text is in which part depends on the text alone."""
    parts: dict[str, list[dict[str, str]]] = {"train": [], other: []}
    for row in rows:
        parts[other if draw(f"{other} {row['text']}") < share else "train"].append(row)
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=sorted(SETS), metavar="SET", help=f"One of {', '.join(sorted(SETS))}.")
    parser.add_argument("--from", dest="source", type=Path, required=True, metavar="DIR_OR_FILE")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--validation", type=float, default=0.05, metavar="SHARE", help="Of the training rows; 0: none."
    )
    parser.add_argument("--rows", type=int, metavar="N", help="Take only so many of the training rows.")
    arguments = parser.parse_args()
    try:
        made = prepare(
            arguments.set, source=arguments.source, out=arguments.to, validation_share=arguments.validation,
            rows=arguments.rows,
        )  # fmt: skip
    except SilotuneError as error:
        sys.exit(str(error))
    for name, count in made.items():
        print(f"{count:8} rows  {arguments.to / name}")


if __name__ == "__main__":
    main()
