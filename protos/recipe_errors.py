"""What is wrong with a recipe, in one sentence with its key: pydantic's report in the words of a recipe.

Pydantic names types, branches of unions and validators; whoever writes a recipe knows tables and keys.
"""

from __future__ import annotations

import json
import re

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from protos.digests import DIGEST
from protos.identity import NAME


def explain(error: ValidationError) -> tuple[str, str]:
    """One sentence about the first thing that is wrong, and its dotted key in the recipe ("" for the whole)."""
    found = [(_path(detail), detail) for detail in error.errors()]
    # A misspelt key is also a missing one; the misspelling is what helps.
    path, first = next((entry for entry in found if entry[1]["type"] == "extra_forbidden"), found[0])
    # Of a union, pydantic reports every branch; the one that it got furthest into is the one that was meant.
    deeper = [(inner, detail) for inner, detail in found if len(inner) > len(path) and inner[: len(path)] == path]
    if deeper and first["type"] != "value_error":
        path, first = deeper[0]
    where = ".".join(path)
    kind, context = first["type"], first.get("ctx", {})
    if kind == "value_error":
        reason = str(context["error"])
        return f"{where or 'recipe'}: {reason}.", ".".join((*path, *_key_at_fault(reason, first["input"])))
    if kind == "extra_forbidden":
        return f"{where} is not a known key.", where
    if kind == "missing":
        return f"{where} is missing.", where
    if kind == "union_tag_not_found":
        return f"{where} needs a `type`.", where
    if kind == "union_tag_invalid":
        return f"{where}.type must be {_alternatives(context['expected_tags'])}.", f"{where}.type"
    branches = [_expected(detail) for inner, detail in found if inner == path]
    given = json.dumps(first["input"], default=str, ensure_ascii=False)
    given = given if len(given) <= 60 else f"{given[:60]}..."
    return f"{where} must be {' or '.join(branches)}, not {given}.", where


def _path(detail: ErrorDetails) -> tuple[str, ...]:
    """The keys of the recipe in pydantic's location, without its names for the branches of unions."""
    *parents, last = [str(part) for part in detail["loc"]] or [""]
    keys = [part for part in parents if part not in _TAGS and not part.startswith(_TYPE_WORDS)]
    written = detail["type"] == "extra_forbidden" or (last not in _TAGS and not last.startswith(_TYPE_WORDS))
    return (*keys, last) if last and written else tuple(keys)


def _expected(detail: ErrorDetails) -> str:
    """What a value should have been, to follow "must be"."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "literal_error":
        return _alternatives(context["expected"])
    if kind == "string_pattern_mismatch":
        return _PATTERNS.get(context["pattern"], "a name: at most 128 letters, digits and . _ / -")
    phrase = _EXPECTED.get(kind.removesuffix("_parsing").removesuffix("_type"))
    return phrase.format(**context) if phrase else f"otherwise ({detail['msg']})"


def _alternatives(quoted: str) -> str:
    """Pydantic's "'a', 'b', 'c'" as: "a", "b" or "c"."""
    *names, last = (f'"{name}"' for name in re.findall(r"'([^']*)'", quoted))
    return f"{', '.join(names)} or {last}" if names else last


def _key_at_fault(reason: str, fields: object) -> tuple[str, ...]:
    """The first key that a contradiction names and that is written in the recipe, for finding its line."""
    if not isinstance(fields, dict):
        return ()
    for word in re.findall(r"\w+", reason):
        if word in fields:
            return (word,)
        for key, inner in fields.items():
            if isinstance(inner, dict) and word in inner and word != "type":
                return (key, word)
    return ()


_TAGS = {
    "classification",
    "causal-lm",
    "synthetic",
    "PromptTemplate",
    "full",
    "lora",
    "none",
    "fedavgm",
    "fedadam",
    "fedyogi",
    "nesterov",
    "median",
    "trimmed-mean",
    "krum",
    "multi-krum",
    "centered-clipping",
    "norm-bound",
}
_TYPE_WORDS = ("literal[", "constrained-", "tuple[", "function-")
_PATTERNS = {
    f"^{NAME.pattern}$": "a site name: 1 to 63 lower-case letters, digits and hyphens",
    f"^{DIGEST.pattern}$": "a digest: 64 lower-case hexadecimal digits",
}
_EXPECTED = {
    "bool": "true or false",
    "finite_number": "a finite number",
    "float": "a number",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "int": "a whole number",
    "int_from_float": "a whole number",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "model": "a table",
    "model_attributes": "a table with a `type`",
    "string": "a text in quotes",
    "too_long": "a list of at most {max_length}",
    "too_short": "a list of at least {min_length}",
    "tuple": "a list",
}
