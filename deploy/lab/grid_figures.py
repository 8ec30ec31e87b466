"""The figures of a grid: those of Hilmkil et al. (2021, arXiv:2102.00875), and what they leave open.

Each is the mean over seeds; a bar through a point is its 95 % interval, and a single seed has none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from deploy import figures
from deploy.figures import GREY, FigureOf
from deploy.lab.certainty import Mean
from deploy.lab.grid_tables import SHOWN_AXES, curve, groups, steps_differ, summaries
from deploy.lab.outcomes import TARGET_SHARE, Cell, Row, Study

PANEL_INCHES = 3.1
MOST_PANELS, MOST_LINES = 12, 7
SHARES = ("accuracy", "macro_f1")
CHANCE = "chance"


@dataclass(frozen=True)
class Drawing:
    """A figure with what it is called and what it says, in one sentence."""

    name: str
    title: str
    says: str
    of: FigureOf


@dataclass(frozen=True)
class Layout:
    """Which axes of the grid make the panels, and which the lines in them."""

    panels: tuple[str, ...]
    lines: tuple[str, ...]


def drawings(study: Study) -> list[Drawing]:
    """The figures that the cells which are done have something for."""
    if not study.done:
        return []
    measure, when = words(study.metric), "after the last round"
    found = []
    x = _x_axis(study)
    measured = any(row["last"] is not None for row in summaries(study))
    if measured and study.budget is not None:
        when = f"after round {study.budget}"
        found.append(_by_x(study, x=x, column="at_budget", name=f"round_{study.budget}", when=when))
    if measured:
        found.append(_by_x(study, x=x, column="last", name="last_round", when="after the last round"))
    rows = summaries(study)
    if any(row["aimed"] for row in rows):
        share = f"{100 * TARGET_SHARE:.0f} %"
        found.append(Drawing(
            "rounds_to_target",
            f"Rounds to {share} of what one site with all rows reaches {when}",
            "The median over seeds, dots: each seed; hatched to the top: it did not get there in its rounds. Lower is"
            " better.",
            _rounds_to_target,
        ))  # fmt: skip
    layout = _curves_layout(study)
    for number, part in enumerate(pieces(panels_of(study, layout.panels)) if measured else ()):
        more = ", continued" if number else ""
        by = "number of sites" if layout.lines == ("sites",) else "".join(layout.lines) or "cell"
        found.append(Drawing(
            f"learning_curves{f'_{number + 1}' if number else ''}", f"{measure} by round{more}",
            f"A line for each {by}: the mean over seeds, in a band from the lowest seed to the highest.",
            partial(_curves, layout=layout, panels=part, by_steps=False),
        ))  # fmt: skip
        if layout.lines == ("sites",) and steps_differ(study):
            found.append(Drawing(
                f"steps_law{f'_{number + 1}' if number else ''}", f"{measure} by steps along the averaged path{more}",
                "The same lines over S = R E n / (K B), the optimizer steps that one site has done: where lines for all"
                " numbers of sites lie on each other, steps alone decide, not averaging.",
                partial(_curves, layout=layout, panels=part, by_steps=True),
            ))  # fmt: skip
    if any(row["aggregation_error"] is not None for row in rows):
        found.append(Drawing(
            "aggregation_error", "Aggregation error",
            "How far the combined factors are from the exact mean of the sites' updates, relative to it, on the mean of"
            " all rounds; 0 is exact.",
            partial(_points_figure, x=x, column="aggregation_error", label="aggregation error"),
        ))  # fmt: skip
    return found


def words(metric: str) -> str:
    return metric.replace("_", " ").capitalize()


def label_of(study: Study, axes: Mapping[str, Any], *, of: Sequence[str]) -> str:
    """What a line or a panel is, in as few words as tell it from the others."""
    named = [f"{axes[axis]} {_sites(axes[axis])}" if axis == "sites" else str(axes[axis])
             for axis in of if axes.get(axis) is not None]  # fmt: skip
    # Beside the variants of another grid, one that has none.
    return ", ".join(named) or ("as the recipe is" if of else "")


def _sites(count: int) -> str:
    return "site" if count == 1 else "sites"


def varied(study: Study) -> list[str]:
    return [axis for axis in ("model", "data", "partition", "variant", "sites") if len(study.values(axis)) > 1]


def _x_axis(study: Study) -> str:
    """Sites where there are several numbers of them; else what the grid compares."""
    there = varied(study)
    return next((axis for axis in ("sites", "variant", "model", "partition") if axis in there), "sites")


def _x_layout(study: Study, *, x: str) -> Layout:
    """Panels by data, lines by all else; where that is too many lines, panels by model and partition too."""
    lines = [axis for axis in varied(study) if axis not in ("data", x)]
    panel_axes = ["data"] if "data" in varied(study) else []
    for axis in ("model", "partition"):
        if math.prod(len(study.values(line)) for line in lines) > MOST_LINES and axis in lines and len(lines) > 1:
            lines.remove(axis)
            panel_axes.append(axis)
    return Layout(tuple(panel_axes), tuple(lines))


def _curves_layout(study: Study) -> Layout:
    there = varied(study)
    line = next((axis for axis in ("sites", "variant", "model") if axis in there), None)
    return Layout(tuple(axis for axis in there if axis != line), (line,) if line else ())


def panels_of(study: Study, axes: Sequence[str]) -> list[tuple[Any, ...]]:
    return list(dict.fromkeys(part_of(key, axes) for key in groups(study)))


def pieces(panels: Sequence[tuple[Any, ...]]) -> Iterator[Sequence[tuple[Any, ...]]]:
    """So many panels as fit into one figure."""
    for first in range(0, len(panels), MOST_PANELS):
        yield panels[first : first + MOST_PANELS]


def part_of(key: Sequence[Any], axes: Sequence[str]) -> tuple[Any, ...]:
    named = dict(zip(SHOWN_AXES, key, strict=True))
    return tuple(named[axis] for axis in axes)


def _titles(study: Study, layout: Layout, panels: Sequence[tuple[Any, ...]]) -> list[str]:
    return [label_of(study, dict(zip(layout.panels, panel, strict=True)), of=layout.panels) for panel in panels]


def _by_x(study: Study, *, x: str, column: str, name: str, when: str) -> Drawing:
    against = "the number of sites" if x == "sites" else f"the {x}"
    measure = words(study.metric)
    chance = " Dashed grey: the part that the most frequent label has." if study.chance else ""
    return Drawing(
        f"by_{x}_{name}", f"{measure} {when}, by {x}",
        f"{measure} on held-out rows against {against}: mean over seeds with its 95 % interval.{chance}",
        partial(_points_figure, x=x, column=column, label=f"{study.metric.replace('_', ' ')} on held-out rows"),
    )  # fmt: skip


def _points_figure(study: Study, ink: str, *, x: str, column: str, label: str) -> Figure:
    """Means with their intervals against an axis of the grid: one line for each combination of the others."""
    layout = _x_layout(study, x=x)
    rows = [row for row in summaries(study) if row[column] is not None]
    panels = list(dict.fromkeys(tuple(row[axis] for axis in layout.panels) for row in rows))
    lines = list(dict.fromkeys(tuple(row[axis] for axis in layout.lines) for row in rows))
    places = {value: place for place, value in enumerate(study.values(x) or [None])}
    figure, all_axes = figures.panels(_titles(study, layout, panels), height_inches=PANEL_INCHES + 0.4)
    for axes, panel in zip(all_axes, panels, strict=True):
        own = [row for row in rows if tuple(row[axis] for axis in layout.panels) == panel]
        here = {tuple(row[axis] for axis in layout.lines) for row in own}
        for place, (number, line) in enumerate((number, line) for number, line in enumerate(lines) if line in here):
            points = [(places[row[x]], row[column]) for row in own if tuple(row[axis] for axis in layout.lines) == line]
            # Beside each other, so that no interval hides another.
            shift = (place - (len(here) - 1) / 2) * min(0.1, 0.5 / len(here))
            name = label_of(study, dict(zip(layout.lines, line, strict=True)), of=layout.lines)
            _points(axes, points, shift=shift, number=number, label=name, joined=x == "sites")
        if column != "aggregation_error":
            _chance(axes, study, {row["data"] for row in own})
        axes.set_xticks(list(places.values()), [str(value) for value in places])
        axes.set_xlim(-0.5, len(places) - 0.5)
        axes.set_xlabel("number of sites" if x == "sites" else x)
        if x != "sites" and len(places) > 3:
            for tick in axes.get_xticklabels():
                tick.set(rotation=30, ha="right", rotation_mode="anchor")
        as_share(axes, study.metric if column != "aggregation_error" else column)
    finish(figure, all_axes, label=label, wide=len(panels) > 1)
    return figure


def _points(
    axes: Axes, points: Sequence[tuple[int, Mean]], *, shift: float, number: int, label: str, joined: bool
) -> None:
    style = dict(figures.style(number))
    if not joined:
        style["linestyle"] = ""
    places = [place + shift for place, _ in points]
    # One seed has no interval, and one of length 0 would say that it is certain.
    halves = [math.nan if found.half is None else found.half for _, found in points]
    axes.errorbar(places, [found.value for _, found in points], yerr=halves, capsize=3, elinewidth=1.2, label=label,
                  **style)  # fmt: skip


def _chance(axes: Axes, study: Study, data_sets: set[Any]) -> None:
    for share in {study.chance[data] for data in data_sets if data in study.chance}:
        axes.axhline(share, color=GREY, linestyle=(0, (2, 2)), linewidth=1.4, label=CHANCE)


def _rounds_to_target(study: Study, ink: str) -> Figure:
    layout = _x_layout(study, x="sites")
    rows = [row for row in summaries(study) if row["aimed"]]
    panels = list(dict.fromkeys(tuple(row[axis] for axis in layout.panels) for row in rows))
    lines = list(dict.fromkeys(tuple(row[axis] for axis in layout.lines) for row in rows))
    places = {value: place for place, value in enumerate(study.values("sites"))}
    most = max(row["rounds"] for row in rows)
    width = 0.84 / len(lines)
    figure, all_axes = figures.panels(_titles(study, layout, panels), height_inches=PANEL_INCHES + 0.4)
    for axes, panel in zip(all_axes, panels, strict=True):
        for row in rows:
            if tuple(row[axis] for axis in layout.panels) == panel:
                number = lines.index(tuple(row[axis] for axis in layout.lines))
                _bar(axes, row, place=places[row["sites"]] + (number + 0.5) * width - 0.42, width=width, number=number,
                     ink=ink, label=label_of(study, row, of=layout.lines))  # fmt: skip
        axes.set_xticks(list(places.values()), [str(value) for value in places])
        axes.set_ylim(0, most * 1.04)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("number of sites")
    finish(figure, all_axes, label="rounds", wide=len(panels) > 1)
    return figure


def _bar(axes: Axes, row: Row, *, place: float, width: float, number: int, ink: str, label: str) -> None:
    colour, middle = figures.style(number)["color"], row["rounds_to_target"]
    failed = row["aimed"] - len(row["reached"])
    if middle is None:
        axes.bar(place, row["rounds"], width=width * 0.92, facecolor="none", edgecolor=colour, hatch="////",
                 linewidth=1, label=label)  # fmt: skip
    else:
        axes.bar(place, middle, width=width * 0.92, color=colour, label=label)
    if failed:
        said = "not reached" if failed == row["aimed"] else f"{failed} of {row['aimed']} not reached"
        axes.annotate(said, (place, row["rounds"] * 0.5), rotation=90, ha="center", va="center", fontsize="small",
                      color=ink, bbox={"boxstyle": "round,pad=0.15", "edgecolor": "none",
                                       "facecolor": axes.get_facecolor()})  # fmt: skip
    if row["aimed"] > 1:
        axes.plot([place] * len(row["reached"]), row["reached"], linestyle="", marker="o", markersize=4, color=ink)


def _curves(
    study: Study, ink: str, *, layout: Layout, panels: Sequence[tuple[Any, ...]], by_steps: bool
) -> Figure:  # fmt: skip
    """The measure by round, or by steps along the averaged path: one panel for each setting, one line for each K."""
    figure, all_axes = figures.panels(_titles(study, layout, panels), height_inches=PANEL_INCHES)
    found = groups(study)
    lines = list(dict.fromkeys(part_of(key, layout.lines) for key in found))
    if layout.lines == ("sites",):
        lines.sort()
    for axes, panel in zip(all_axes, panels, strict=True):
        own = {key: cells for key, cells in found.items() if part_of(key, layout.panels) == panel}
        for key, cells in own.items():
            line = part_of(key, layout.lines)
            name = label_of(study, dict(zip(layout.lines, line, strict=True)), of=layout.lines)
            _curve(axes, study, cells, number=lines.index(line), label=name, by_steps=by_steps)
        _chance(axes, study, {cells[0].axes.get("data") for cells in own.values()})
        if by_steps:
            axes.set_xscale("log")
            axes.set_xlabel("steps S of one site")
        else:
            axes.set_xlabel("round")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            axes.xaxis.set_minor_locator(NullLocator())
        as_share(axes, study.metric)
    finish(figure, all_axes, label=f"{study.metric.replace('_', ' ')} on held-out rows", wide=len(panels) > 1)
    return figure


def _curve(axes: Axes, study: Study, cells: Sequence[Cell], *, number: int, label: str, by_steps: bool) -> None:
    # On a logarithmic axis the start has no place.
    points = [point for point in curve(study, cells, by_steps=by_steps) if point[0] > 0 or not by_steps]
    if not points:
        return
    places, means, lows, highs = zip(*points, strict=True)
    style = dict(figures.style(number))
    # So many markers that a line is told from its neighbours, and no more.
    axes.plot(places, means, label=label, markersize=5, markevery=max(1, len(points) // 8), **style)
    if len(cells) > 1:
        axes.fill_between(places, lows, highs, color=style["color"], alpha=0.15, linewidth=0)


def is_share(metric: str) -> bool:
    return metric in SHARES or metric.endswith("_accuracy")


def as_share(axes: Axes, metric: str) -> None:
    if is_share(metric):
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))


def finish(figure: Figure, all_axes: Sequence[Axes], *, label: str, wide: bool) -> None:
    """One legend for all panels, above them; the label of the common axis at the left of each row."""
    for number, axes in enumerate(all_axes):
        if number % figures.COLUMNS == 0 or not wide:
            axes.set_ylabel(label)
    named: dict[str, Any] = {}
    for axes in all_axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            # A bar that got there shows its colour better than one that did not.
            if name not in named or _is_hatched(named[name]):
                named[name] = handle
    named = {name: handle for name, handle in named.items() if name}
    if len(named) > 1 or (named and wide) or CHANCE in named:
        # As many columns as the longest name leaves room for, beside the pieces of line.
        columns = (130 if wide else 84) // (max(map(len, named)) + 6)
        most = min(len(named), 4 if wide else 3)
        figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=max(1, min(columns, most)))


def _is_hatched(handle: Any) -> bool:
    return any(patch.get_hatch() for patch in getattr(handle, "patches", ()))
