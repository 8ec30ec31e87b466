"""The base models of this site: found by name, known by digest.

Only `silotune-agent model add` ever downloads anything, and only safetensors and text files: a file that could hold
code (.bin, .pt, .py) is neither fetched nor counted.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from client_agent.hashing import hash_file
from client_agent.taskdir import write_json
from protos import tensors
from protos.digests import base_model_digest
from protos.errors import AlreadyExists, InvalidInput, NotFound, SilotuneError, Unavailable
from protos.model_files import BASE_COMPANIONS, BASE_INDEX, BASE_MODEL_NAME, BASE_WEIGHTS

HUB_PATTERNS = [BASE_WEIGHTS, "*.json", "*.txt", "*.model", "*.jinja"]
# Matrices of these names, and those with "embed" in their path, are looked up in, not multiplied with.
LOOKED_UP = {"wte", "wpe", "shared", "relative_attention_bias"}

# Called with a file's name, once for each that is read.
OnFile = Callable[[str], None]


@dataclass(frozen=True)
class LinearLayers:
    """`count` layers with weights [out_features, in_features] whose path is `name`, a * standing for each number."""

    name: str
    out_features: int
    in_features: int
    count: int


@dataclass(frozen=True)
class BaseModel:
    """`files` are (name, size, modification time in ns): when one differs, the digest is taken anew."""

    name: str
    directory: str
    digest: str
    parameters: int
    size_bytes: int
    hidden_size: int
    layers: int
    files: tuple[tuple[str, int, int], ...]
    linear: tuple[LinearLayers, ...]
    vocabulary: int
    # Where the files came from, as far as the administrator said: a hub repository and its commit.
    hub: str = ""
    revision: str = ""


def check_model_name(name: str) -> str:
    """`name` if it may name a base model. InvalidInput otherwise."""
    if not BASE_MODEL_NAME.fullmatch(name):
        raise InvalidInput(f"{name[:80]!r} is not a model name.", hint="For example minilm or org/model-name.")
    return name


class Models:
    """The registry, `models.json`: name -> BaseModel. Each change is on disk when the call returns."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def all(self) -> list[BaseModel]:
        if not self._file.exists():
            return []
        entries = json.loads(self._file.read_text())
        models = {name: _from_entry(entry) for name, entry in entries.items()}
        if any("linear" not in entry for entry in entries.values()):
            self._write(models)
        return list(models.values())

    def add(
        self, name: str, directory: Path, *, hub: str = "", revision: str = "", digest: str = "",
        on_file: OnFile = lambda name: None,
    ) -> BaseModel:  # fmt: skip
        """Registers the model in `directory`. Repeating it with the same content changes only where it is from.

        InvalidInput: not a usable model directory, or not the one of this `digest`. AlreadyExists: the name stands for
        other content.
        """
        found = inspect_directory(check_model_name(name), directory, on_file=on_file)
        if digest not in ("", found.digest):
            raise InvalidInput(
                f"The files of base model {name!r} are not those that were fetched.",
                hint="This site's disk may be failing.",
            )
        model = replace(found, hub=hub, revision=revision)
        known = {entry.name: entry for entry in self.all()}
        if name in known and known[name].digest != model.digest:
            raise AlreadyExists(
                f"The name {name} stands for a base model with another digest here.",
                hint="Choose another name: jobs and the policy may rely on this one.",
            )
        self._write({**known, name: model})
        return model

    def current(self, name: str) -> BaseModel:
        """The model of this name, with the digest of what lies on the disk now. NotFound, InvalidInput: not usable."""
        known = {entry.name: entry for entry in self.all()}
        if name not in known:
            raise NotFound(
                f"This site holds no base model named {name!r}.",
                hint=f"The administrator adds it with `silotune-agent model add {name} --path DIR` (or --hub ID).",
            )
        model = known[name]
        directory = Path(model.directory)
        if not directory.is_dir():
            raise InvalidInput(f"The directory of base model {name!r} is gone.", hint="Add the model again.")
        if _stamps(directory) != model.files:
            found = inspect_directory(name, directory)
            same = found.digest == model.digest
            model = replace(found, hub=model.hub, revision=model.revision) if same else found
            self._write({**known, name: model})
        return model

    def _write(self, models: dict[str, BaseModel]) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._file, {name: asdict(model) for name, model in models.items()})


def _from_entry(entry: dict[str, Any]) -> BaseModel:
    files = tuple((name, size, changed) for name, size, changed in entry["files"])
    if "linear" in entry:
        linear, vocabulary = tuple(LinearLayers(**layers) for layers in entry["linear"]), entry["vocabulary"]
    else:
        # Written by release 0.1. Only headers are read, so that this takes no time however many weights there are.
        directory = Path(entry["directory"])
        usable = directory.is_dir() and _stamps(directory) == files
        shapes = _shapes(directory) if usable else {}
        linear, vocabulary = _linear(shapes), _number(_config(directory), "vocab_size") if usable else 0
    return BaseModel(**{**entry, "files": files, "linear": linear, "vocabulary": vocabulary})


