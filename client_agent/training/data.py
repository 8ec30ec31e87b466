"""A site's rows: read from CSV, JSON lines or Parquet, checked, mapped to the recipe's labels, and split.

Nothing here imports torch, so that the daemon and `silotune-agent check` read rows by the very rules of the trainer.

A wrong row ends the reading with one sentence that names the data set, the row (1 is the first row of data, blank ones
counted) and what to do. What the sentence quotes from the file is repeated in `facts["seen"]`: a person at the site
needs it, and it must not leave the site, because a wrongly configured column may hold anything (`without_content`).
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

from client_agent.settings import DataSet
from protos.errors import SilotuneError, SiteConfigInvalid

Split = Literal["train", "validation", "test"]
FORMATS = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
MAX_FIELD_CHARACTERS = 1 << 30
BATCH_ROWS = 1024
SHOWN_NAMES = 20
SHOWN_CHARACTERS = 60
# Python's stand-ins for bytes that do not decode (surrogateescape), and what a broken \u escape in JSON becomes.
_UNDECODABLE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Rows:
    """The usable rows of one split: `labels[i]` is an index into `label_names`."""

    texts: list[str]
    labels: list[int]
    label_names: tuple[str, ...]
    # Rows of the file that were left out: no text, or a label that the recipe does not have where site.toml permits it.
    skipped: int

    def __len__(self) -> int:
        return len(self.texts)


class _Record(NamedTuple):
    row: int
    text: Any
    label: Any


@dataclass(frozen=True)
class _Source:
    """One file of a data set, and how a fault in it is put into words."""

    data_set: DataSet
    name: str
    path: Path

    def wrong(self, sentence: str, *, row: int | None = None, hint: str = "", seen: str = "") -> SiteConfigInvalid:
        where = f"Data set {self.name!r}" + (f", row {row}: " if row is not None else " ")
        facts = {"seen": seen} if seen else {}
        return SiteConfigInvalid(where + sentence, hint=hint, **facts)

    def no_column(self, column: str, columns: Iterable[str], *, row: int | None = None) -> SiteConfigInvalid:
        names = list(columns)
        seen = ", ".join(shorten(name) for name in names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")
        hint = f"Set text and label under [data.{self.name}] in site.toml to two of these."
        if len(names) == 1 and (other := next((mark for mark in ";\t|" if mark in names[0]), None)):
            hint = f"Is {other!r} what separates the columns? Then set delimiter under [data.{self.name}] in site.toml."
        verb = "there is" if row is not None else "has"
        return self.wrong(f"{verb} no column {column!r}; the columns are {seen}.", row=row, hint=hint, seen=seen)

    def undecodable(self, column: str, *, row: int) -> SiteConfigInvalid:
        return self.wrong(
            f"column {column!r} holds bytes that are not {self.data_set.encoding}.",
            row=row,
            hint=f'Name the file\'s encoding under [data.{self.name}] in site.toml, for example encoding = "latin-1".',
        )


def read_rows(data_set: DataSet, *, name: str, labels: tuple[str, ...] | None, split: Split) -> Rows:
    """The rows of a split, in the file's order. Paths in `data_set` are taken as they are: make them absolute before.

    `labels` are the recipe's, in order; None accepts every label, and `label_names` are then those found, sorted.
    SiteConfigInvalid: the first thing that is wrong, or no usable row. A label that no row has is no fault.
    """
    source = _Source(data_set, name, _path(data_set, name=name, split=split))
    share = data_set.validation if isinstance(data_set.validation, float) and split != "test" else None
    texts: list[str] = []
    found: list[str] = []
    total = skipped = 0
    for record in _records(source):
        total = record.row
        text = _text(record, source=source)
        if not text.strip():
            skipped += 1
            continue
        label = _label(record, source=source, labels=labels)
        if label is None:
            skipped += 1
            continue
        if share is None or _is_validation(text, share) == (split == "validation"):
            texts.append(text)
            found.append(label)
    if not texts:
        reason = "has no rows" if not total else f"has no usable rows for {split} ({total} rows, {skipped} skipped)"
        raise source.wrong(f"{reason}.", hint=f"See path and validation under [data.{name}] in site.toml.")
    names = labels if labels is not None else tuple(sorted(set(found)))
    index = {label: number for number, label in enumerate(names)}
    return Rows(texts, [index[label] for label in found], names, skipped)


def fingerprint(data_set: DataSet, *, name: str, split: Split) -> tuple[object, ...]:
    """Equal as long as the split's rows are: the configuration, and the file's identity, time and size."""
    path = _path(data_set, name=name, split=split)
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(_Source(data_set, name, path), error) from error
    return (data_set.model_dump_json(), name, split, status.st_ino, status.st_mtime_ns, status.st_size)


def without_content(error: SilotuneError) -> str:
    """The error's sentence without anything quoted from the site's rows: the one that may leave the site."""
    seen = error.facts.get("seen")
    return error.message.replace(seen, "(kept at the site)") if seen else error.message


def shorten(text: str) -> str:
    return ascii(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "...")


def _path(data_set: DataSet, *, name: str, split: Split) -> Path:
    if split == "test":
        if data_set.test is None:
            raise SiteConfigInvalid(
                f"Data set {name!r} has no test rows.", hint=f"Set test = <file> under [data.{name}] in site.toml."
            )
        return Path(data_set.test)
    if split == "validation" and isinstance(data_set.validation, str):
        return Path(data_set.validation)
    return Path(data_set.path)


def _is_validation(text: str, share: float) -> bool:
    """Decided by the text alone: stable over rounds and restarts, and copies of a text stay on one side."""
    digest = blake2b(text.strip().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _text(record: _Record, *, source: _Source) -> str:
    value = _decoded(record.text, column=source.data_set.text, source=source, row=record.row)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise source.wrong(
            f"column {source.data_set.text!r} holds {type(value).__name__} values where texts are expected.",
            row=record.row,
            hint=f"Set text under [data.{source.name}] in site.toml to the column with the texts.",
        )
    return value


def _label(record: _Record, *, source: _Source, labels: tuple[str, ...] | None) -> str | None:
    """The recipe's label of a row; None when it has none and such rows are to be skipped."""
    value = _label_text(_decoded(record.label, column=source.data_set.label, source=source, row=record.row))
    label = source.data_set.labels.get(value, value)
    if label and (labels is None or label in labels):
        return label
    if source.data_set.unknown_labels == "skip":
        return None
    table = f"[data.{source.name}.labels] in site.toml"
    if not label:
        raise source.wrong(
            f"there is no label in column {source.data_set.label!r}.",
            row=record.row,
            hint=f'Fill it in, or set unknown_labels = "skip" under [data.{source.name}] in site.toml.',
        )
    seen = shorten(value)
    wanted = ", ".join((labels or ())[:SHOWN_NAMES]) + (", ..." if len(labels or ()) > SHOWN_NAMES else "")
    raise source.wrong(
        f"the label {seen} in column {source.data_set.label!r} is none of the recipe's ({wanted}).",
        row=record.row,
        hint=f'Map it to one of them under {table}, or set unknown_labels = "skip".',
        seen=seen,
    )


