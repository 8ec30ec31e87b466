"""From a folder with lab.toml and what was typed to the runs that are wanted: one, or the cells of a grid."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator import recipe
from deploy.lab import experiment
from deploy.lab.experiment import Experiment, Grid, LabData, LabFile, LabModel, Variant
from deploy.lab.run import Plan
from protos import jobspec
from protos.errors import InvalidInput

# What an axis is called in lab.toml and among the options, and in a cell. The first changes slowest, so that a grid
# that is stopped has whole seeds.
AXES = {
    "seeds": "seed", "data": "data", "models": "model", "partitions": "partition", "sites": "sites",
    "variants": "variant",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One run of a grid. `axes` are those that the grid has; a run that is no grid has none, and no name."""

    name: str
    axes: Mapping[str, Any]
    plan: Plan


@dataclass(frozen=True)
class Typed:
    """The options of `silotune lab run`. An axis that is empty is as lab.toml says."""

    recipe_name: str | None = None
    lab_file: str = experiment.FILE
    rounds: int | None = None
    changes: tuple[str, ...] = ()
    model: Path | None = None
    threads: int = 0
    axes: Mapping[str, Sequence[Any]] = field(default_factory=dict)


def cells(directory: Path, typed: Typed | None = None) -> list[Cell]:
    """InvalidInput and RecipeInvalid say what is wrong with lab.toml, the recipe or an option."""
    typed = typed or Typed()
    found = experiment.read(directory, file=typed.lab_file)
    if typed.recipe_name is not None:
        found = found.model_copy(update={"recipe": str((directory / typed.recipe_name).resolve())})
    if typed.model is not None:
        found = found.model_copy(update={"model": LabModel(path=str(typed.model.resolve()))})
    # First as it is written, because only then an error has a line.
    recipe.read(Path(found.recipe))
    fields = tomllib.loads(Path(found.recipe).read_text())
    wanted = _axes(found.grid, typed.axes)
    if typed.model is not None and "model" in wanted:
        raise InvalidInput("--model is for a run of one model; this grid names its models.", hint="Take --models.")
    is_grid = found.grid != Grid() or any(len(values) > 1 for values in wanted.values())
    made = []
    combined = [
        _own_sites(found, dict(zip(wanted, values, strict=True))) for values in itertools.product(*wanted.values())
    ]
    for axes in {tuple(axes.items()): axes for axes in combined}.values():
        plan = _plan(found, fields, axes, typed=typed)
        made.append(Cell(_name(axes), axes, plan) if is_grid else Cell("", {}, plan))
    return made


def _axes(grid: Grid, typed: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    unknown = {name: list(values) for name, values in typed.items() if values}
    chosen = experiment.checked({"grid": unknown}, name="The options").grid
    found = {one: getattr(chosen, many) or getattr(grid, many) for many, one in AXES.items()}
    return {one: values for one, values in found.items() if values}


def _own_sites(found: LabFile, axes: dict[str, Any]) -> dict[str, Any]:
    """The axes with the number of sites that the variant has for itself, whatever the grid's: it is one cell."""
    own = _named(found.variants, axes["variant"], of="variants").sites if "variant" in axes else None
    return {**axes, "sites": own} if own and "sites" in axes else axes


def _name(axes: Mapping[str, Any]) -> str:
    """A folder's name, in the order of a sentence: which model, on what, at how many sites, how, and the seed last."""
    order = ("model", "data", "partition", "sites", "variant", "seed")
    words = [f"{axis}-{axes[axis]}" if axis in ("sites", "seed") else str(axes[axis]) for axis in order if axis in axes]
    return ",".join(re.sub(r"[^A-Za-z0-9._-]+", "-", word) for word in words)


def _plan(found: LabFile, fields: dict[str, Any], axes: Mapping[str, Any], *, typed: Typed) -> Plan:
    update: dict[str, Any] = {}
    changes: dict[str, Any] = {}
    if "data" in axes:
        table = _named(found.tables, axes["data"], of="tables")
        update["data"] = LabData(**table.model_dump(exclude={"changes"}))
        changes |= table.changes
    if "model" in axes:
        model = _named(found.models, axes["model"], of="models")
        update["model"] = LabModel(**model.model_dump(exclude={"changes"}))
        changes |= model.changes
    if "partition" in axes:
        wanted = {"partition": _partition(axes["partition"])}
        update["partition"] = experiment.checked(wanted, name="--partitions").partition
    variant = _named(found.variants, axes["variant"], of="variants") if "variant" in axes else Variant()
    changes |= variant.changes
    if sites := variant.sites or axes.get("sites"):
        update["sites"] = sites
    if variant.attack:
        update["attack"] = variant.attack
    changes |= dict(experiment.assigned(change) for change in typed.changes)
    numbers = {"rounds": typed.rounds, "seed": axes.get("seed")}
    changes |= {name: value for name, value in numbers.items() if value is not None}
    for path, value in changes.items():
        fields = experiment.changed(fields, path, value)
    own = {name: update.get(name, getattr(found, name)) for name in Experiment.model_fields}
    spec = jobspec.parse(fields)
    if own["attack"] and spec.encoding.up != "raw":
        raise InvalidInput("[attack] changes updates that travel raw.", hint='up = "raw" under [encoding] does that.')
    data = own["data"]
    if spec.distillation and data and not (data.slice or data.slice_share):
        raise InvalidInput(
            "The recipe has a distillation, and the house agent no rows to learn from: its others judge what is kept.",
            hint="slice or slice_share under [data] in lab.toml gives it some.",
        )
    return Plan(Experiment(**own), spec, typed.threads)


def _named(entries: Mapping[str, Any], name: str, *, of: str) -> Any:
    if name not in entries:
        there = f"There are {', '.join(entries)}." if entries else "There are none."
        raise InvalidInput(f"lab.toml has no [{of}.{name}].", hint=there)
    return entries[name]


def _partition(text: str) -> dict[str, Any]:
    kind, *rest = text.split(":")
    by = [rest.pop(0)] if kind in ("dirichlet", "groups", "shards") and rest else []
    if len(rest) > 1:
        raise InvalidInput(f"{text!r} is not a partition.", hint="Such as dirichlet:qtype:0.5")
    number = "shards" if kind == "shards" else "alpha"
    return {"kind": kind, **({"by": by[0]} if by else {}), **({number: rest[0]} if rest else {})}
