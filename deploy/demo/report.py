"""What a run of the demo found, as one dictionary: demo/report.json, from which plots and page are made.

Accuracies are on the house agent's test rows, except those by round, which are on its validation rows; sizes are in
bytes, times in seconds.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from statistics import mean
from typing import Any

import psutil

from deploy.demo.baselines import POOLED
from deploy.demo.institutes import HOUSE
from protos.jobspec import JobSpec

PACKAGES = ("silotune", "torch", "transformers", "peft", "grpcio", "numpy", "pyarrow")
Metrics = Mapping[str, float]


def build(
    shown: Mapping[str, Any], *, spec: JobSpec, baselines: Mapping[str, Metrics],
    holds: Mapping[str, Mapping[str, int]], exported_accuracy: float, recall: Mapping[str, float],
    memory: Mapping[str, Any], seconds: Mapping[str, float], commands: Sequence[str], usage: str,
) -> dict[str, Any]:  # fmt: skip
    """The report.

    `shown` is `silotune job show JOB --format json`; `baselines` as deploy/demo/baselines.py measures them; `holds`
    counts rows by label for each site, for "validation" and for "test".
    """
    best = shown["job"]["best_version"]
    federated = _evaluation(shown, version=best, split="test")
    alone = {name: metrics for name, metrics in baselines.items() if name != POOLED}
    best_alone = max(alone, key=lambda name: (alone[name]["accuracy"], name))
    return {
        "schema_version": "1",
        "federated_accuracy": federated["accuracy"],
        "pooled_accuracy": baselines[POOLED]["accuracy"],
        "alone_accuracy": {name: metrics["accuracy"] for name, metrics in alone.items()},
        "best_alone": best_alone,
        "exported_model_accuracy": exported_accuracy,
        "federated_recall_by_label": dict(recall),
        "test_metrics": {"federated": federated, "pooled": dict(baselines[POOLED]), "alone": alone},
        "best_round": best,
        "accuracy_before_training": _evaluation(shown, version=0, split="validation")["accuracy"],
        "rounds": [_round(entry, shown) for entry in shown["rounds"] if entry["number"] > 0],
        **memory,
        "who_holds_what": holds,
        "labels": list(_labels(spec)),
        "recipe": spec.model_dump(mode="json"),
        "seed": spec.seed,
        "seconds": dict(seconds),
        "machine": {
            "cores": psutil.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "processor": platform.machine(),
            "python": platform.python_version(),
        },
        "versions": {name: version(name) for name in PACKAGES},
        "commands": list(commands),
        "usage": usage,
    }  # fmt: skip


def _labels(spec: JobSpec) -> tuple[str, ...]:
    labels: tuple[str, ...] = getattr(spec.task, "labels", ())
    return labels


def _evaluation(shown: Mapping[str, Any], *, version: int, split: str) -> dict[str, float]:
    """The house agent's metrics of one version; KeyError when it did not measure it."""
    for found in shown["evaluations"]:
        if (found["site"], found["version"], found["split"]) == (HOUSE, version, split):
            return dict(found["metrics"])
    raise KeyError(f"the house agent did not measure version {version} on {split} data")


def _round(entry: Mapping[str, Any], shown: Mapping[str, Any]) -> dict[str, Any]:
    counted = [update for update in entry["updates"] if update["fate"] == "ACCEPTED"]
    stages = sorted({stage for update in counted for stage in update["seconds"]})
    rows = sum(update["examples"] for update in counted)
    return {
        "number": entry["number"],
        "accuracy": _evaluation(shown, version=entry["number"], split="validation")["accuracy"],
        "train_loss": sum(update["metrics"]["loss"] * update["examples"] for update in counted) / rows,
        "updates": len(counted),
        # By the coordinator's clock, phase by phase; what its worker did within `aggregating` is told apart.
        "seconds": {name: value for name, value in entry["seconds"].items() if not name.startswith("aggregation_")},
        "aggregation_seconds": {
            name: value for name, value in entry["seconds"].items() if name.startswith("aggregation_")
        },
        # At the sites, the mean over them.
        "site_seconds": {stage: mean(update["seconds"].get(stage, 0.0) for update in counted) for stage in stages},
        "bytes_up": entry["bytes_up"],
        "bytes_down": entry["bytes_down"],
    }
