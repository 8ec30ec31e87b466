"""demo/report.html: one file with everything in it, readable on a phone, in light and in dark."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from deploy.demo.plots import FIGURES


def render(report: Mapping[str, Any], *, plots: Path) -> str:
    """The page for a report and the figures that `plots.draw` wrote."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(percent=percent, megabytes=megabytes, minutes=minutes)
    images = {
        name: {
            theme: base64.b64encode((plots / f"{name}{ending}.png").read_bytes()).decode()
            for theme, ending in (("light", ""), ("dark", "-dark"))
        }
        for name in FIGURES
    }
    return environment.get_template("template.html").render(report=report, images=images, said=_said(report))


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def megabytes(value: float) -> str:
    return f"{value / 1e6:,.0f} MB"


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def _said(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the sentences of the page need and the report does not hold as such."""
    holds, alone = report["who_holds_what"], report["alone_accuracy"]
    rows = {name: sum(counts.values()) for name, counts in holds.items()}
    best_alone = alone[report["best_alone"]]
    rounds = report["rounds"]
    local = report["recipe"]["local"]
    missing = {site: sum(holds[site][label] == 0 for label in report["labels"]) for site in alone}
    return {
        "rows": rows,
        "site_rows": sum(rows[site] for site in alone),
        "best_alone_accuracy": best_alone,
        "worst_alone": min(alone, key=lambda site: alone[site]),
        "gain_points": 100 * (report["federated_accuracy"] - best_alone),
        "short_of_pooled_points": 100 * (report["pooled_accuracy"] - report["federated_accuracy"]),
        "sites_without_a_label": sum(count > 0 for count in missing.values()),
        "steps_alone": report["recipe"]["rounds"] * local["steps"],
        "steps_pooled": report["recipe"]["rounds"] * local["steps"] * len(alone),
        "bytes_up": sum(entry["bytes_up"] for entry in rounds),
        "bytes_down": sum(entry["bytes_down"] for entry in rounds),
        "round_seconds": sum(entry["seconds"]["total"] for entry in rounds) / len(rounds),
        "aggregating_seconds": sum(entry["seconds"].get("aggregating", 0.0) for entry in rounds) / len(rounds),
        "train_seconds": sum(entry["site_seconds"].get("train", 0.0) for entry in rounds) / len(rounds),
        "largest_trainer_bytes": max(report["trainer_peak_rss_bytes"].values()),
        "largest_agent_bytes": max(report["agent_peak_rss_bytes"].values()),
    }
