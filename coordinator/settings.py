"""coordinator.toml: what an operator writes about one coordinator. An unknown key fails.

Every key has a default except the address that goes into join tokens; `init` writes the file with a comment a key.
Relative paths are relative to the data directory, so that the directory can be moved and backed up as a whole.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from protos.errors import InvalidInput

FILE_NAME = "coordinator.toml"

Address = Annotated[str, Field(pattern=r"^(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9.\-]+):\d{1,5}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Listen(_Part):
    """Where the three listeners bind."""

    address: Address = "0.0.0.0:9443"
    enrollment_address: Address = "0.0.0.0:9444"
    # /metrics, /healthz and /readyz have no login; loopback unless the operator says otherwise.
    http_address: Address = "127.0.0.1:9480"


class Public(_Part):
    """What agents dial, as it is known outside."""

    # Goes into join tokens.
    enrollment_address: Address


class Storage(_Part):
    database: str = "sqlite:///coordinator.db"
    blobs: str = "blobs"
    # Nothing is uploaded, and the coordinator is not ready, with less than this free.
    reserve_bytes: Annotated[int, Field(ge=0)] = 1 << 30
    # The largest single blob that a site may upload.
    max_blob_bytes: Annotated[int, Field(gt=0)] = 64 << 30


class Certificates(_Part):
    # Sites and house agents; they renew by themselves when a third is left.
    client_days: Annotated[float, Field(gt=0, le=397)] = 30
    operator_days: Annotated[float, Field(gt=0, le=3650)] = 365
    # Renewed at a start of the coordinator when a third is left.
    server_days: Annotated[float, Field(gt=0, le=3650)] = 397
    # Names and addresses that agents may dial.
    hosts: Annotated[tuple[str, ...], Field(min_length=1)] = ("localhost", "127.0.0.1")


class Transfers(_Part):
    # Streams served at once; further ones wait for their turn.
    max_transfers: Annotated[int, Field(ge=1, le=1024)] = 8
    # Frames of served models that are kept ready for the next reader.
    frame_cache_bytes: Annotated[int, Field(ge=0)] = 32 << 20


class Tasks(_Part):
    lease_seconds: Annotated[float, Field(gt=0, le=3600)] = 30


class Log(_Part):
    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Settings(_Part):
    listen: Listen = Listen()
    public: Public
    storage: Storage = Storage()
    certificates: Certificates = Certificates()
    transfers: Transfers = Transfers()
    tasks: Tasks = Tasks()
    log: Log = Log()
    # Lets tools such as grpcurl list the methods; a certificate is needed all the same.
    reflection: bool = False


def load(directory: Path) -> Settings:
    """The settings of the data directory. InvalidInput in one sentence: missing, not TOML, a wrong or unknown key."""
    path = directory / FILE_NAME
    try:
        fields = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise InvalidInput(
            f"{path} does not exist.", hint="`silotune-coordinator init` makes a data directory; --data names it."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} is not valid TOML: {error}.") from error
    try:
        return Settings.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = "is not a known key" if first["type"] == "extra_forbidden" else first["msg"]
        raise InvalidInput(f"{path}: {where}: {reason}.") from None


def database_url(settings: Settings, directory: Path) -> str:
    """The SQLAlchemy URL, with a relative SQLite path made absolute."""
    prefix = "sqlite:///"
    url = settings.storage.database
    if url.startswith(prefix) and not url.startswith(prefix + "/"):
        return f"{prefix}{directory.resolve() / url.removeprefix(prefix)}"
    return url


def blob_directory(settings: Settings, directory: Path) -> Path:
    return directory / settings.storage.blobs


def default_directory() -> Path:
    """The data directory when --data is not given, as the XDG base directory specification has it."""
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser() / "silotune-coordinator"


def profile_directory(profile: str) -> Path:
    """Where an operator profile lies: a path as it stands, a plain name below the user's configuration."""
    if "/" in profile:
        return Path(profile).expanduser()
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "silotune" / profile


def new_file(*, listen: Listen, public: Public, hosts: tuple[str, ...]) -> str:
    """The text of a fresh coordinator.toml, with every key and what it means."""
    names = ", ".join(f'"{host}"' for host in hosts)
    storage, certificates, transfers = Storage(), Certificates(), Transfers()
    return f"""\
# Settings of one silotune coordinator. Relative paths are relative to this file's directory.
# Sizes are in bytes, times in seconds. An unknown key is an error.

[listen]
address = "{listen.address}"              # agents and operators; mutual TLS
enrollment_address = "{listen.enrollment_address}"   # first contact of a new site, by join token; server TLS
http_address = "{listen.http_address}"       # /metrics, /healthz, /readyz; no login, so keep it inside

[public]
# Where new sites reach the enrollment listener from outside; it goes into join tokens.
enrollment_address = "{public.enrollment_address}"

[storage]
database = "{storage.database}"
blobs = "{storage.blobs}"
reserve_bytes = {storage.reserve_bytes}         # uploads are refused with less than this free
max_blob_bytes = {storage.max_blob_bytes}       # the largest single upload

[certificates]
client_days = {certificates.client_days:g}                 # sites; renewed by the agents themselves
operator_days = {certificates.operator_days:g}              # see `silotune-coordinator operator`
server_days = {certificates.server_days:g}                # renewed when the coordinator starts
hosts = [{names}]   # names and addresses that agents may dial

[transfers]
max_transfers = {transfers.max_transfers}                # streams at once; further ones wait
frame_cache_bytes = {transfers.frame_cache_bytes}     # frames of served models kept ready

[tasks]
lease_seconds = {Tasks().lease_seconds:g}               # an agent that is silent for so long loses its task

[log]
format = "text"                  # or "json"
level = "info"                   # or "debug", "warning", "error"
"""
