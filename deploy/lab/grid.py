"""`silotune lab run` of a grid: a run for each combination, one after another or several at once.

    OUT/grid.json            the cells
    OUT/cells/NAME/          each is a run as it would be alone (deploy/lab/run.py)
    OUT/models/NAME/         base models that were made

What is done is in the folder, so a grid that was killed goes on when the same command is typed again, and one that is
typed with more seeds has more cells. Several machines share the work with `--part`, and a folder.
"""

from __future__ import annotations

import fcntl
import json
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet

from client_agent.taskdir import read_json, write_json
from coordinator.terminal import duration
from deploy.lab.models import directory_of
from deploy.lab.plan import Cell
from deploy.lab.run import METRICS, Plan, Say, run
from deploy.local import CommandFailed
from protos.digests import digest_of
from protos.errors import Conflict, SilotuneError

GRID, LOCK, CELLS, MODELS, LOG = "grid.json", "grid.lock", "cells", "models", "lab.log"


class Stopped(Exception):
    """Whoever started the grid wants it to end."""


@dataclass(frozen=True)
class Failed:
    name: str
    sentence: str


def run_grid(cells: Sequence[Cell], *, out: Path, jobs: int, part: tuple[int, int], say: Say) -> list[Failed]:
    """Runs the cells that are not done yet, `jobs` at once; of part (i, n) every n-th from the i-th on. What failed.

    Conflict: a cell of that name was another experiment when the grid was last typed. KeyboardInterrupt ends it as soon
    as no cell is in the middle of starting; all goes on later.
    """
    out.mkdir(parents=True, exist_ok=True)
    _record(cells, out=out)
    own = cells[part[0] - 1 :: part[1]]
    waiting = [cell for cell in own if not is_done(out / CELLS / cell.name)]
    say(f"{len(own)} cells, {len(own) - len(waiting)} of them done." if own != waiting else f"{len(own)} cells.")
    stop = threading.Event()
    failed: list[Failed] = []
    clock = _Clock(waiting)
    with ThreadPoolExecutor(jobs) as pool:
        running: dict[Future[Failed | None], Cell] = {}
        try:
            for cell in waiting:
                if len(running) == jobs:
                    failed += _finish(running, clock=clock, say=say)
                running[pool.submit(_run_cell, cell, out=out, stop=stop, say=say)] = cell
            while running:
                failed += _finish(running, clock=clock, say=say)
        except BaseException:
            stop.set()
            raise
    return failed


def is_done(cell: Path) -> bool:
    have = read_json(cell / METRICS)
    return have is not None and have["job"]["state"] == "COMPLETED"


def read_grid(out: Path) -> list[dict[str, Any]] | None:
    """[{"name", "axes"}] of the cells that were ever wanted in `out`; None: no grid was run there."""
    have = read_json(out / GRID)
    return None if have is None else have["cells"]


def _record(cells: Sequence[Cell], *, out: Path) -> None:
    # Several machines may begin in the same folder at once.
    with (out / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        have = read_grid(out)
        if have is None and (out / METRICS).exists():
            raise Conflict(f"{out} holds a single experiment.", hint="Give another folder with --out.")
        known = {cell["name"]: cell for cell in have or []}
        for cell in cells:
            entry = {"name": cell.name, "axes": dict(cell.axes), "plan": _digest(cell.plan)}
            # A cell that is done would be taken for what is wanted now, and one page would show both.
            if known.get(cell.name, entry).get("plan", entry["plan"]) != entry["plan"]:
                raise Conflict(
                    f"{out} holds another experiment as {cell.name}: the recipe, lab.toml or an option has changed.",
                    hint="Give another folder with --out, or undo the change.",
                )
            known[cell.name] = entry
        write_json(out / GRID, {"schema_version": "1", "cells": list(known.values())})


def _digest(plan: Plan) -> str:
    return digest_of(json.dumps(plan.as_json(), sort_keys=True).encode())


def _run_cell(cell: Cell, *, out: Path, stop: threading.Event, say: Say) -> Failed | None:
    def check() -> None:
        if stop.is_set():
            raise Stopped

    place = out / CELLS / cell.name
    place.parent.mkdir(exist_ok=True)
    log = (out / CELLS / f"{cell.name}.{LOG}").open("a", buffering=1)
    with log:
        try:
            check()
            plan = _with_models(cell, out=out, say=say)
            job = run(plan, out=place, say=lambda line: print(line, file=log), check=check)["job"]
        except (SilotuneError, CommandFailed, OSError) as error:
            print(error, file=log)
            return Failed(cell.name, str(error).splitlines()[0])
    return None if job["state"] == "COMPLETED" else Failed(cell.name, job["sentence"])


def _with_models(cell: Cell, *, out: Path, say: Say) -> Plan:
    """The plan with models that lie somewhere: what is made serves all cells."""
    plan, models = cell.plan, out / MODELS

    def found(model: Any, name: str) -> Any:
        if model is None:
            return None
        path = directory_of(model, made=models / name, threads=plan.threads, say=say)
        return model.model_copy(update={"path": str(path), "hub": None, "revision": None, "make": None})

    experiment = plan.experiment
    teachers = {name: found(model, name) for name, model in experiment.teachers.items()}
    model = found(experiment.model, str(cell.axes.get("model", "model")))
    return replace(plan, experiment=experiment.model_copy(update={"model": model, "teachers": teachers}))


def _finish(running: dict[Future[Failed | None], Cell], *, clock: _Clock, say: Say) -> list[Failed]:
    """Waits until one of the cells has ended, and says so."""
    failed = []
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        cell, outcome = running.pop(future), future.result()
        words = f"failed: {outcome.sentence}" if outcome else "done"
        say(f"{cell.name}: {words} ({clock.ended(cell, done=outcome is None)})")
        if outcome:
            failed.append(outcome)
    return failed


class _Clock:
    """How long the rest will take, if a step takes as long as until now."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._began, self._done, self._count = time.monotonic(), 0.0, 0
        self._cells, self._work = len(cells), sum(map(_steps, cells))

    def ended(self, cell: Cell, *, done: bool) -> str:
        self._count += 1
        if done:
            self._done += _steps(cell)
        else:
            # What failed says nothing about how long the others take.
            self._work -= _steps(cell)
        rest = "the last one"
        if self._count < self._cells:
            left = (time.monotonic() - self._began) * (self._work / self._done - 1) if self._done else None
            rest = "nothing to judge the rest by yet" if left is None else f"{duration(left)} to go"
        return f"{self._count} of {self._cells}; {rest}"


# What starting a run and giving out a task take, in steps of a small model.
START_STEPS, TASK_STEPS = 500.0, 5.0


def _steps(cell: Cell) -> float:
    """About how many optimizer steps it trains in all: many sites share the same rows, so it is not their number."""
    spec, experiment = cell.plan.spec, cell.plan.experiment
    drawn = experiment.sites if spec.cohort.size == "all" else min(experiment.sites, spec.cohort.size)
    steps = float(spec.local.steps or 1)
    if spec.local.steps is None and experiment.data is not None and Path(experiment.data.rows).exists():
        rows = pyarrow.parquet.read_metadata(experiment.data.rows).num_rows
        rows = min(rows, experiment.data.limit or rows)
        steps = spec.local.epochs * math.ceil(rows / experiment.sites / spec.local.batch_size)
    return START_STEPS + spec.rounds * drawn * (TASK_STEPS + steps)


def each_in_turn(say: Callable[[str], None]) -> Say:
    """`say` for several threads."""
    turn = threading.Lock()

    def one(line: str) -> None:
        with turn:
            say(line)

    return one
