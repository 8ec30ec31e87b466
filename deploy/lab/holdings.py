"""Who holds what: how the partitions of a grid gave each site its rows, dealt out once more from the recorded seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from client_agent.settings import DataSet
from client_agent.taskdir import read_json
from deploy import figures
from deploy.figures import BLUE, PAPER, SKY
from deploy.lab.experiment import Experiment
from deploy.lab.grid_figures import Drawing
from deploy.lab.outcomes import Cell, Study
from deploy.lab.place import site_rows
from deploy.lab.run import PLAN

MOST_SITES, MOST_LABELS, MOST_FIGURES = 32, 16, 8
OTHERS = "others"
# Letters of all labels together that stand beside each other without turning.
LONG_LABELS = 20
LETTER_INCHES = 0.09


@dataclass(frozen=True)
class Holding:
    """Rows by label for each site; `column` is what the labels are of, empty where rows have none."""

    column: str
    labels: tuple[str, ...]
    counts: Mapping[str, tuple[int, ...]]


def drawings(study: Study) -> list[tuple[Drawing, Holding]]:
    """One for each data set, partition and number of sites, of the first seed; those that are not even come first."""
    first: dict[tuple[Any, ...], Cell] = {}
    for cell in study.done:
        sites = len(cell.done["rows"])
        if 1 < sites <= MOST_SITES:
            first.setdefault((cell.axes.get("data"), cell.axes.get("partition"), sites), cell)
    found: list[tuple[Drawing, Holding]] = []
    for (data, shared, sites), cell in sorted(first.items(), key=lambda entry: entry[0][1] in (None, "uniform")):
        holding = holding_of(cell) if len(found) < MOST_FIGURES else None
        if holding is not None:
            name = f"holdings_{len(found) + 1}"
            of = ", ".join(str(word) for word in (data, shared or "the partition", f"{sites} sites") if word)
            says = (
                f"What the rows of each site are by {holding.column}; seed {cell.done['spec']['seed']}."
                if holding.column
                else f"Rows at each site; seed {cell.done['spec']['seed']}."
            )
            found.append((Drawing(name, f"Who holds what: {of}", says, partial(_figure, holding=holding)), holding))
    return found


def holding_of(cell: Cell) -> Holding | None:
    """None where the rows are not on this machine any more, or the task reads none."""
    plan = read_json(cell.folder / PLAN)
    experiment = None if plan is None else Experiment.model_validate(plan["experiment"])
    if experiment is None or experiment.data is None or not Path(experiment.data.rows).exists():
        return None
    column = experiment.partition.by or experiment.data.columns.get("label", DataSet.model_fields["label"].default)
    if column not in pyarrow.parquet.read_schema(experiment.data.rows).names:
        column = ""
    if not column and experiment.partition.kind == "uniform":
        return None  # All the same, of nothing that is known.
    rows = site_rows(experiment, seed=cell.done["spec"]["seed"])
    held = {site: Counter(str(row.get(column, "")) for row in own) for site, own in rows.items()}
    total: Counter[str] = sum(held.values(), Counter())
    labels = [label for label, _ in total.most_common(MOST_LABELS)]
    labels.sort()
    if len(total) > len(labels):
        labels.append(OTHERS)
    counts = {site: _counts(own, labels) for site, own in held.items()}
    return Holding(column, tuple(labels), counts)


def _counts(own: Mapping[str, int], labels: Sequence[str]) -> tuple[int, ...]:
    named = [own.get(label, 0) for label in labels if label != OTHERS]
    return (*named, sum(own.values()) - sum(named)) if OTHERS in labels else tuple(named)


def _figure(study: Study, ink: str, *, holding: Holding) -> Figure:
    sites, counts = list(holding.counts), list(holding.counts.values())
    turned = len("".join(holding.labels)) > LONG_LABELS
    height = 1.9 + 0.24 * len(sites) + (LETTER_INCHES * max(map(len, holding.labels)) if turned else 0)
    made, axes = figures.figure(height_inches=height)
    axes.set_yticks(range(len(sites)), sites)
    if not holding.column:
        axes.barh(range(len(sites)), [sum(own) for own in counts], color=BLUE)
        axes.set_xlabel("rows")
        axes.invert_yaxis()
        return made
    light = ink == figures.INK["light"]
    shades = LinearSegmentedColormap.from_list("rows", [PAPER["light"], BLUE] if light else [PAPER["dark"], SKY])
    shares = [[count / max(1, sum(own)) for count in own] for own in counts]
    drawn = axes.imshow(shares, aspect="auto", cmap=shades, vmin=0)
    axes.set_xticks(range(len(holding.labels)), holding.labels)
    if turned:
        axes.set_xticks(axes.get_xticks(), holding.labels, rotation=65, ha="right", rotation_mode="anchor")
    axes.set_xlabel(holding.column)
    axes.grid(visible=False)
    totals = axes.twinx()
    totals.set_ylim(axes.get_ylim())
    totals.set_yticks(range(len(sites)), [f"{sum(own):,}" for own in counts])
    totals.set_ylabel("rows of the site")
    totals.grid(visible=False)
    bar = made.colorbar(drawn, ax=axes, label="part of the site's rows", shrink=0.8, pad=0.14)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    return made
