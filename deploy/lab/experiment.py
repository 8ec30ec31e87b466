"""lab.toml: what an experiment needs besides its recipe. Which table is shared out, how, and on which base model.

recipe = "twin.toml"              # beside this file

[data]                            # paths are relative to this file
rows = "../../data/.../train.parquet"
validation = "..."                # the house agent's
test = "..."
columns = { text = "text", label = "label" }     # keys of [data] in site.toml

[model]                           # a directory, or a small Llama made of the shipped text
make = { pretrain_steps = 300 }

[partition]
kind = "dirichlet"
by = "qtype"
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from deploy.lab.partition import Partition
from protos.errors import InvalidInput
from protos.recipe_part import Part

FILE = "lab.toml"


class LabData(Part):
    rows: str
    validation: str
    test: str | None = None
    # More keys of the data set in every site.toml: which column is what.
    columns: dict[str, str] = Field(default_factory=dict)
    # Question sets that the house agent holds: {name: file}.
    benchmarks: dict[str, str] = Field(default_factory=dict)


class SmallLlama(Part):
    """See client_agent/training/small_llama.py."""

    hidden: Annotated[int, Field(ge=8)] = 128
    layers: Annotated[int, Field(ge=1)] = 2
    vocabulary: Annotated[int, Field(ge=300)] = 4096
    rows: Annotated[int, Field(ge=1)] | None = None
    pretrain_steps: Annotated[int, Field(ge=0)] = 0
    seed: int = 0


class LabModel(Part):
    path: str | None = None
    make: SmallLlama | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> LabModel:
        if (self.path is None) == (self.make is None):
            raise ValueError("give either path or make")
        return self


class Experiment(Part):
    """`data` and `model` are missing where the recipe's task needs none."""

    recipe: str = "recipe.toml"
    data: LabData | None = None
    model: LabModel | None = None
    partition: Partition = Partition()
    sites: Annotated[int, Field(ge=1, le=1000)] = 4

    def at(self, directory: Path) -> Experiment:
        """The same with its paths made absolute, seen from the directory of lab.toml."""

        def absolute(path: str | None) -> str | None:
            return None if path is None else str((directory / path).resolve())

        update: dict[str, Any] = {"recipe": absolute(self.recipe)}
        if self.data:
            files = {name: absolute(getattr(self.data, name)) for name in ("rows", "validation", "test")}
            benchmarks = {name: absolute(path) for name, path in self.data.benchmarks.items()}
            update["data"] = self.data.model_copy(update={**files, "benchmarks": benchmarks})
        if self.model:
            update["model"] = self.model.model_copy(update={"path": absolute(self.model.path)})
        return self.model_copy(update=update)


def read(directory: Path) -> Experiment:
    """InvalidInput in one sentence when lab.toml is missing, is not TOML, or has a wrong or unknown key."""
    path = directory / FILE
    try:
        fields = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise InvalidInput(
            f"{path} does not exist.", hint="See deploy/recipes for folders that the lab can run."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{path} is not valid TOML: {error}.") from None
    return checked(fields, name=str(path)).at(directory)


def checked(fields: Mapping[str, Any], *, name: str) -> Experiment:
    """InvalidInput in one sentence that begins with `name`."""
    try:
        return Experiment.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidInput(f"{name}: {where}: {first['msg']}.") from None


def changed(fields: dict[str, Any], assignment: str) -> dict[str, Any]:
    """`fields` of a recipe with one key set: `local.data_order="same"`, with the value as TOML writes it.

    A word that is no TOML value is taken as text.
    """
    path, found, text = assignment.partition("=")
    *tables, key = path.strip().split(".")
    if not found or not key:
        raise InvalidInput(f"{assignment!r} is not KEY=VALUE.", hint="Such as --set local.learning_rate=1e-4")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    outer = dict(fields)
    table = outer
    for name in tables:
        table[name] = dict(table.get(name) or {})
        table = table[name]
    table[key] = value
    return outer
