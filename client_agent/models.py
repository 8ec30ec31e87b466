"""The base models of this site: found by name, known by digest.

Only `silotune-agent model add` ever downloads anything, and only safetensors and text files: a file that could hold
code (.bin, .pt, .py) is neither fetched nor counted.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from client_agent.hashing import hash_file
from client_agent.taskdir import write_json
from protos import tensors
from protos.digests import base_model_digest
from protos.errors import AlreadyExists, InvalidInput, NotFound, SilotuneError, Unavailable

WEIGHTS = "*.safetensors"
# What stands for the model besides its weights. Read by transformers; a change of any of them changes the model.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
)
HUB_PATTERNS = [WEIGHTS, "*.json", "*.txt", "*.model", "*.jinja"]
_NAME = re.compile(r"(?=.{1,128}$)[A-Za-z0-9][A-Za-z0-9._\-]*(/[A-Za-z0-9][A-Za-z0-9._\-]*)*")

# Called with a file's name, once for each that is read.
OnFile = Callable[[str], None]


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


def check_model_name(name: str) -> str:
    """`name` if it may name a base model. InvalidInput otherwise."""
    if not _NAME.fullmatch(name):
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
        return [BaseModel(**{**entry, "files": tuple(map(tuple, entry["files"]))}) for entry in entries.values()]

    def add(self, name: str, directory: Path, *, on_file: OnFile = lambda name: None) -> BaseModel:
        """Registers the model in `directory`. Repeating it with the same content changes nothing.

        InvalidInput: not a usable model directory. AlreadyExists: the name stands for other content.
        """
        model = inspect_directory(check_model_name(name), directory, on_file=on_file)
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
            model = inspect_directory(name, directory)
            self._write({**known, name: model})
        return model

    def _write(self, models: dict[str, BaseModel]) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._file, {name: asdict(model) for name, model in models.items()})


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
    digests = []
    parameters = 0
    for entry in names:
        on_file(entry)
        path = directory / entry
        digests.append((entry, path.stat().st_size, hash_file(path).hexdigest()))
        if entry.endswith(".safetensors"):
            parameters += _count_parameters(path)
    try:
        config = json.loads((directory / "config.json").read_text())
    except ValueError as error:
        raise InvalidInput(f"{directory / 'config.json'} is not JSON: {error}.") from error
    return BaseModel(
        name=name,
        directory=str(directory),
        digest=base_model_digest(digests),
        parameters=parameters,
        size_bytes=sum(size for _, size, _ in digests),
        hidden_size=_number(config, "hidden_size", "d_model", "dim", "n_embd"),
        layers=_number(config, "num_hidden_layers", "num_layers", "n_layers", "n_layer"),
        files=stamps,
    )


def fetch_from_hub(repository: str, *, revision: str | None, into: Path) -> Path:
    """Downloads a model's safetensors and text files into `into`, and says where they lie.

    Unavailable: the hub cannot be reached or does not give the model out.
    """
    # Imported here: it is slow, and the daemon never needs it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(repository, revision=revision, local_dir=into, allow_patterns=HUB_PATTERNS)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise Unavailable(
            f"{repository} could not be downloaded: {type(error).__name__}.",
            hint="Check the id, the revision and the network; or copy the model here and use --path.",
        ) from error
    return Path(found)


def _stamps(directory: Path) -> tuple[tuple[str, int, int], ...]:
    """(relative path, size, modification time) of the files that make the model, sorted."""
    paths = list(directory.glob(WEIGHTS))
    paths += [directory / name for name in COMPANIONS if (directory / name).is_file()]
    stats = [(path.relative_to(directory).as_posix(), os.stat(path)) for path in sorted(paths)]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _count_parameters(path: Path) -> int:
    """Elements of all tensors, from the header alone; checkpoints hold more kinds of tensors than travel."""
    with path.open("rb") as file:
        first = file.read(8)
        try:
            header = json.loads(file.read(tensors.header_length(first) - 8))
            return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
        except (SilotuneError, ValueError, KeyError, TypeError) as error:
            raise InvalidInput(f"{path.name} is not a safetensors file.") from error


def _number(config: dict[str, object], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int):
            return value
    return 0
