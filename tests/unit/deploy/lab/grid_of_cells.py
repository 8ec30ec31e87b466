"""Grids as `silotune lab run` leaves them, with figures that a test chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from client_agent.taskdir import write_json

LABELS = ("no", "yes")


def metrics_of(
    accuracies: Sequence[float], *, sites: int = 2, seed: int = 1, steps: int = 5, every: int = 1,
    state: str = "COMPLETED", sentence: str = "", beside: Mapping[str, Sequence[float]] | None = None,
    of_round: Mapping[str, float] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """metrics.json of a run: the accuracy of each evaluated version, and the steps of each site in a round."""
    rounds = (len(accuracies) - 1) * every
    names = [f"site-{number + 1:02}" for number in range(sites)]
    measured = {"accuracy": list(accuracies), "loss": [2 - value for value in accuracies], **(beside or {})}
    by_version = [{name: values[place] for name, values in measured.items()} for place in range(len(accuracies))]

    def entry(number: int) -> dict[str, Any]:
        updates = [{"site": name, "examples": 100, "steps": steps, "metrics": {"loss": 1.0}} for name in names]
        return {
            "number": number, "train_loss": 1.0, "learning_rate": 1e-3, "seconds": {"total": 2.0},
            "bytes_up": 1_000 * sites, "bytes_down": 2_000 * sites, "metrics": dict(of_round or {}),
            "updates": updates if number else [],
        }  # fmt: skip

    best = max(range(len(accuracies)), key=lambda place: accuracies[place])
    evaluations = [
        {"version": place * every, "site": "house", "split": "validation", "examples": 100, "metrics": found}
        for place, found in enumerate(by_version)
    ]
    evaluations.append({"version": best * every, "site": "house", "split": "test", "examples": 100,
                        "metrics": {"accuracy": accuracies[best] - 0.01}})  # fmt: skip
    return {
        "schema_version": "1",
        "job": {"state": state, "sentence": sentence, "round": rounds, "rounds": rounds},
        "spec": {"seed": seed, "rounds": rounds, "evaluation": {"metric": "accuracy"},
                 "task": {"type": "classification", "labels": list(LABELS)}},
        "rows": dict.fromkeys(names, 100),
        "initial": entry(0),
        "rounds": [entry(number) for number in range(1, rounds + 1)],
        "evaluations": evaluations,
        "versions": {"silotune": "0.1.0", "torch": "2.13.0"},
    }  # fmt: skip


def write_grid(
    folder: Path, *, axes: Mapping[str, Sequence[Any]], of: Callable[[Mapping[str, Any]], dict[str, Any] | None]
) -> Path:
    """A grid with a cell for each combination; a cell of which `of` makes None was not begun."""
    cells = []
    for values in product(*axes.values()):
        own = dict(zip(axes, values, strict=True))
        name = ",".join(f"{axis}-{value}" for axis, value in own.items()).replace(":", "-")
        cells.append({"name": name, "axes": own})
        metrics = of(own)
        if metrics is not None:
            (folder / "cells" / name).mkdir(parents=True)
            write_json(folder / "cells" / name / "metrics.json", metrics)
    folder.mkdir(exist_ok=True)
    write_json(folder / "grid.json", {"schema_version": "1", "cells": cells})
    return folder