def _label_text(value: object) -> str:
    """Labels are compared as text: 1, 1.0 and "1" are one label, and so are true and "true"."""
    if value is None or value != value:  # NaN, which is how pandas writes a missing number
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _decoded(value: object, *, column: str, source: _Source, row: int) -> object:
    if isinstance(value, bytes):
        try:
            return value.decode(source.data_set.encoding)
        except UnicodeDecodeError as error:
            raise source.undecodable(column, row=row) from error
    if isinstance(value, str) and _UNDECODABLE.search(value):
        raise source.undecodable(column, row=row)
    return value


def _records(source: _Source) -> Iterator[_Record]:
    kind = source.data_set.format or FORMATS.get(source.path.suffix.lower())
    readers = {"csv": _csv_records, "jsonl": _jsonl_records, "parquet": _parquet_records}
    if kind is None:
        raise source.wrong(
            f"has a file that ends in {source.path.suffix!r}, which names no known format.",
            hint=f'Set format = "csv", "jsonl" or "parquet" under [data.{source.name}] in site.toml.',
        )
    try:
        "".encode(source.data_set.encoding)
    except LookupError:
        raise source.wrong(f"names an unknown encoding, {source.data_set.encoding!r}.") from None
    try:
        yield from readers[kind](source)
    except UnicodeError as error:
        raise source.wrong(f"has a file that is not {source.data_set.encoding}.") from error
    except OSError as error:
        raise _unreadable(source, error) from error


