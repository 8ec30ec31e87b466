"""What each cell of a grid came to: its figures in one row, and why a cell has none."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow.parquet

from client_agent.settings import DataSet
from client_agent.taskdir import read_json
from deploy.lab.grid import CELLS, GRID, LOG, read_grid
from deploy.lab.report import held_out, summary, unusual
from deploy.lab.run import METRICS, PLAN
from protos.digests import digest_of
from protos.errors import InvalidInput
from protos.metrics import LOWER_IS_BETTER

# What a grid varies; the seed last, because figures are over seeds.
AXES = ("model", "data", "sites", "variant", "partition", "seed")
# Reported beside the measure that the page is about.
BESIDE = ("accuracy", "matthews_correlation", "macro_f1", "loss")
# Hilmkil et al. 2021, section 3.4: the part of the non-federated figure that a federation is to reach.
TARGET_SHARE = 0.9
BASELINES_DIFFER_BY = (
    (), ("partition",), ("seed",), ("seed", "partition"), ("partition", "variant"), ("seed", "partition", "variant"),
)  # fmt: skip

Point = tuple[int, float]
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One experiment of a grid. `axes` has only what the grid names."""

    name: str
    axes: Mapping[str, Any]
    folder: Path
    metrics: Mapping[str, Any] | None

    @property
    def state(self) -> str:
        return self.metrics["job"]["state"] if self.metrics else "NOT BEGUN"

    @property
    def is_done(self) -> bool:
        return self.state == "COMPLETED"

    @property
    def sentence(self) -> str:
        if self.metrics:
            return self.metrics["job"]["sentence"]
        # It ended before there was a job.
        log = self.folder.with_name(f"{self.name}.{LOG}")
        return next(iter(log.read_text().splitlines()[-1:]), "") if log.exists() else ""

    @property
    def key(self) -> tuple[Any, ...]:
        """What it is but for its seed: cells with the same key are repetitions."""
        return tuple(self.axes.get(axis) for axis in AXES[:-1])

    @property
    def done(self) -> Mapping[str, Any]:
        """The metrics of a cell that is done."""
        assert self.metrics is not None
        return self.metrics


@dataclass(frozen=True)
class Study:
    """A grid as it stands. `metric` is what the page is about, `budget` the round at which sizes are compared."""

    title: str
    cells: tuple[Cell, ...]
    metric: str
    budget: int | None = None
    # Part of the held-out rows that the most frequent label has, by data set.
    chance: Mapping[Any, float] = field(default_factory=dict)

    @cached_property
    def done(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.is_done]

    @cached_property
    def missing(self) -> list[Cell]:
        return [cell for cell in self.cells if not cell.is_done]

    @property
    def lower_is_better(self) -> bool:
        return self.metric in LOWER_IS_BETTER

    def values(self, axis: str) -> list[Any]:
        """What an axis takes in the cells that are done: numbers in their order, names in the grid's."""
        found = list(dict.fromkeys(cell.axes[axis] for cell in self.done if axis in cell.axes))
        return sorted(found) if axis in ("sites", "seed") else found

    def points(self, cell: Cell) -> list[Point]:
        return held_out(cell.done, self.metric)

    @cached_property
    def rows(self) -> list[Row]:
        """One for each cell, in the grid's order; a cell that is not done has its axes, state and sentence."""
        rows = [row_of(cell, study=self) for cell in self.cells]
        by_name = {row["cell"]: row for row in rows}
        for cell in self.done:
            by_name[cell.name] |= _against_baseline(cell, study=self, rows=by_name)
        return rows


