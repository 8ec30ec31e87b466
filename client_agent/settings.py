"""site.toml: what a site administrator writes. An unknown key fails; no [policy] means that nothing runs here."""

from __future__ import annotations

import ipaddress
import os
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from client_agent.hours import Hours
from protos.channel import KEEPALIVE_SECONDS, SHORTEST_KEEPALIVE_SECONDS
from protos.errors import SiteConfigInvalid

# Below it a frame of 1 MiB is under way for so long that the coordinator takes the transfer for dead.
LOWEST_MBIT = 0.5


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSet(_Part):
    """One table: of texts and labels, of instructions, or of questions with options. Paths start at site.toml."""

    path: str
    # Default: by the file's ending.
    format: Literal["csv", "jsonl", "parquet"] | None = None
    text: str = "text"
    # "": texts without labels, from which only a distillation can learn.
    label: str = "label"
    # Where this names a column, the table holds instructions: what is asked, what it is about (a table may lack a
    # column of this name, and has none where the column is that of `instruction`), and what to learn.
    instruction: str | None = None
    input: str = "input"
    output: str = "output"
    # Where this names a column, the table holds questions: `options` a list of texts, `answer` the right one's place in
    # it, from 0. A benchmark is asked where a data set has its name.
    question: str | None = None
    context: str = "context"
    options: str = "options"
    answer: str = "answer"
    encoding: str = "utf-8"
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","
    # This table's label values -> the recipe's labels; a value that is not listed stands for itself.
    labels: dict[str, str] = {}
    # What to do with a row whose label the recipe does not have.
    unknown_labels: Literal["fail", "skip"] = "fail"
    # The site's own validation rows: another file, or a share that is split off by a hash of each text or instruction.
    validation: str | Annotated[float, Field(ge=0, lt=1)] = 0.1
    # The house agent's held-out rows.
    test: str | None = None
    # A directory for what a classifier says of each held-out row; without it nothing of that is kept.
    predictions: str | None = None

    @model_validator(mode="after")
    def _one_kind_of_table(self) -> DataSet:
        of_labels = {name: getattr(self, name) for name in ("text", "label", "labels", "unknown_labels")}
        kinds = {name for name in ("instruction", "question") if getattr(self, name) is not None}
        kinds |= {name for name, value in of_labels.items() if value != type(self).model_fields[name].default}
        if len(kinds) > 1 and not kinds <= of_labels.keys():
            first, second, *_ = sorted(kinds)
            raise ValueError(f"{first} and {second} describe two tables; give the file two names")
        return self

    def at(self, directory: Path) -> DataSet:
        """The same data set with its paths made absolute, seen from the directory of site.toml."""
        paths: dict[str, object] = {"path": str(directory / self.path)}
        if isinstance(self.validation, str):
            paths["validation"] = str(directory / self.validation)
        for name in ("test", "predictions"):
            if (path := getattr(self, name)) is not None:
                paths[name] = str(directory / path)
        return self.model_copy(update=paths)


class Device(_Part):
    # "auto" takes the first GPU where there is one.
    name: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    # CPU threads of the trainer; 0: as many as there are cores.
    threads: Annotated[int, Field(ge=0)] = 0
    # So many trainers work on one model together, each on a GPU of its own from `name` on: for what does not fit one.
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    # The trainer gives its memory back after so long without a task.
    idle_seconds: Annotated[float, Field(gt=0)] = 600
    # When the agent is stopped, the trainer may take so long for its step and for saving. Whoever stops the agent must
    # grant some seconds more; the units in deploy/ grant 60.
    stop_seconds: Annotated[float, Field(gt=0, le=3600)] = 30


class Policy(_Part):
    """What a job may do here. Each list names what is allowed; "*" allows everything of its kind."""

    base_models: tuple[str, ...] = ()
    # Whether such a base model is fetched from the coordinator, where it has it and this site does not.
    fetch_base_models: bool = False
    data_sets: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("classification",)
    max_epochs: Annotated[float, Field(gt=0)] = 5
    # Refuse a job where this data set has fewer rows; a small cohort of patients is easy to recognise.
    min_rows: Annotated[int, Field(ge=0)] = 0
    # "ask": each new job spec waits until `silotune-agent approve`.
    approval: Literal["automatic", "ask"] = "automatic"