def inspect_directory(name: str, directory: Path, *, on_file: OnFile = lambda name: None) -> BaseModel:
    """Reads a model directory whole. InvalidInput, in a sentence, when jobs could not use it."""
    directory = directory.resolve()
    if not directory.is_dir():
        raise InvalidInput(f"{directory} is not a directory.")
    stamps = _stamps(directory)
    names = [stamp[0] for stamp in stamps]
    if not any(entry.endswith(".safetensors") for entry in names):
        raise InvalidInput(
            f"{directory} holds no .safetensors weights.",
            hint="Only safetensors files are loaded, because other formats may run code; convert the model first.",
        )
    if "config.json" not in names:
        raise InvalidInput(f"{directory} holds no config.json, so it is not a transformers model.")
    config, shapes = _config(directory), _shapes(directory)
    if BASE_INDEX in names:
        _check_whole(directory, shapes)
    digests = []
    for entry in names:
        on_file(entry)
        path = directory / entry
        digests.append((entry, path.stat().st_size, hash_file(path).hexdigest()))
    return BaseModel(
        name=name,
        directory=str(directory),
        digest=base_model_digest(digests),
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        size_bytes=sum(size for _, size, _ in digests),
        hidden_size=_number(config, "hidden_size", "d_model", "dim", "n_embd"),
        layers=_number(config, "num_hidden_layers", "num_layers", "n_layers", "n_layer"),
        files=stamps,
        linear=_linear(shapes),
        vocabulary=_number(config, "vocab_size"),
    )


def check_hub_name(repository: str) -> str:
    """`repository` if the hub may have one of that name. InvalidInput otherwise."""
    # Imported here: it is slow, and the daemon never needs it.
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise InvalidInput(
            f"{repository[:80]!r} is not the id of a hub repository.", hint="For example org/model-name."
        ) from None
    return repository


def fetch_from_hub(repository: str, *, revision: str | None, cache: Path) -> Path:
    """Downloads a model's safetensors and text files into `cache`, and says where they lie: a folder that is named
    after the commit. Where the hub does not answer, `cache` or else Hugging Face's own cache may hold the revision.

    Unavailable: the hub cannot be reached or does not give the model out, and neither cache has it. InvalidInput: no
    repository can have that name.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    check_hub_name(repository)
    wanted: dict[str, Any] = {"revision": revision, "allow_patterns": HUB_PATTERNS}
    try:
        return Path(snapshot_download(repository, cache_dir=cache, **wanted))
    except (HfHubHTTPError, OSError) as error:
        try:
            return Path(snapshot_download(repository, local_files_only=True, **wanted))
        except LocalEntryNotFoundError:
            raise Unavailable(
                f"{repository} could not be downloaded: {type(error).__name__}.",
                hint="Check the id, the revision and the network; or copy the model here and use --path.",
            ) from error


def _stamps(directory: Path) -> tuple[tuple[str, int, int], ...]:
    """(relative path, size, modification time) of the files that make the model, sorted."""
    paths = list(directory.glob(BASE_WEIGHTS))
    paths += [directory / name for name in BASE_COMPANIONS if (directory / name).is_file()]
    stats = [(path.relative_to(directory).as_posix(), os.stat(path)) for path in sorted(paths)]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _config(directory: Path) -> dict[str, object]:
    try:
        config = json.loads((directory / "config.json").read_text())
    except ValueError as error:
        raise InvalidInput(f"{directory / 'config.json'} is not JSON: {error}.") from error
    return config if isinstance(config, dict) else {}


def _shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors, from the headers alone; checkpoints hold more kinds of tensors than travel."""
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(directory.glob(BASE_WEIGHTS)):
        with path.open("rb") as file:
            first = file.read(8)
            try:
                header = json.loads(file.read(tensors.header_length(first) - 8))
                found |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
            except (SilotuneError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise InvalidInput(f"{path.name} is not a safetensors file.") from error
    return found


def _check_whole(directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """InvalidInput when the index names weights that are not here, as after a download that was interrupted."""
    try:
        named = json.loads((directory / BASE_INDEX).read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{directory / BASE_INDEX} is no index of weights.") from error
    missing = sorted({str(named[tensor]) for tensor in named.keys() - shapes.keys()})
    if missing:
        raise InvalidInput(f"{directory} lacks {missing[0]}, or it is incomplete.", hint="Download or copy it again.")


def _linear(shapes: Mapping[str, tuple[int, ...]]) -> tuple[LinearLayers, ...]:
    """The matrices that adapters may stand beside, the same ones of all layers together."""
    counts: Counter[tuple[str, int, int]] = Counter()
    for name, shape in shapes.items():
        path = name.removesuffix(".weight")
        looked_up = "embed" in path or path.rpartition(".")[2] in LOOKED_UP
        if path != name and len(shape) == 2 and not looked_up:
            counts[re.sub(r"(?<![^.])\d+(?![^.])", "*", path), *shape] += 1
    return tuple(LinearLayers(*key, count) for key, count in sorted(counts.items()))


def _number(config: dict[str, object], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int):
            return value
    return 0
