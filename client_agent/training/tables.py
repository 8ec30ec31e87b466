"""The files that a site's rows lie in: CSV, JSON lines or Parquet, read as plain columns, and every fault in words.

A wrong row ends the reading with one sentence that names the data set, the row (1 is the first row of data, blank ones
counted) and what to do. What the sentence quotes from the file is repeated in `facts["seen"]`: a person at the site
needs it, and it must not leave the site, because a wrongly configured column may hold anything.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from client_agent.settings import DataSet
from protos.errors import SiteConfigInvalid

Split = Literal["train", "validation", "test"]
FORMATS = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
MAX_FIELD_CHARACTERS = 1 << 30
BATCH_ROWS = 1024
SHOWN_NAMES = 20
SHOWN_CHARACTERS = 60
# Python's stand-ins for bytes that do not decode (surrogateescape), and what a broken \u escape in JSON becomes.
_UNDECODABLE = re.compile("[\ud800-\udfff]")


class Record(NamedTuple):
    """One row: its fields by the keys of the source's columns. A blank row has none."""

    row: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """One file of a data set, the columns that are read from it, and how a fault in it is put into words."""

    data_set: DataSet
    name: str
    path: Path
    # Key in site.toml -> column.
    columns: Mapping[str, str]
    # Keys of columns that the file may lack: its rows then have nothing there.
    optional: frozenset[str] = frozenset()

    def wrong(self, sentence: str, *, row: int | None = None, hint: str = "", seen: str = "") -> SiteConfigInvalid:
        where = f"Data set {self.name!r}" + (f", row {row}: " if row is not None else " ")
        facts = {"seen": seen} if seen else {}
        return SiteConfigInvalid(where + sentence, hint=hint, **facts)

    def present(self, there: Iterable[str], *, row: int | None = None) -> dict[str, str]:
        """Key -> column of those that the file has. SiteConfigInvalid: one is missing that it may not lack."""
        names = list(there)
        missing = [column for key, column in self.columns.items() if column not in names and key not in self.optional]
        if missing:
            raise self._no_column(missing[0], names, row=row)
        return {key: column for key, column in self.columns.items() if column in names}

    def _no_column(self, column: str, names: list[str], *, row: int | None) -> SiteConfigInvalid:
        seen = ", ".join(shorten(name) for name in names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")
        *keys, last = self.columns
        wanted = f"{', '.join(keys)} and {last}" if keys else last
        hint = f"Set {wanted} under [data.{self.name}] in site.toml to columns among these."
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

    def unreadable(self, error: OSError) -> SiteConfigInvalid:
        reason = error.strerror or type(error).__name__
        return self.wrong(
            f"has a file that cannot be read: {reason}.", hint=f"See the paths under [data.{self.name}] in site.toml."
        )

    def text(self, record: Record, key: str) -> str:
        """A field that holds text, "" where there is none. SiteConfigInvalid: it holds something else."""
        value = self.decoded(record, key)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.wrong(
                f"column {self.columns[key]!r} holds {type(value).__name__} values where texts are expected.",
                row=record.row,
                hint=f"Set {key} under [data.{self.name}] in site.toml to the column with the texts.",
            )
        return value

    def decoded(self, record: Record, key: str) -> object:
        """A field whose bytes, where it holds any, have become text; None where there is none."""
        value = record.values.get(key)
        if isinstance(value, bytes):
            try:
                return value.decode(self.data_set.encoding)
            except UnicodeDecodeError as error:
                raise self.undecodable(self.columns[key], row=record.row) from error
        if isinstance(value, str) and _UNDECODABLE.search(value):
            raise self.undecodable(self.columns[key], row=record.row)
        return value


def path_of(data_set: DataSet, *, name: str, split: Split) -> Path:
    """Where a split's rows lie. SiteConfigInvalid: the data set has no test rows."""
    if split == "test":
        if data_set.test is None:
            raise SiteConfigInvalid(
                f"Data set {name!r} has no test rows.", hint=f"Set test = <file> under [data.{name}] in site.toml."
            )
        return Path(data_set.test)
    if split == "validation" and isinstance(data_set.validation, str):
        return Path(data_set.validation)
    return Path(data_set.path)


def records(source: Source) -> Iterator[Record]:
    """The rows in the file's order, as they are written. SiteConfigInvalid: the first thing that is wrong."""
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
        raise source.unreadable(error) from error


def shorten(text: str) -> str:
    return ascii(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "...")


def _encoding(data_set: DataSet) -> str:
    # Excel begins a UTF-8 file with a byte order mark, which would become part of the first column's name.
    return "utf-8-sig" if codecs.lookup(data_set.encoding).name == "utf-8" else data_set.encoding


def _csv_records(source: Source) -> Iterator[Record]:
    data_set = source.data_set
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    row = 0
    with source.path.open(encoding=_encoding(data_set), errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=data_set.delimiter, strict=True)
        try:
            columns = [column.strip() for column in next(reader, [])]
            if not columns:
                raise source.wrong("has an empty file.", hint="Its first line must name the columns.")
            places = {key: columns.index(name) for key, name in source.present(columns).items()}
            for row, fields in enumerate(reader, start=1):
                if fields and len(fields) != len(columns):
                    raise source.wrong(
                        f"there are {len(fields)} fields for {len(columns)} columns.",
                        row=row,
                        hint="A text that holds the delimiter, a quote or a line break must stand in double quotes.",
                    )
                yield Record(row, {key: fields[place] for key, place in places.items()} if fields else {})
        except csv.Error as error:
            raise source.wrong(
                f"this is not valid CSV: {error}.", row=row + 1, hint="Look for a quote that is not closed or doubled."
            ) from error


def _jsonl_records(source: Source) -> Iterator[Record]:
    data_set = source.data_set
    with source.path.open(encoding=_encoding(data_set), errors="surrogateescape") as file:
        row = 0
        for row, line in enumerate(file, start=1):
            if not line.strip():
                yield Record(row, {})
                continue
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise source.wrong("this is not valid JSON.", row=row, hint="Each line is one JSON object.") from error
            if not isinstance(fields, dict):
                raise source.wrong("this is not a JSON object.", row=row, hint="Each line is one JSON object.")
            yield Record(row, {key: fields[name] for key, name in source.present(fields, row=row).items()})
        if not row:
            raise source.wrong("has an empty file.", hint="Each line is one JSON object.")


def _parquet_records(source: Source) -> Iterator[Record]:
    # Here, because it takes longer to import than the other formats take to read.
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(source.path) as file:
            columns = source.present(file.schema_arrow.names)
            row = 0
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=list(columns.values())):
                for number in range(len(batch)):
                    row += 1
                    values = {
                        key: _value(batch.column(name)[number], name, source=source, row=row)
                        for key, name in columns.items()
                    }
                    yield Record(row, values)
    except pyarrow.ArrowException as error:
        raise source.wrong("has a file that is not valid Parquet.") from error


def _value(scalar: Any, column: str, *, source: Source, row: int) -> object:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        raise source.undecodable(column, row=row) from error
