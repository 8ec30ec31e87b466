"""A site's rows, checked and split: texts mapped to the recipe's labels, or instructions with their answers.

Nothing here imports torch, so that the daemon and `silotune-agent check` read rows by the very rules of the trainer.
How a fault is told is in tables.py; `without_content` makes of it what may leave the site.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeVar

from client_agent.settings import DataSet
from client_agent.training.questions import Question, read_questions
from client_agent.training.tables import SHOWN_NAMES, Record, Source, Split, path_of, records, shorten
from protos.errors import SilotuneError, SiteConfigInvalid


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


@dataclass(frozen=True)
class Instruction:
    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class Instructions:
    """The usable rows of one split; those without an instruction or an output were left out."""

    rows: list[Instruction]
    skipped: int

    def __len__(self) -> int:
        return len(self.rows)


Found = TypeVar("Found")


def read(data_set: DataSet, *, name: str, split: Split) -> Rows | Instructions | list[Question]:
    """The rows as the table is described, whatever its labels are. Errors as `read_rows`."""
    if data_set.question is not None:
        return read_questions(data_set, name=name, split=split)
    if data_set.instruction is not None:
        return read_instructions(data_set, name=name, split=split)
    if not data_set.label:
        return read_texts(data_set, name=name, labels=("",), split=split)
    return read_rows(data_set, name=name, labels=None, split=split)


def read_rows(data_set: DataSet, *, name: str, labels: tuple[str, ...] | None, split: Split) -> Rows:
    """The rows of a split, in the file's order. Paths in `data_set` are taken as they are: make them absolute before.

    `labels` are the recipe's, in order; None accepts every label, and `label_names` are then those found, sorted.
    SiteConfigInvalid: the first thing that is wrong, or no usable row. A label that no row has is no fault.
    """
    if data_set.instruction is not None or data_set.question is not None or not data_set.label:
        raise SiteConfigInvalid(
            f"Data set {name!r} is no table of texts and labels, which this job needs.",
            hint=f"Describe a table with the columns text and label under [data.{name}] in site.toml.",
        )
    columns = {"text": data_set.text, "label": data_set.label}
    source = Source(data_set, name, path_of(data_set, name=name, split=split), columns)

    def usable(record: Record) -> tuple[str, tuple[str, str]] | None:
        text = source.text(record, "text")
        label = _label(record, source=source, labels=labels) if text.strip() else None
        return None if label is None else (text, (text, label))

    found, skipped = _kept(source, split=split, usable=usable)
    names = labels if labels is not None else tuple(sorted({label for _, label in found}))
    index = {label: number for number, label in enumerate(names)}
    return Rows([text for text, _ in found], [index[label] for _, label in found], names, skipped)


def read_texts(data_set: DataSet, *, name: str, labels: tuple[str, ...], split: Split) -> Rows:
    """The texts of a split, in the file's order, whether or not they have labels: every row's is the first one.

    SiteConfigInvalid: the first thing that is wrong, or no row with a text.
    """
    source = Source(data_set, name, path_of(data_set, name=name, split=split), {"text": data_set.text})

    def usable(record: Record) -> tuple[str, str] | None:
        text = source.text(record, "text")
        return (text, text) if text.strip() else None

    texts, skipped = _kept(source, split=split, usable=usable)
    return Rows(texts, [0] * len(texts), labels, skipped)


def read_instructions(data_set: DataSet, *, name: str, split: Split) -> Instructions:
    """The rows of a split, in the file's order, as `read_rows`."""
    if data_set.instruction is None:
        raise SiteConfigInvalid(
            f"Data set {name!r} is no table of instructions, which this job needs.",
            hint=f"Set instruction and output under [data.{name}] in site.toml to the columns with both.",
        )
    columns = {"instruction": data_set.instruction, "input": data_set.input, "output": data_set.output}
    if data_set.input == data_set.instruction:
        # As the study reads its flashcards, whose column "instruction" says the same in every row.
        del columns["input"]
    # Only a column that somebody named must be there.
    optional = frozenset({"input"} if data_set.input == DataSet.model_fields["input"].default else ())
    source = Source(data_set, name, path_of(data_set, name=name, split=split), columns, optional)

    def usable(record: Record) -> tuple[str, Instruction] | None:
        row = Instruction(**{"input": "", **{key: source.text(record, key) for key in columns}})
        if not row.instruction.strip() or not row.output.strip():
            return None
        return f"{row.instruction}\n{row.input}", row

    return Instructions(*_kept(source, split=split, usable=usable))


def fingerprint(data_set: DataSet, *, name: str, split: Split) -> tuple[object, ...]:
    """Equal as long as the split's rows are: the configuration, and the file's identity, time and size."""
    path = path_of(data_set, name=name, split=split)
    try:
        status = path.stat()
    except OSError as error:
        raise Source(data_set, name, path, {}).unreadable(error) from error
    return (data_set.model_dump_json(), name, split, status.st_ino, status.st_mtime_ns, status.st_size)


def without_content(error: SilotuneError) -> str:
    """The error's sentence without anything quoted from the site's rows: the one that may leave the site."""
    seen = error.facts.get("seen")
    return error.message.replace(seen, "(kept at the site)") if seen else error.message


def _kept(
    source: Source, *, split: Split, usable: Callable[[Record], tuple[str, Found] | None]
) -> tuple[list[Found], int]:
    """The usable rows of a split, and how many of the file were left out.

    `usable` gives the text that decides about the split, and what the row becomes; None leaves it out.
    """
    data_set = source.data_set
    share = data_set.validation if isinstance(data_set.validation, float) and split != "test" else None
    kept: list[Found] = []
    total = skipped = 0
    for record in records(source):
        total = record.row
        found = usable(record)
        if found is None:
            skipped += 1
        elif share is None or _is_validation(found[0], share) == (split == "validation"):
            kept.append(found[1])
    if not kept:
        reason = "has no rows" if not total else f"has no usable rows for {split} ({total} rows, {skipped} skipped)"
        raise source.wrong(f"{reason}.", hint=f"See path and validation under [data.{source.name}] in site.toml.")
    return kept, skipped


def _is_validation(text: str, share: float) -> bool:
    """Decided by the text alone: stable over rounds and restarts, and copies of a text stay on one side."""
    digest = blake2b(text.strip().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _label(record: Record, *, source: Source, labels: tuple[str, ...] | None) -> str | None:
    """The recipe's label of a row; None when it has none and such rows are to be skipped."""
    value = _label_text(source.decoded(record, "label"))
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
