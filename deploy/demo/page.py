"""demo/report.html: the page, and what its sentences need."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy import pages
from deploy.demo.plots import FIGURES

TEMPLATE = Path(__file__).parent / "template.html"


def render(report: Mapping[str, Any], *, plots: Path) -> str:
    """The page for a report and the figures that `plots.draw` wrote."""
    return pages.render(TEMPLATE, plots=plots, figures=FIGURES, report=report, said=_said(report))


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
