"""recipe.toml -> JobSpec; what is wrong is said with the line that it stands on.

No TOML library keeps the lines of keys, so they are found again, and only when there is something to complain about:
each statement of a TOML file (a table's header, or one key with its value) is valid TOML by itself, so statements are
cut out by giving ever more lines to the parser until it is content.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from protos import jobspec
from protos.errors import RecipeInvalid
from protos.jobspec import JobSpec


def read(path: Path) -> JobSpec:
    """The checked spec of a recipe file. RecipeInvalid: `recipe.toml:LINE: the reason.`"""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeInvalid(f"{path}: byte {error.start} is not UTF-8, which TOML files are written in.") from None
    try:
        fields = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeInvalid(_syntax_error(str(error), file=path, text=text)) from None
    try:
        return jobspec.parse(fields)
    except RecipeInvalid as error:
        raise located(error, file=path) from None


def located(error: RecipeInvalid, *, file: Path) -> RecipeInvalid:
    """The same error with the line of `facts["path"]`, and for an unknown key the nearest known one as the hint."""
    key = error.facts.get("path", "")
    line = line_of(file.read_text(encoding="utf-8"), key=key)
    return RecipeInvalid(f"{file}:{line}: {error.message}", hint=error.hint or _suggestion(key), **error.facts)


def line_of(text: str, *, key: str) -> int:
    """The line, counted from 1, where a dotted key of valid TOML is written; for a missing key, where its table is."""
    written = list(_statements(text))
    while key:
        for line, path in written:
            if path == key:
                return line
        for line, path in written:
            if path.startswith(f"{key}."):
                return line
        key = key.rpartition(".")[0]
    return 1


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """(line, dotted path) of every table header and key; what stands inside a value has the value's first line."""
    lines = text.split("\n")
    arrays: dict[str, int] = {}
    table = ""
    begin = 0
    for end, last in enumerate(lines, start=1):
        if not lines[begin].strip() or lines[begin].lstrip().startswith("#"):
            begin = end
            continue
        # The end of a value of several lines shows one of these; trying at every line would cost its square.
        if end - begin > 1 and not re.search(r"[\]}]|\"{3}|'{3}", last):
            continue
        try:
            fields = tomllib.loads("\n".join(lines[begin:end]))
        except tomllib.TOMLDecodeError:
            continue
        if lines[begin].lstrip().startswith("["):
            table = _header(fields, arrays)
            yield begin + 1, table
        else:
            for path in _paths(fields, prefix=f"{table}." if table else ""):
                yield begin + 1, path
        begin = end


def _header(fields: dict[str, Any], arrays: dict[str, int]) -> str:
    """The path of `[a.b]`, and of `[[a.b]]` with the number of its element: a.b.0."""
    path: list[str] = []
    inner: Any = fields
    while isinstance(inner, dict) and inner:
        key, inner = next(iter(inner.items()))
        path.append(key)
        name = ".".join(path)
        if isinstance(inner, list):
            arrays[name] = arrays.get(name, -1) + 1
        if name in arrays:
            path.append(str(arrays[name]))
    return ".".join(path)


def _paths(value: Any, *, prefix: str) -> Iterator[str]:
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield f"{prefix}{key}"
        yield from _paths(inner, prefix=f"{prefix}{key}.")


def _syntax_error(reason: str, *, file: Path, text: str) -> str:
    at = re.search(r" \(at line (\d+), column (\d+)\)$", reason)
    line = int(at[1]) if at else text.count("\n") + 1
    column = f" (column {at[2]})" if at else ""
    reason = reason[: at.start()] if at else reason.removesuffix(" (at end of document)")
    return f"{file}:{line}: this is not valid TOML: {reason[:1].lower()}{reason[1:]}{column}."


def _suggestion(key: str) -> str:
    """For a key that no recipe has: the nearest in the same table, else the same name in another table."""
    known = sorted(set(_known_keys(JobSpec, prefix="")))
    if not key or key in known:
        return ""
    table, _, name = key.rpartition(".")
    beside = {path.rpartition(".")[2]: path for path in known if path.rpartition(".")[0] == table}
    elsewhere = {path.rpartition(".")[2]: path for path in known}
    for names, cutoff in ((beside, 0.6), (elsewhere, 0.85)):
        near = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
        if near:
            return f"Did you mean {names[near[0]]}?"
    owner = f"[{table}]" if table else "A recipe"
    return f"{owner} has {', '.join(sorted(beside))}." if beside else ""


def _known_keys(part: type[BaseModel], *, prefix: str) -> Iterator[str]:
    for name, field in part.model_fields.items():
        yield f"{prefix}{name}"
        for inner in _parts_in(field.annotation):
            yield from _known_keys(inner, prefix=f"{prefix}{name}.")


def _parts_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _parts_in(inner)
