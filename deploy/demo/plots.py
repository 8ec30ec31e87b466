"""The report's figures: what is in each of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from deploy import figures
from deploy.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, YELLOW, FigureOf

# What a site does in a round, in that order. `first_step` overlaps `load` and `train`.
SITE_STAGES = {"fetch": SKY, "load": YELLOW, "train": GREEN, "save": PURPLE, "upload": BLUE}

Report = Mapping[str, Any]


def draw(report: Report, *, directory: Path) -> None:
    """Writes NAME.png and NAME-dark.png for each figure."""
    figures.draw(FIGURES, report, directory=directory)


def accuracy_by_round(report: Report, ink: str) -> Figure:
    figure, axes = figures.figure(height_inches=4.0)
    rounds = report["rounds"]
    numbers = [0, *(entry["number"] for entry in rounds)]
    values = [report["accuracy_before_training"], *(entry["accuracy"] for entry in rounds)]
    best_alone = report["alone_accuracy"][report["best_alone"]]
    axes.axhline(report["pooled_accuracy"], color=ORANGE, linestyle="--", label="all rows in one place (test)")
    axes.axhline(best_alone, color=PURPLE, linestyle=":", label=f"best institute alone: {report['best_alone']} (test)")
    axes.plot(numbers, values, color=BLUE, marker="o", label="federated (validation)")
    axes.plot(
        [report["best_round"]], [report["federated_accuracy"]], color=VERMILION, marker="*", markersize=15,
        linestyle="none", label=f"federated, round {report['best_round']} (test)",
    )  # fmt: skip
    axes.set_xlabel("round")
    axes.set_ylabel("accuracy on held-out passages")
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.legend(loc="lower right")
    return figure


def federated_against_alone(report: Report, ink: str) -> Figure:
    alone = sorted(report["alone_accuracy"].items(), key=lambda entry: entry[1])
    groups = {
        "each institute alone": (GREY, alone),
        "federated": (BLUE, [("federated", report["federated_accuracy"])]),
        "all rows in one place": (ORANGE, [("pooled", report["pooled_accuracy"])]),
    }
    figure, axes = figures.figure(height_inches=1.4 + 0.32 * (len(alone) + 2))
    for label, (colour, bars) in groups.items():
        names, values = zip(*bars, strict=True)
        drawn = axes.barh(names, values, color=colour, label=label)
        axes.bar_label(drawn, labels=[f"{100 * value:.1f} %" for value in values], padding=3, color=ink)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=9)
    axes.set_xlim(0, 1.15)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.set_xlabel("accuracy on the test passages")
    axes.grid(False, axis="y")
    return figure


def who_holds_what(report: Report, ink: str) -> Figure:
    labels = report["labels"]
    sites = list(report["alone_accuracy"])
    holds = report["who_holds_what"]
    shares = [[holds[site][label] / sum(holds[site].values()) for label in labels] for site in sites]
    figure, axes = figures.figure(height_inches=1.6 + 0.36 * len(sites))
    # Viridis is readable in any colour vision and in grey.
    image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for row, site in enumerate(sites):
        for column, label in enumerate(labels):
            count, share = holds[site][label], shares[row][column]
            text = str(count) if count else "–"
            axes.text(
                column, row, text, ha="center", va="center", color="black" if share > 0.6 else "white", fontsize=9
            )
    axes.set_xticks(range(len(labels)), labels, rotation=38, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(sites)), sites)
    axes.set_xlabel("kind of question")
    axes.grid(False)
    bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1, symbol=" %"), pad=0.02)
    bar.set_label("share of the institute's rows")
    return figure


def time_by_stage(report: Report, ink: str) -> Figure:
    figure, axes = figures.figure(height_inches=4.0)
    rounds = report["rounds"]
    numbers = [entry["number"] for entry in rounds]
    total = [sum(entry["site_seconds"].get(stage, 0.0) for stage in SITE_STAGES) for entry in rounds]
    bottom = [0.0] * len(rounds)

    def add(values: list[float], label: str, colour: str) -> None:
        axes.bar(numbers, values, bottom=bottom, label=label, color=colour)
        bottom[:] = [low + value for low, value in zip(bottom, values, strict=True)]

    for stage, colour in SITE_STAGES.items():
        add([entry["site_seconds"].get(stage, 0.0) for entry in rounds], f"site: {stage}", colour)
    collecting = [entry["seconds"].get("collecting", 0.0) for entry in rounds]
    add([max(0.0, whole - busy) for whole, busy in zip(collecting, total, strict=True)], "waiting for others", GREY)
    add([entry["seconds"].get("aggregating", 0.0) for entry in rounds], "coordinator: mean", VERMILION)
    axes.set_xlabel("round")
    axes.set_ylabel("seconds")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, 1.45 * max(bottom, default=1.0) or 1.0)
    axes.legend(loc="upper center", ncols=3, fontsize=9)
    return figure


def bytes_by_round(report: Report, ink: str) -> Figure:
    figure, axes = figures.figure(height_inches=3.4)
    rounds = report["rounds"]
    width = 0.38
    for offset, key, label, colour in (
        (-width / 2, "bytes_down", "down: the global model, to sites and house agent", SKY),
        (width / 2, "bytes_up", "up: every site's update", BLUE),
    ):
        places = [entry["number"] + offset for entry in rounds]
        axes.bar(places, [entry[key] / 1e6 for entry in rounds], width, label=label, color=colour)
    axes.set_xlabel("round")
    axes.set_ylabel("megabytes, all sites together")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, 1.3 * max((entry[key] / 1e6 for entry in rounds for key in ("bytes_up", "bytes_down")), default=1))
    axes.legend(loc="upper center")
    return figure


FIGURES: dict[str, FigureOf] = {
    "accuracy_by_round": accuracy_by_round,
    "federated_against_alone": federated_against_alone,
    "who_holds_what": who_holds_what,
    "time_by_stage": time_by_stage,
    "bytes_by_round": bytes_by_round,
}
