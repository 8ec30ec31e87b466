"""`silotune lab report` of a grid: one page, its figures as files, every cell as CSV and all of it as JSON.

A grid can be reported while it runs: what is done is drawn, what is not is listed.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from client_agent.taskdir import write_json
from deploy import figures, pages
from deploy.lab import distillation_figures, grid_figures, holdings
from deploy.lab.certainty import Mean
from deploy.lab.grid_figures import is_share
from deploy.lab.grid_tables import SIGNIFICANT, comparisons, curve, glance, groups, law, plain, summaries
from deploy.lab.outcomes import AXES, TARGET_SHARE, Row, Study, read
from deploy.lab.report import PAGE
from protos.metrics import LOWER_IS_BETTER

TEMPLATE = Path(__file__).parent / "grid.html"
TABLE, DATA, PLOTS = "cells.csv", "report.json", "plots"


def write_grid_report(
    grids: Sequence[Path], *, out: Path, title: str = "", metric: str | None = None, budget: int | None = None
) -> Path:
    """Writes report.html, cells.csv, report.json and plots/ into `out`; the page.

    `budget`: the round after which cells are compared, instead of each one's last. InvalidInput as
    `deploy.lab.outcomes.read`.
    """
    study = read(grids, metric=metric, budget=budget, title=title)
    holders = holdings.drawings(study)
    drawn = [*grid_figures.drawings(study), *distillation_figures.drawings(study), *(drawing for drawing, _ in holders)]
    figures.draw({drawing.name: drawing.of for drawing in drawn}, study, directory=out / PLOTS)
    rows, law_rows, compared = summaries(study), law(study), comparisons(study)
    data_sets, lines = glance(study, rows)
    page = pages.render(
        TEMPLATE, plots=out / PLOTS, figures=[drawing.name for drawing in drawn], study=study, drawn=drawn, rows=rows,
        data_sets=data_sets, lines=lines, law=law_rows, compared=_by_figure(compared), axes=_shown_axes(study),
        mean=mean_text, number=number_text, points=points_text, lower=LOWER_IS_BETTER, target=TARGET_SHARE,
        significant=SIGNIFICANT, versions=_versions(study), files=(TABLE, DATA, PLOTS),
    )  # fmt: skip
    _write_cells(study.rows, out / TABLE)
    write_json(out / DATA, {
        "schema_version": "1",
        "title": study.title,
        "metric": study.metric,
        "budget": study.budget,
        "target_share": TARGET_SHARE,
        "chance": [{"data": data, "share": share} for data, share in study.chance.items()],
        "cells": study.rows,
        "groups": plain(rows),
        "curves": _curves(study),
        "comparisons": compared,
        "law": law_rows,
        "holdings": [{"title": drawing.title, "column": holding.column, "labels": holding.labels,
                      "rows": holding.counts} for drawing, holding in holders],
        "versions": _versions(study),
        "missing": [{"cell": cell.name, "state": cell.state, "sentence": cell.sentence} for cell in study.missing],
    })  # fmt: skip
    (out / PAGE).write_text(page)
    return out / PAGE


def _write_cells(rows: Sequence[Row], path: Path) -> None:
    # A column that only some cells have comes after those that all have.
    columns = list(dict.fromkeys(["cell", *AXES, *(name for row in rows for name in row)]))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def _curves(study: Study) -> list[dict[str, Any]]:
    names = AXES[:-1]
    return [
        {
            **dict(zip(names, key, strict=True)),
            "rounds": [dict(zip(("round", "mean", "lowest", "highest"), point, strict=True))
                       for point in curve(study, cells)],
            "steps": [dict(zip(("steps", "mean", "lowest", "highest"), point, strict=True))
                      for point in curve(study, cells, by_steps=True)],
        }
        for key, cells in groups(study).items()
    ]  # fmt: skip


def _versions(study: Study) -> list[dict[str, Any]]:
    """With what the cells were made: each set of versions, and how many cells have it."""
    found: dict[tuple[tuple[str, str], ...], int] = {}
    for cell in study.done:
        have = tuple(sorted(cell.done.get("versions", {}).items()))
        found[have] = found.get(have, 0) + 1
    return [{"cells": count, "versions": dict(have)} for have, count in found.items()]


def _by_figure(compared: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in compared:
        found.setdefault(row["figure"], []).append(row)
    return found


def _shown_axes(study: Study) -> list[str]:
    return [axis for axis in AXES[:-1] if study.values(axis)]


def mean_text(found: Mean | None, *, metric: str) -> str:
    """A mean with half its interval: points of a hundred for shares, else the number itself."""
    if found is None:
        return "–"
    scale, digits = (100, 1) if is_share(metric) else (1, 3)
    half = "" if found.half is None else f" ± {scale * found.half:.{digits}f}"
    return f"{scale * found.value:.{digits}f}{half}{' %' if scale == 100 else ''}"


def points_text(value: float | None, *, metric: str) -> str:
    """A difference, with its sign."""
    if value is None:
        return "–"
    return f"{100 * value:+.2f}" if is_share(metric) else f"{value:+.4f}"


def number_text(value: float | None, *, digits: int = 0) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
