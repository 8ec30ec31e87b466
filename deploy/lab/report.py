"""`silotune lab report`: what came of one experiment, or of several beside each other, as figures and one page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from coordinator.benchmarks import Measured, parts
from deploy import figures, pages
from deploy.figures import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, FigureOf
from deploy.lab.place import HOUSE
from deploy.lab.run import read_metrics
from protos.metrics import BENCHMARKS, LOWER_IS_BETTER
from protos.update_figures import COEFFICIENT, COSINE, KINDS, NORM, NORM_Z, OUTLYING_Z, by_site

TEMPLATE = Path(__file__).parent / "template.html"
PAGE = "report.html"
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)
DRAWN = ("loss", "accuracy", "macro_f1")
# Rounds that a line of the training loss is the mean of: two of twenty sites a round jump up and down.
SMOOTHED_ROUNDS = 10

Runs = Mapping[str, Mapping[str, Any]]
Point = tuple[int, float]


def write_report(runs: Sequence[Path], *, out: Path, title: str = "") -> Path:
    """Writes report.html and plots/ into `out`; the page. InvalidInput when nothing was run in one of `runs`."""
    found = {run.name: read_metrics(run) for run in runs}
    drawn = drawings(found)
    figures.draw(drawn, found, directory=out / "plots")
    page = pages.render(
        TEMPLATE, plots=out / "plots", figures=drawn, title=title or ", ".join(found), runs=found,
        rows={name: summary(metrics) for name, metrics in found.items()},
        drops={name: drops(metrics) for name, metrics in found.items()},
        unusual={name: unusual(metrics) for name, metrics in found.items()},
        words={name: name.replace("_", " ") for name in drawn},
    )  # fmt: skip
    (out / PAGE).write_text(page)
    return out / PAGE


def held_out(metrics: Mapping[str, Any], name: str) -> list[Point]:
    """(version, value) of a metric on the house agent's validation rows, in order."""
    return sorted(
        (found["version"], found["metrics"][name])
        for found in metrics["evaluations"]
        if found["site"] == HOUSE and found["split"] == "validation" and name in found["metrics"]
    )


def drawings(runs: Runs) -> dict[str, FigureOf]:
    """The figures that these runs have something for, by their names."""
    smoothed = any(_width(metrics) > 1 for metrics in runs.values())
    label = f"training loss, mean of {SMOOTHED_ROUNDS} rounds" if smoothed else "training loss"
    wanted: dict[str, FigureOf] = {"training_loss": partial(_lines, of=_training_loss, label=label)}
    names = (*DRAWN, *(f"{benchmark}_accuracy" for benchmark in BENCHMARKS))
    for name in names:
        if any(held_out(metrics, name) for metrics in runs.values()):
            label = f"{name.replace('_', ' ')} on held-out rows"
            wanted[f"held_out_{name}"] = partial(_lines, of=partial(held_out, name=name), label=label)
    return wanted


def _width(metrics: Mapping[str, Any]) -> int:
    return SMOOTHED_ROUNDS if len(metrics["rounds"]) > 2 * SMOOTHED_ROUNDS else 1


def _training_loss(metrics: Mapping[str, Any]) -> list[Point]:
    rounds, width = metrics["rounds"], _width(metrics)
    points = []
    for end in range(width, len(rounds) + 1):
        part = [entry["train_loss"] for entry in rounds[end - width : end]]
        points.append((rounds[end - 1]["number"], sum(part) / width))
    return points


def _lines(runs: Runs, ink: str, *, of: Callable[[Mapping[str, Any]], list[Point]], label: str) -> Figure:
    figure, axes = figures.figure(height_inches=3.6)
    for (name, metrics), colour in zip(runs.items(), COLOURS * len(runs), strict=False):
        points = of(metrics)
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, label=name, marker="o" if len(points) < 30 else "")
    axes.set_xlabel("round")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if "accuracy" in label:
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.legend()
    return figure


def summary(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """One run in one row. Bytes are the payload of all rounds, version 0 included."""
    # Version 0 may still be on its way.
    rounds = [entry for entry in (metrics["initial"], *metrics["rounds"]) if entry]
    metric = metrics["spec"]["evaluation"]["metric"]
    points = held_out(metrics, metric)
    best = (min if metric in LOWER_IS_BETTER else max)(points, key=lambda point: point[1]) if points else None
    return {
        "rounds": len(metrics["rounds"]),
        "sites": len(metrics["rows"]),
        "metric": metric,
        "first": points[0][1] if points else None,
        "best": best,
        "last": points[-1][1] if points else None,
        "bytes_up": sum(entry["bytes_up"] for entry in rounds),
        "bytes_down": sum(entry["bytes_down"] for entry in rounds),
        "seconds": sum(entry["seconds"].get("total", 0.0) for entry in rounds),
    }


def unusual(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each site whose updates were looked at, in how many rounds, and in how many of them they were unusual.

    `weight` is the mean of what a robust rule multiplied them with, None for rules that take each coordinate by itself.
    """
    measured: dict[str, dict[str, list[float]]] = {}
    for entry in metrics["rounds"]:
        for kind in KINDS:
            for site, value in by_site(entry.get("metrics", {}), kind).items():
                measured.setdefault(site, {each: [] for each in KINDS})[kind].append(value)
    return [
        {
            "site": site,
            "rounds": len(of[NORM]),
            "left_out": of[COEFFICIENT].count(0.0),
            "weight": mean(of[COEFFICIENT]) if of[COEFFICIENT] else None,
            "against": sum(cosine < 0 for cosine in of[COSINE]),
            "outlying": sum(abs(z) > OUTLYING_Z for z in of[NORM_Z]),
        }
        for site, of in sorted(measured.items())
    ]


def drops(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each benchmark: from its best version to the last one, what was lost by format and what by knowledge."""
    found = []
    for name in BENCHMARKS:
        points = held_out(metrics, f"{name}_accuracy")
        if not points:
            continue
        asked = {version: _measured(metrics, benchmark=name, version=version) for version, _ in points}
        best, last = max(points, key=lambda point: point[1]), points[-1]
        by_format, knowledge = parts(asked[best[0]], asked[last[0]])
        change = {"format": by_format, "knowledge": knowledge}
        found.append({"name": name, "first": points[0], "best": best, "last": last, **change})
    return found


def _measured(metrics: Mapping[str, Any], *, benchmark: str, version: int) -> Measured:
    measures = ("questions", "accuracy", "unparseable")
    questions, accuracy, unparseable = (dict(held_out(metrics, f"{benchmark}_{each}"))[version] for each in measures)
    parseable = questions * (1 - unparseable)
    return Measured(questions=questions, correct=questions * accuracy, parseable=parseable, gained=None, lost=None)