class Schedule(_Part):
    """When the trainer may use this machine; outside these hours its task waits. Transfers are not bound by it."""

    # Such as ["19:00-06:00", "Sat-Sun 00:00-24:00"], in the machine's local time; empty: always.
    hours: tuple[Hours, ...] = ()


class Http(_Part):
    # /metrics, /healthz and /readyz; loopback unless the administrator says otherwise.
    address: str = "127.0.0.1:9481"


def check_proxy(url: str) -> str:
    """`url` if it names an HTTP proxy. ValueError otherwise, which does not repeat what may hold a password."""
    try:
        parts = urlsplit(url)
        known = parts.scheme == "http" and parts.hostname and parts.port is not None and parts.path in ("", "/")
    except ValueError:
        known = False
    if url and not known:
        raise ValueError('the proxy must be written as "http://HOST:PORT" or "http://USER:PASSWORD@HOST:PORT"')
    return url


def _check_mbit(mbit: float) -> float:
    if mbit and mbit < LOWEST_MBIT:
        raise ValueError(f"the lowest rate that works is {LOWEST_MBIT:g} Mbit/s; 0 is without limit")
    return mbit


# Payload; 0 is without limit.
Mbit = Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_check_mbit)]


class NetworkWindow(_Part):
    """Other rates for some hours. What is not named here stays as it is at other times."""

    hours: Hours
    upload_mbit: Mbit | None = None
    download_mbit: Mbit | None = None


class Network(_Part):
    """The way to the coordinator, and how much of it the agent may use."""

    # An HTTP proxy that is asked to CONNECT; without it the environment's https_proxy. What the environment's no_proxy
    # names is dialled directly either way: gRPC insists on it.
    proxy: Annotated[str, AfterValidator(check_proxy)] = ""
    # A PEM file, relative to site.toml: CAs that may vouch for the coordinator besides the federation's own.
    ca_bundle: str = ""
    # An idle line is tried so often, and given up when there is no answer within 10 s.
    keepalive_seconds: Annotated[float, Field(ge=SHORTEST_KEEPALIVE_SECONDS, le=3600)] = KEEPALIVE_SECONDS
    upload_mbit: Mbit = 0
    download_mbit: Mbit = 0
    # When transfers may run, such as ["19:00-06:00"]; empty: always. Heartbeats and other short calls go on.
    hours: tuple[Hours, ...] = ()
    # The first that holds now counts.
    windows: tuple[NetworkWindow, ...] = ()


class SiteSettings(_Part):
    data: dict[str, DataSet] = {}
    network: Network = Network()
    device: Device = Device()
    policy: Policy | None = None
    schedule: Schedule = Schedule()
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
        unknown = first["type"] == "extra_forbidden"
        what = "there is no such key" if unknown else first["msg"].removeprefix("Value error, ")
        raise SiteConfigInvalid(f"{path}: {where}: {what}.") from None


def default_home() -> Path:
    return Path("~/.local/share/silotune-agent").expanduser()


def environment_proxy() -> str:
    """The proxy that the environment names, by the variables that gRPC reads; empty: none."""
    try:
        return check_proxy(_first_of("grpc_proxy", "https_proxy", "http_proxy"))
    except ValueError:
        return ""


def spares_proxy(host: str) -> bool:
    """Whether no_proxy says that `host` is dialled without a proxy."""
    entries = _first_of("no_grpc_proxy", "no_proxy").lower().split(",")
    return any(_is_meant(host.lower(), entry.strip()) for entry in entries if entry.strip())


def _first_of(*names: str) -> str:
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def _is_meant(host: str, entry: str) -> bool:
    if entry == "*" or host.endswith(entry):
        return True
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return False


def trainer_environment() -> dict[str, str]:
    """The environment of the trainer process: it takes nothing from any network, whatever a library would like."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Several trainers of one task talk to one another on this machine only.
        **({"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
        # Without it cuBLAS may answer differently from run to run.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONUNBUFFERED": "1",
    }