def _unreadable(source: _Source, error: OSError) -> SiteConfigInvalid:
    reason = error.strerror or type(error).__name__
    return source.wrong(
        f"has a file that cannot be read: {reason}.", hint=f"See the paths under [data.{source.name}] in site.toml."
    )


def _encoding(data_set: DataSet) -> str:
    # Excel begins a UTF-8 file with a byte order mark, which would become part of the first column's name.
    return "utf-8-sig" if codecs.lookup(data_set.encoding).name == "utf-8" else data_set.encoding


def _csv_records(source: _Source) -> Iterator[_Record]:
    data_set = source.data_set
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    row = 0
    with source.path.open(encoding=_encoding(data_set), errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=data_set.delimiter, strict=True)
        try:
            columns = [column.strip() for column in next(reader, [])]
            if not columns:
                raise source.wrong("has an empty file.", hint="Its first line must name the columns.")
            for wanted in (data_set.text, data_set.label):
                if wanted not in columns:
                    raise source.no_column(wanted, columns)
            text, label = columns.index(data_set.text), columns.index(data_set.label)
            for row, fields in enumerate(reader, start=1):
                if not fields:
                    yield _Record(row, None, None)
                    continue
                if len(fields) != len(columns):
                    raise source.wrong(
                        f"there are {len(fields)} fields for {len(columns)} columns.",
                        row=row,
                        hint="A text that holds the delimiter, a quote or a line break must stand in double quotes.",
                    )
                yield _Record(row, fields[text], fields[label])
        except csv.Error as error:
            raise source.wrong(
                f"this is not valid CSV: {error}.", row=row + 1, hint="Look for a quote that is not closed or doubled."
            ) from error


def _jsonl_records(source: _Source) -> Iterator[_Record]:
    data_set = source.data_set
    with source.path.open(encoding=_encoding(data_set), errors="surrogateescape") as file:
        row = 0
        for row, line in enumerate(file, start=1):
            if not line.strip():
                yield _Record(row, None, None)
                continue
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise source.wrong("this is not valid JSON.", row=row, hint="Each line is one JSON object.") from error
            if not isinstance(fields, dict):
                raise source.wrong("this is not a JSON object.", row=row, hint="Each line is one JSON object.")
            for wanted in (data_set.text, data_set.label):
                if wanted not in fields:
                    raise source.no_column(wanted, fields, row=row)
            yield _Record(row, fields[data_set.text], fields[data_set.label])
        if not row:
            raise source.wrong("has an empty file.", hint="Each line is one JSON object.")


def _parquet_records(source: _Source) -> Iterator[_Record]:
    # Here, because it takes longer to import than the other formats take to read.
    import pyarrow
    from pyarrow.parquet import ParquetFile

    data_set = source.data_set
    try:
        with ParquetFile(source.path) as file:
            for wanted in (data_set.text, data_set.label):
                if wanted not in file.schema_arrow.names:
                    raise source.no_column(wanted, file.schema_arrow.names)
            row = 0
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=[data_set.text, data_set.label]):
                for text, label in zip(batch.column(data_set.text), batch.column(data_set.label), strict=True):
                    row += 1
                    yield _Record(
                        row,
                        _value(text, column=data_set.text, source=source, row=row),
                        _value(label, column=data_set.label, source=source, row=row),
                    )
    except pyarrow.ArrowException as error:
        raise source.wrong("has a file that is not valid Parquet.") from error


def _value(scalar: Any, *, column: str, source: _Source, row: int) -> object:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        raise source.undecodable(column, row=row) from error
