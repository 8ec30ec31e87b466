"""Teacher and student by round, where a grid distils: whether the teacher learns its rows by heart, and who leads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from deploy import figures
from deploy.lab.grid_figures import PANEL_INCHES, Drawing, as_share, finish, label_of, part_of, pieces, varied
from deploy.lab.grid_tables import groups
from deploy.lab.outcomes import Cell, Study, of_rounds

LOSSES = {
    "aggregate_loss": "aggregate",
    "student_loss": "student",
    "teacher_loss": "teacher",
    "teacher_slice_loss": "teacher, on the rows it learns from",
}
ACCURACIES = {"aggregate_accuracy": "aggregate", "student_accuracy": "student", "teacher_accuracy": "teacher"}


def drawings(study: Study) -> list[Drawing]:
    """None where no cell distilled."""
    axes = tuple(varied(study))
    panels = list(dict.fromkeys(
        part_of(key, axes) for key, cells in groups(study).items() if any(_distils(cell) for cell in cells)
    ))  # fmt: skip
    found = []
    for number, part in enumerate(pieces(panels)):
        ending = f"_{number + 1}" if number else ""
        found.append(Drawing(
            f"distillation_accuracy{ending}", "Accuracy of teacher and student by round",
            "On the house agent's validation rows, means over seeds: what was aggregated, the student that learnt from"
            " it, and the teacher. kept: rounds in which the student became the version.",
            partial(_figure, axes=axes, panels=part, names=ACCURACIES, label="accuracy"),
        ))  # fmt: skip
        found.append(Drawing(
            f"distillation_loss{ending}", "Loss of teacher and student by round",
            "The same for the loss. A teacher that learns its rows by heart falls on those while it rises on the"
            " validation rows.",
            partial(_figure, axes=axes, panels=part, names=LOSSES, label="loss"),
        ))  # fmt: skip
    return found


def _distils(cell: Cell) -> bool:
    return bool(of_rounds(cell.done, "distillation_kept"))


def _figure(
    study: Study, ink: str, *, axes: Sequence[str], panels: Sequence[tuple[Any, ...]], names: Mapping[str, str],
    label: str,
) -> Figure:  # fmt: skip
    found = {part_of(key, axes): cells for key, cells in groups(study).items()}
    titles = [_title(study, dict(zip(axes, panel, strict=True)), found[panel]) for panel in panels]
    figure, all_axes = figures.panels(titles, height_inches=PANEL_INCHES)
    for own, panel in zip(all_axes, panels, strict=True):
        for number, (name, said) in enumerate(names.items()):
            points = _means(found[panel], name)
            if points:
                own.plot(*zip(*points, strict=True), label=said, markersize=5, markevery=max(1, len(points) // 8),
                         **figures.style(number))  # fmt: skip
        own.set_xlabel("round")
        own.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        as_share(own, label)
    finish(figure, all_axes, label=label, wide=len(panels) > 1)
    return figure


def _title(study: Study, named: Mapping[str, Any], cells: Sequence[Cell]) -> str:
    kept = [value for cell in cells for _, value in of_rounds(cell.done, "distillation_kept")]
    said = f"kept {sum(kept):.0f} of {len(kept)}"
    label = label_of(study, named, of=list(named))
    return f"{label} ({said})" if label else said


def _means(cells: Sequence[Cell], name: str) -> list[tuple[int, float]]:
    by_round: dict[int, list[float]] = {}
    for cell in cells:
        for number, value in of_rounds(cell.done, name):
            by_round.setdefault(number, []).append(value)
    return [(number, mean(values)) for number, values in sorted(by_round.items())]
