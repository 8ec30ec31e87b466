"""site.toml: what a site administrator writes. An unknown key fails; no [policy] means that nothing runs here."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from protos.errors import SiteConfigInvalid


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSet(_Part):
    """One table of texts and labels. Paths are relative to site.toml."""

    path: str
    # Default: by the file's ending.
    format: Literal["csv", "jsonl", "parquet"] | None = None
    text: str = "text"
    label: str = "label"
    encoding: str = "utf-8"
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","
    # This table's label values -> the recipe's labels; a value that is not listed stands for itself.
    labels: dict[str, str] = {}
    # What to do with a row whose label the recipe does not have.
    unknown_labels: Literal["fail", "skip"] = "fail"
    # The site's own validation rows: another file, or a share that is split off by a hash of each text.
    validation: str | Annotated[float, Field(ge=0, lt=1)] = 0.1
    # The house agent's held-out rows.
    test: str | None = None

    def at(self, directory: Path) -> DataSet:
        """The same data set with its paths made absolute, seen from the directory of site.toml."""
        paths: dict[str, object] = {"path": str(directory / self.path)}
        if isinstance(self.validation, str):
            paths["validation"] = str(directory / self.validation)
        if self.test is not None:
            paths["test"] = str(directory / self.test)
        return self.model_copy(update=paths)


class Device(_Part):
    # "auto" takes the first GPU where there is one.
    name: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    # CPU threads of the trainer; 0: as many as there are cores.
    threads: Annotated[int, Field(ge=0)] = 0
    # The trainer gives its memory back after so long without a task.
    idle_seconds: Annotated[float, Field(gt=0)] = 600


class Policy(_Part):
    """What a job may do here. Each list names what is allowed; "*" allows everything of its kind."""

    base_models: tuple[str, ...] = ()
    data_sets: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("classification",)
    max_epochs: Annotated[float, Field(gt=0)] = 5
    # Refuse a job where this data set has fewer rows; a small cohort of patients is easy to recognise.
    min_rows: Annotated[int, Field(ge=0)] = 0
    # "ask": each new job spec waits until `silotune-agent approve`.
    approval: Literal["automatic", "ask"] = "automatic"


class Http(_Part):
    # /metrics, /healthz and /readyz; loopback unless the administrator says otherwise.
    address: str = "127.0.0.1:9481"


class SiteSettings(_Part):
    data: dict[str, DataSet] = {}
    device: Device = Device()
    policy: Policy | None = None
    http: Http = Http()


def load(path: Path) -> SiteSettings:
    """SiteConfigInvalid in one sentence when the file is missing, is not TOML, or has a wrong or unknown key."""
    try:
        fields = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise SiteConfigInvalid(
            f"{path} does not exist.", hint="`silotune-agent enroll` writes a first one to fill in."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SiteConfigInvalid(f"{path} is not valid TOML: {error}.") from error
    try:
        return SiteSettings.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise SiteConfigInvalid(f"{path}: {where}: {first['msg']}.") from None


def default_home() -> Path:
    return Path("~/.local/share/silotune-agent").expanduser()


def trainer_environment() -> dict[str, str]:
    """The environment of the trainer process: it takes nothing from any network, whatever a library would like."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Without it cuBLAS may answer differently from run to run.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONUNBUFFERED": "1",
    }
