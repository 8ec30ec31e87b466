"""The tables of a recipe's README, made from its records (deploy/recipes/record.py): none says what no run said.

What stands between such a comment, of one line or several, and `<!-- end -->` is made anew. A mean over seeds with half
of its 95 % interval: with a column for each value of an axis, or with several figures for each line. And pairs: by
seed, the first less the second, where each is a variant or says all that it is.

    <!-- table: grid.csv; lines: model; columns: sites; figure: last -->
    <!-- table: six.csv; lines: variant, data; figures: last, test, bytes_up; where: sites=16, sites=32 -->
    <!-- pairs: six.csv; measure: test; pairs: kd - finetune, fed-lora-kd - fed-lora; where: data=cola -->
    <!-- pairs: grid.csv; measure: last; pairs: sites=32 variant=adamw - sites=1 variant= -->
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import mean

from deploy.lab.certainty import holm, over_seeds, paired
from deploy.lab.grid_figures import is_share
from deploy.lab.grid_report import mean_text, points_text
from deploy.lab.outcomes import AXES
from deploy.pages import size
from protos.errors import InvalidInput
from protos.metrics import LOWER_IS_BETTER

PAGE, RESULTS = "README.md", "results"
# What axes a setting has: all but the seed.
SETTING = AXES[:-1]
# Of the measure that a row is about (its `metric`); of others; and what is counted.
OWN = ("chance", "first", "best", "last", "test")
OTHERS = tuple(f"{name}_{when}" for name in ("matthews_correlation", "loss") for when in ("last", "test"))
COUNTS = ("best_round", "last_round", "rounds", "steps_along_average", "distillations_kept", "rounds_undistilled")
TEACHER = ("teacher_loss_first", "teacher_loss_last", "teacher_slice_loss_last")
BYTES = ("bytes_up", "bytes_down")
# Of what one site with all rows reaches.
SHARE = "share_of_baseline"
FIGURES = (*OWN, *OTHERS, SHARE, *COUNTS, *TEACHER, "aggregation_error", *BYTES, "seconds")
NOTHING = "–"
WORST = "worse by at most (95 %, one side)"
BLOCK = re.compile(r"<!-- (table|pairs):(.*?)-->\n(.*?)<!-- end -->", re.DOTALL)
MARK = re.compile(r"<!-- (?:table|pairs|end)\b")
# The words of a comment, and those that it must have.
WORDS = {"table": ("lines", "columns", "figure", "figures", "where"), "pairs": ("measure", "pairs", "where")}
NEEDED = {"table": ("lines", "figures"), "pairs": ("measure", "pairs")}

Row = dict[str, str]


def read_record(path: Path) -> list[Row]:
    if not path.is_file():
        raise InvalidInput(f"There is no record {path.name}.", hint="`--from` and `--name` make one.")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def refilled(text: str, *, folder: Path) -> str:
    """`text`, a README of `folder`, with its tables made anew. InvalidInput, in a sentence: one cannot be made."""
    blocks = BLOCK.findall(text)
    if len(MARK.findall(text)) != 2 * len(blocks):
        raise InvalidInput("A table has no comment `<!-- table: ... -->` before it, or no `<!-- end -->` after it.")

    def made(found: re.Match[str]) -> str:
        kind, said = found[1], found[2]
        try:
            words = _words(said, kind=kind)
            rows = _only(read_record(folder / RESULTS / words["file"]), where=words.get("where", ""))
            lines = (_table if kind == "table" else _pairs)(rows, words=words)
        except InvalidInput as error:
            raise InvalidInput(f"{kind}: {' '.join(said.split())}: {error.message}", hint=error.hint) from None
        return "\n".join([f"<!-- {kind}:{said}-->", *lines, "<!-- end -->"])

    return BLOCK.sub(made, text)


def _words(text: str, *, kind: str) -> dict[str, str]:
    file, *parts = (part.strip() for part in text.split(";"))
    words = {"file": file}
    for part in parts:
        key, _, value = (piece.strip() for piece in part.partition(":"))
        key = "figures" if _known(key, WORDS[kind]) == "figure" else key
        if key in words:
            raise InvalidInput(f"{key!r} is said twice.")
        words[key] = value
    if missing := [key for key in NEEDED[kind] if not words.get(key)]:
        raise InvalidInput(f"It does not say {missing[0]!r}.")
    return words


def _known(word: str, among: Collection[str]) -> str:
    if word not in among:
        raise InvalidInput(f"{word!r} is not known here.", hint=f"Known are {', '.join(among)}.")
    return word


def _listed(text: str, among: Collection[str]) -> list[str]:
    return [_known(word.strip(), among) for word in text.split(",") if word.strip()]


def _only(rows: Sequence[Row], *, where: str) -> list[Row]:
    """The rows with what `where` names; of several values of one axis, any."""
    wanted: dict[str, list[str]] = defaultdict(list)
    for term in where.replace(",", " ").split():
        axis, _, value = term.partition("=")
        wanted[_known(axis, AXES)].append(value)
    found = [row for row in rows if all(row.get(axis, "") in values for axis, values in wanted.items())]
    for axis, values in wanted.items():
        if lost := [value for value in values if value not in {row.get(axis, "") for row in found}]:
            raise InvalidInput(f"No cell has {axis}={lost[0]} there.")
    return found


def _by_seed(rows: Sequence[Row], *, figure: str) -> dict[int, float]:
    """InvalidInput: they differ by more than their seeds, and a mean over them would be of nothing."""
    seen: dict[str, Row] = {}
    for row in rows:
        if row["seed"] in seen or any(row.get(axis) != rows[0].get(axis) for axis in SETTING):
            other = seen.get(row["seed"], rows[0])
            raise InvalidInput(f"{other['cell']} and {row['cell']} would be one figure.", hint="Tell them apart.")
        seen[row["seed"]] = row
    return {int(seed): float(row[figure]) for seed, row in seen.items() if row.get(figure)}


def _metric(rows: Sequence[Row], *, figure: str) -> str:
    if figure not in OWN:
        return figure.rpartition("_")[0] if figure in OTHERS else figure
    metric, *others = dict.fromkeys(row["metric"] for row in rows)
    if others:
        raise InvalidInput(f"{figure!r} is of {metric} in some cells and of {others[0]} in others.")
    return metric


def _table(rows: Sequence[Row], *, words: dict[str, str]) -> list[str]:
    axes, across = _listed(words["lines"], SETTING), words.get("columns")
    figures = _listed(words["figures"], FIGURES)
    if across is None:
        columns: list[tuple[str, str | None, str]] = [(_head(rows, figure=figure), None, figure) for figure in figures]
    elif len(figures) == 1:
        values = _values(rows, axis=_known(across, SETTING))
        columns = [(_value(of, axis=across), of, figures[0]) for of in values]
    else:
        raise InvalidInput("With columns there is one figure.")
    lines: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        lines[tuple(row.get(axis, "") for axis in axes)].append(row)
    order = [_values(rows, axis=axis) for axis in axes]
    made = []
    for key in sorted(lines, key=lambda key: [places.index(of) for places, of in zip(order, key, strict=True)]):
        cells = []
        for _, of, figure in columns:
            own = [row for row in lines[key] if across is None or row.get(across, "") == of]
            cells.append((figure, _by_seed(own, figure=figure)))
        counts = {len(seeds) for _, seeds in cells if seeds}
        texts = [
            _text(list(seeds.values()), figure=figure, metric=_metric(rows, figure=figure))
            + (f" ({len(seeds)})" if seeds and len(counts) > 1 else "")
            for figure, seeds in cells
        ]
        named = [of if axis == "sites" else _value(of, axis=axis) for axis, of in zip(axes, key, strict=True)]
        made.append([*named, *texts, str(max(counts)) if len(counts) == 1 else ""])
    return _markdown([*axes, *(head for head, *_ in columns), "seeds"], made, left=len(axes))


def _pairs(rows: Sequence[Row], *, words: dict[str, str]) -> list[str]:
    measure = _known(words["measure"], (*OWN, *OTHERS))
    metric, found = _metric(rows, figure=measure), {}
    for pair in words["pairs"].split(","):
        name, sides = " ".join(pair.split()), re.split(r"\s-\s", pair.strip())
        if len(sides) != 2:
            raise InvalidInput(f"{name!r} is not two variants with ` - ` between them.")
        # A variant, or all that it is.
        wheres = [side if "=" in side else f"variant={side}" for side in sides]
        after, before = (_by_seed(_only(rows, where=where), figure=measure) for where in wheres)
        found[name] = paired(before, after)
    adjusted = iter(holm([change.t_p for change in found.values() if change]))
    made = []
    for name, change in found.items():
        if change is None:
            made.append([f"`{name}`", *[NOTHING] * 5, "fewer than two"])
            continue
        worse_by = change.upper if metric in LOWER_IS_BETTER else -change.lower
        numbers = (change.mean.value, change.mean.low, change.mean.high, worse_by)
        middle, low, high, worst = (points_text(value, metric=metric) for value in numbers)
        p_values = [f"{value:.2g}" for value in (change.t_p, next(adjusted))]
        made.append([f"`{name}`", middle, f"{low} to {high}", *p_values, worst, str(change.count)])
    points = ", points" if is_share(metric) else ""
    heads = [f"{_head(rows, figure=measure)}{points}", "95 % interval", "p", "Holm", WORST, "seeds"]
    return _markdown(["", *heads], made, left=1)


def _values(rows: Sequence[Row], *, axis: str) -> list[str]:
    """What an axis takes: numbers in their order, names in the record's."""
    found = dict.fromkeys(row.get(axis, "") for row in rows)
    return sorted(found, key=lambda value: int(value or 0)) if axis == "sites" else list(found)


def _value(value: str, *, axis: str) -> str:
    if axis == "sites" and value:
        return f"{value} site{'s' if value != '1' else ''}"
    return f"`{value}`" if value else NOTHING


def _head(rows: Sequence[Row], *, figure: str) -> str:
    if figure == SHARE:
        return "of one site's"
    metric = _metric(rows, figure=figure)
    return (figure if metric == figure else f"{metric}, {figure.rpartition('_')[2]}").replace("_", " ")


def _text(values: Sequence[float], *, figure: str, metric: str) -> str:
    if not values:
        return NOTHING
    if figure in BYTES:
        return size(mean(values))
    if figure in (*COUNTS, "seconds"):
        return f"{mean(values):,.1f}".removesuffix(".0")
    return mean_text(over_seeds(values), metric="accuracy" if figure == SHARE else metric)


def _markdown(heads: Sequence[str], lines: Sequence[Sequence[str]], *, left: int) -> list[str]:
    marks = ["---"] * left + ["---:"] * (len(heads) - left)
    return [f"| {' | '.join(line)} |" for line in (heads, marks, *lines)]
