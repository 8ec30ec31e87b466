"""The tables of a grid: means over seeds, variants against each other seed by seed, and the law of equal steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from statistics import mean, median
from typing import Any

import numpy as np

from deploy.lab.certainty import Mean, holm, over_seeds, paired
from deploy.lab.outcomes import AXES, BESIDE, Cell, Row, Study, steps_at
from protos.metrics import LOWER_IS_BETTER

# Without the seed.
SHOWN_AXES = AXES[:-1]
# Below it a difference is called one.
SIGNIFICANT = 0.05
COSTS = ("bytes_up", "bytes_down", "seconds", "bytes_up_per_round", "bytes_down_per_round", "seconds_per_round")


def groups(study: Study) -> dict[tuple[Any, ...], list[Cell]]:
    """The cells that are done, by all that they are but their seed; in the order of the grid, sites by number."""
    found: dict[tuple[Any, ...], list[Cell]] = defaultdict(list)
    for cell in study.done:
        found[cell.key].append(cell)
    order = {axis: {value: place for place, value in enumerate(study.values(axis))} for axis in SHOWN_AXES}
    return {key: found[key] for key in sorted(found, key=lambda key: _places(key, order))}


def _places(key: Sequence[Any], order: Mapping[str, Mapping[Any, int]]) -> list[int]:
    # Numbers of sites last: a block of lines is one curve over sites.
    places = {axis: order[axis].get(value, -1) for axis, value in zip(SHOWN_AXES, key, strict=True)}
    return [places[axis] for axis in ("model", "data", "partition", "variant", "sites")]


def summaries(study: Study) -> list[Row]:
    """One row for each group: means over its seeds with their intervals, and what it cost."""
    by_name = {row["cell"]: row for row in study.rows}
    found = []
    for key, cells in groups(study).items():
        rows = [by_name[cell.name] for cell in cells]
        row: Row = dict(zip(SHOWN_AXES, key, strict=True)) | {"seeds": sorted(row["seed"] for row in rows)}
        beside = [f"{name}_{when}" for name in BESIDE for when in ("best", "last", "test")]
        for name in ("first", "best", "last", "at_budget", "test", "share_of_baseline", "aggregation_error", *beside):
            values = [row[name] for row in rows if row.get(name) is not None]
            row[name] = over_seeds(values) if values else None
        row |= {name: mean(found[name] for found in rows if name in found) for name in COSTS if name in rows[0]}
        rounds = [row["best_round"] for row in rows if "best_round" in row]
        row |= {"best_round": median(rounds) if rounds else None, "rounds": max(row["rounds"] for row in rows)}
        aimed = [row["rounds_to_target"] for row in rows if "rounds_to_target" in row]
        row |= {"aimed": len(aimed), "reached": [number for number in aimed if number is not None]}
        row |= {"rounds_to_target": _middle(aimed)}
        found.append(row)
    return found


def _middle(rounds: Sequence[int | None]) -> float | None:
    """The median, where a run that never came there counts as later than all others; None where that is the median."""
    if not rounds:
        return None
    middle = median(float("inf") if number is None else number for number in rounds)
    return None if middle == float("inf") else middle


def glance(study: Study, rows: Sequence[Row]) -> tuple[list[Any], list[tuple[dict[str, Any], dict[Any, Row]]]]:
    """Methods by data: the data sets, and for each line what it is and its summary by data set."""
    lines: dict[tuple[Any, ...], dict[Any, Row]] = defaultdict(dict)
    axes = [axis for axis in SHOWN_AXES if axis != "data"]
    for row in rows:
        lines[tuple(row[axis] for axis in axes)][row["data"]] = row
    data_sets = study.values("data") or [None]
    return data_sets, [(dict(zip(axes, key, strict=True)), found) for key, found in lines.items()]


def comparisons(study: Study) -> list[Row]:
    """Each pair of variants under otherwise equal settings, by seed: the second less the first.

    `worse_by` is how much worse the second may be, with 95 % certainty, in the figure's own unit. `holm_p` is the
    t-test's, for as many questions as there are pairs. A pair without two common seeds is left out.
    """
    by_name = {row["cell"]: row for row in study.rows}
    settings: dict[tuple[Any, ...], dict[Any, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    for cell in study.done:
        place = tuple(cell.axes.get(axis) for axis in SHOWN_AXES if axis != "variant")
        settings[place][cell.axes.get("variant")][by_name[cell.name]["seed"]] = by_name[cell.name]
    # The figure that the page is about at its best and last version; of the others the last.
    wanted = [(study.metric, f"{when}") for when in ("last", "best", "test")]
    wanted += [(name, f"{name}_{when}") for name in BESIDE if name != study.metric for when in ("last", "best", "test")]
    found = []
    for measure, column in wanted:
        family = []
        for place, variants in settings.items():
            for first, second in combinations([name for name in study.values("variant") if name in variants], 2):
                row = _compared(variants[first], variants[second], measure=measure, column=column)
                if row:
                    where = dict(zip([axis for axis in SHOWN_AXES if axis != "variant"], place, strict=True))
                    family.append({**where, "first": first, "second": second, **row})
        for row, p_value in zip(family, holm([row["t_p"] for row in family]), strict=True):
            judged = row | {"holm_p": p_value}
            found.append(judged | {"says": _verdict(judged)})
    return found


def _compared(first: Mapping[int, Row], second: Mapping[int, Row], *, measure: str, column: str) -> Row | None:
    before, after = (
        {seed: row[column] for seed, row in rows.items() if row.get(column) is not None} for rows in (first, second)
    )
    change = paired(before, after)
    if change is None:
        return None
    worse_by = change.upper if measure in LOWER_IS_BETTER else -change.lower
    start = mean(before[seed] for seed in before.keys() & after.keys())
    return {
        "measure": measure,
        "figure": column,
        "seeds": change.count,
        "mean": change.mean.value,
        "low": change.mean.low,
        "high": change.mean.high,
        "worse_by": worse_by,
        "worse_by_share": worse_by / abs(start) if start else None,
        "t_p": change.t_p,
        "sign_p": change.sign_p,
    }


def _verdict(row: Row) -> str:
    # Of twenty pairs that are alike, one would be called different by its own p.
    if row["holm_p"] >= SIGNIFICANT:
        return "no difference shown"
    rises = row["mean"] > 0
    return "better" if rises != (row["measure"] in LOWER_IS_BETTER) else "worse"


def curve(study: Study, cells: Sequence[Cell], *, by_steps: bool = False) -> list[tuple[float, float, float, float]]:
    """(round, mean, lowest, highest) over the seeds of one group, where all of them were measured.

    `by_steps`: optimizer steps along the averaged path instead of the round.
    """
    found = [dict(study.points(cell)) for cell in cells]
    steps = [steps_at(cell.done) for cell in cells]
    points = []
    for version in sorted(set.intersection(*(set(values) for values in found)) if found else ()):
        values = [by_version[version] for by_version in found]
        place = mean(by_version.get(version, 0.0) for by_version in steps) if by_steps else version
        points.append((place, mean(values), min(values), max(values)))
    return points


def steps_differ(study: Study) -> bool:
    """Whether a site does another number of steps a round where there are more sites: passes over its rows, not steps.

    Else steps foretell nothing that rounds do not.
    """
    each = {row["steps_along_average"] / row["rounds"] for row in study.rows if row.get("rounds")}
    return len(study.values("sites")) > 1 and len(each) > 1


def law(study: Study) -> list[Row]:
    """How well steps along the averaged path, S = R E n / (K B), foretell the figure whatever the number of sites K.

    Of each two neighbouring numbers of sites: how far apart their figures are on the mean at equal S, and at equal
    rounds. The law holds where the first is much the smaller.
    """
    if not steps_differ(study):
        return []
    families: dict[tuple[Any, ...], dict[int, list[Cell]]] = defaultdict(dict)
    for key, cells in groups(study).items():
        axes = dict(zip(SHOWN_AXES, key, strict=True))
        if axes["sites"] is not None:
            families[tuple(axes[axis] for axis in SHOWN_AXES if axis != "sites")][axes["sites"]] = cells
    found = []
    for key, by_sites in families.items():
        for few, many in pairwise(sorted(by_sites)):
            at_steps, at_rounds = (
                _apart(
                    [(x, y) for x, y, *_ in curve(study, by_sites[few], by_steps=by_steps)],
                    [(x, y) for x, y, *_ in curve(study, by_sites[many], by_steps=by_steps)],
                )
                for by_steps in (True, False)
            )
            if at_steps is not None:
                named = dict(zip([axis for axis in SHOWN_AXES if axis != "sites"], key, strict=True))
                found.append(named | {"few": few, "many": many, "at_steps": at_steps, "at_rounds": at_rounds})
    return found


def _apart(few: Sequence[tuple[float, float]], many: Sequence[tuple[float, float]]) -> float | None:
    """The mean distance of the points of `few`, but its start, from the line through `many`, where that has come."""
    if not few or not many:
        return None
    places, values = zip(*many, strict=True)
    gaps = [abs(y - float(np.interp(x, places, values))) for x, y in few if 0 < x <= places[-1]]
    return mean(gaps) if gaps else None


def plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, Mean):
        return {"count": value.count, "mean": value.value, "low": value.low, "high": value.high}
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
