"""From a folder with lab.toml and what was typed to the plan of a run."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from coordinator import recipe
from deploy.lab import experiment
from deploy.lab.experiment import LabModel, changed
from deploy.lab.run import Plan
from protos import jobspec
from protos.errors import InvalidInput


def planned(
    directory: Path, *, recipe_name: str | None = None, sites: int | None = None, rounds: int | None = None,
    seed: int | None = None, partition: str | None = None, changes: tuple[str, ...] = (), model: Path | None = None,
    threads: int = 0,
) -> Plan:  # fmt: skip
    """InvalidInput and RecipeInvalid say what is wrong with lab.toml, the recipe or an option."""
    found = experiment.read(directory)
    if recipe_name is not None:
        found = found.model_copy(update={"recipe": str((directory / recipe_name).resolve())})
    if sites is not None:
        found = found.model_copy(update={"sites": sites})
    if model is not None:
        found = found.model_copy(update={"model": LabModel(path=str(model.resolve()))})
    if partition is not None:
        wanted = experiment.checked({"partition": _partition(partition)}, name="--partition").partition
        found = found.model_copy(update={"partition": wanted})
    # First as it is written, because only then an error has a line.
    recipe.read(Path(found.recipe))
    fields = tomllib.loads(Path(found.recipe).read_text())
    for change in changes:
        fields = changed(fields, change)
    fields |= {name: value for name, value in (("rounds", rounds), ("seed", seed)) if value is not None}
    return Plan(found, jobspec.parse(fields), threads)


def _partition(text: str) -> dict[str, Any]:
    kind, *rest = text.split(":")
    by = [rest.pop(0)] if kind in ("dirichlet", "groups") and rest else []
    if len(rest) > 1:
        raise InvalidInput(f"{text!r} is not a partition.", hint="Such as dirichlet:qtype:0.5")
    return {"kind": kind, **({"by": by[0]} if by else {}), **({"alpha": rest[0]} if rest else {})}