def read(grids: Sequence[Path], *, metric: str | None = None, budget: int | None = None, title: str = "") -> Study:
    """The cells of one grid, or of several: a cell of two grids is taken where it is done.

    InvalidInput when a folder holds no grid, or no cell measured `metric`.
    """
    cells: dict[str, Cell] = {}
    for folder in grids:
        entries = read_grid(folder)
        if entries is None:
            raise InvalidInput(f"{folder} holds no {GRID}.", hint="`silotune lab run` writes it where it runs a grid.")
        for entry in entries:
            path = folder / CELLS / entry["name"]
            cell = Cell(entry["name"], entry["axes"], path, read_json(path / METRICS))
            if cell.name not in cells or not cells[cell.name].is_done:
                cells[cell.name] = cell
    found = tuple(cells.values())
    measured = _measured(found)
    if metric is not None and measured and metric not in measured:
        raise InvalidInput(f"No cell measured {metric!r}.", hint=f"Measured are: {', '.join(measured)}.")
    wanted = metric or _main_metric(found, measured)
    chances = {}
    for cell in found:
        if cell.is_done and wanted == "accuracy" and cell.axes.get("data") not in chances:
            chances[cell.axes.get("data")] = _chance(cell)
    known = {data: share for data, share in chances.items() if share is not None}
    return Study(title or ", ".join(folder.name for folder in grids), found, wanted, budget, known)


def _measured(cells: Sequence[Cell]) -> list[str]:
    return sorted(
        {name for cell in cells if cell.is_done for found in cell.done["evaluations"] for name in found["metrics"]}
    )


def _main_metric(cells: Sequence[Cell], measured: Sequence[str]) -> str:
    if "accuracy" in measured:
        return "accuracy"
    return next((cell.done["spec"]["evaluation"]["metric"] for cell in cells if cell.is_done), "accuracy")


def _chance(cell: Cell) -> float | None:
    """What always naming the most frequent label gets right on the validation rows; without them, one of its labels."""
    labels = cell.done["spec"]["task"].get("labels")
    if not labels:
        return None
    plan = read_json(cell.folder / PLAN) or {"experiment": {}}
    data = plan["experiment"].get("data") or {"columns": {}}
    column = data["columns"].get("label", DataSet.model_fields["label"].default)
    path = Path(data.get("validation") or "")
    if path.suffix == ".parquet" and path.is_file() and column in pyarrow.parquet.read_schema(path).names:
        counts = Counter(pyarrow.parquet.read_table(path, columns=[column])[column].to_pylist())
        return max(counts.values()) / counts.total()
    return 1 / len(labels)


