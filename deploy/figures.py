"""Figures as PNG files, each for a light and for a dark page.

Colours are those of Okabe and Ito (2008, "Color Universal Design"), which people with any kind of colour vision can
tell apart; what matters is written into the figure as well. Small figures with large type, to be read on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#8A8A8A"
# Lines that differ by colour, by marker and by dashes.
STYLES = (
    {"color": BLUE, "marker": "o", "linestyle": "-"},
    {"color": VERMILION, "marker": "s", "linestyle": "--"},
    {"color": GREEN, "marker": "^", "linestyle": "-."},
    {"color": ORANGE, "marker": "D", "linestyle": ":"},
    {"color": PURPLE, "marker": "v", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
    {"color": SKY, "marker": "P", "linestyle": (0, (8, 2))},
    {"color": GREY, "marker": "X", "linestyle": (0, (3, 3))},
)
INK = {"light": "#1F2328", "dark": "#E6E6E6"}
PAPER = {"light": "#FFFFFF", "dark": "#16191D"}
ENDINGS = {"light": "", "dark": "-dark"}
WIDTH_INCHES = 5.2
# Of small multiples: so many beside each other.
COLUMNS, WIDE_INCHES = 2, 7.4
DOTS_PER_INCH = 170

# Of what is to be shown, and the colour of text in it.
FigureOf = Callable[[Any, str], Figure]


def draw(figures: Mapping[str, FigureOf], shown: Any, *, directory: Path) -> None:
    """Writes NAME.png and NAME-dark.png for each figure."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, figure_of in figures.items():
        for theme, ending in ENDINGS.items():
            with _theme(theme):
                figure_of(shown, INK[theme]).savefig(directory / f"{name}{ending}.png")


def figure(*, height_inches: float) -> tuple[Figure, Axes]:
    # Without pyplot: no window, no global list of figures.
    made = Figure(figsize=(WIDTH_INCHES, height_inches), dpi=DOTS_PER_INCH, layout="constrained")
    return made, made.add_subplot()


def panels(titles: Sequence[str], *, height_inches: float) -> tuple[Figure, list[Axes]]:
    """Small multiples with common axes, each with a title and `height_inches` high; one alone is a plain figure."""
    if len(titles) == 1:
        made, axes = figure(height_inches=height_inches)
        found = [axes]
    else:
        rows = math.ceil(len(titles) / COLUMNS)
        size = (WIDE_INCHES, height_inches * rows)
        made = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
        *found, last = made.subplots(rows, COLUMNS, sharey=True, squeeze=False).flat
        if len(titles) % COLUMNS:
            last.set_axis_off()
        else:
            found.append(last)
    for axes, title in zip(found, titles, strict=True):
        axes.set_title(title, fontsize="medium")
    return made, found


def style(number: int) -> Mapping[str, Any]:
    """Of a line; where there are more lines than colours, the same colour has another marker and other dashes."""
    again, place = divmod(number, len(STYLES))
    return {**STYLES[(place + 3 * again) % len(STYLES)], "color": STYLES[place]["color"]}


@contextmanager
def _theme(theme: str) -> Iterator[None]:
    ink, paper = INK[theme], PAPER[theme]
    settings = {
        "figure.facecolor": paper, "savefig.facecolor": paper, "axes.facecolor": paper, "legend.facecolor": paper,
        "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": ink, "xtick.color": ink, "ytick.color": ink,
        "legend.framealpha": 0.9, "legend.edgecolor": "none",
        "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "axes.axisbelow": True, "grid.color": ink, "grid.alpha": 0.15,
        "lines.linewidth": 2.0, "font.size": 11, "legend.fontsize": 10,
    }  # fmt: skip
    with matplotlib.rc_context(settings):  # type: ignore[arg-type]
        yield