def row_of(cell: Cell, *, study: Study) -> Row:
    """One row of cells.csv. Sizes in bytes, times in seconds, of all rounds unless the name says otherwise."""
    row: Row = {"cell": cell.name, **cell.axes, "state": cell.state, "sentence": cell.sentence}
    if not cell.is_done:
        return row
    metrics, points = cell.done, study.points(cell)
    spec_text = json.dumps(metrics["spec"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    row |= {"config_hash": digest_of(spec_text.encode()), "seed": metrics["spec"]["seed"], "metric": study.metric}
    row |= {"chance": study.chance.get(cell.axes.get("data"))}
    if points:
        best = (min if study.lower_is_better else max)(points, key=lambda point: point[1])
        tested = _tested(metrics)
        row |= {
            "first": points[0][1],
            "best": best[1],
            "best_round": best[0],
            "last": points[-1][1],
            "last_round": points[-1][0],
            "at_budget": value_at(points, study.budget),
            "test": tested.get(study.metric),
        }
        for name in BESIDE:
            beside = dict(held_out(metrics, name))
            if name != study.metric and beside:
                row |= {f"{name}_best": beside.get(best[0]), f"{name}_last": beside[max(beside)]}
                row |= {f"{name}_test": tested[name]} if name in tested else {}
    found = summary(metrics)
    rounds = metrics["rounds"]
    steps = steps_at(metrics)
    errors = [value for _, value in of_rounds(metrics, "aggregation_error")]
    kept = [value for _, value in of_rounds(metrics, "distillation_kept")]
    taught = [value for _, value in of_rounds(metrics, "teacher_loss")]
    learnt = [value for _, value in of_rounds(metrics, "teacher_slice_loss")]
    row |= {
        "rounds": found["rounds"],
        "steps_along_average": steps[max(steps)],
        "aggregation_error": mean(errors) if errors else None,
        "distillations_kept": sum(kept) if kept else None,
        **({"teacher_loss_first": taught[0], "teacher_loss_last": taught[-1]} if taught else {}),
        **({"teacher_slice_loss_last": learnt[-1]} if learnt else {}),
        "rounds_undistilled": sum(bool(entry.get("undistilled")) for entry in rounds),
        "left_out": " ".join(f"{one['site']}={one['left_out']}" for one in unusual(metrics) if one["left_out"]),
        **{name: found[name] for name in ("bytes_up", "bytes_down", "seconds")},
    }
    if rounds:
        row |= {f"{name}_per_round": mean(entry[name] for entry in rounds) for name in ("bytes_up", "bytes_down")}
        row |= {"seconds_per_round": mean(entry["seconds"].get("total", 0.0) for entry in rounds)}
    return row | {"versions": " ".join(f"{name}={text}" for name, text in metrics.get("versions", {}).items())}


def of_rounds(metrics: Mapping[str, Any], name: str) -> list[Point]:
    """(round, value) of what rounds measured of themselves, where they did; releases before did not write it down."""
    measured = [(entry["number"], entry.get("metrics", {}).get(name)) for entry in metrics["rounds"]]
    return [(number, value) for number, value in measured if value is not None]


def _tested(metrics: Mapping[str, Any]) -> Mapping[str, float]:
    """What the house agent measured on its test rows, which is done once, of the best version."""
    return next((found["metrics"] for found in metrics["evaluations"] if found["split"] == "test"), {})


def value_at(points: Sequence[Point], budget: int | None) -> float | None:
    """The figure of the last version measured by round `budget`; of the last of all where it is None."""
    found = [value for version, value in points if budget is None or version <= budget]
    return found[-1] if found else None


def steps_at(metrics: Mapping[str, Any]) -> dict[int, float]:
    """S = R E n / (K B) by version: the optimizer steps of one site, the mean of all, summed over the rounds so far."""
    total, found = 0.0, {0: 0.0}
    for entry in metrics["rounds"]:
        steps = [update.get("steps", 0) for update in entry["updates"]]
        total += mean(steps) if steps else 0.0
        found[entry["number"]] = total
    return found


def _against_baseline(cell: Cell, *, study: Study, rows: Mapping[str, Row]) -> Row:
    """How much of the non-federated figure a cell reaches, and when it first has 90 % of it."""
    points, alone = study.points(cell), baselines(cell, cells=study.done)
    values = [value for other in alone if (value := rows[other.name].get("at_budget")) is not None]
    if not points or not values:
        return {}
    baseline, have = mean(values), rows[cell.name]["at_budget"]
    lower = study.lower_is_better
    target = baseline / TARGET_SHARE if lower else TARGET_SHARE * baseline
    reached = [version for version, value in points if (value <= target if lower else value >= target)]
    return {
        "baseline": baseline,
        "baseline_cells": " ".join(other.name for other in alone),
        "share_of_baseline": have / baseline if baseline and have is not None else None,
        "target": target,
        "rounds_to_target": reached[0] if reached else None,
    }


def baselines(cell: Cell, *, cells: Sequence[Cell]) -> list[Cell]:
    """The cells with one site that this one is held against: as like it as there are.

    Best the same but for the number of sites; where none is done, another partition (one site holds all rows in any),
    then other seeds, then another variant.
    """
    alone = [other for other in cells if other.axes.get("sites") == 1]
    for free in BASELINES_DIFFER_BY:
        fixed = [axis for axis in AXES if axis != "sites" and axis not in free]
        found = [other for other in alone if all(other.axes.get(axis) == cell.axes.get(axis) for axis in fixed)]
        if found:
            # Of other variants the one that the grid names first: the study that the grid is about.
            return [other for other in found if other.axes.get("variant") == found[0].axes.get("variant")]
    return []
