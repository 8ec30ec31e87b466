"""coordinator.toml: what an operator writes about one coordinator. An unknown key fails.

Every key has a default except the address that goes into join tokens; `init` writes the file with a comment a key.
Relative paths are relative to the data directory, so that the directory can be moved and backed up as a whole.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from protos.errors import InvalidInput

FILE_NAME = "coordinator.toml"

_ADDRESS = r"(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9.\-]+):\d{1,5}"
Address = Annotated[str, Field(pattern=f"^{_ADDRESS}$")]
# "a:9444,b:9444": replicas of one coordinator.
Addresses = Annotated[str, Field(pattern=f"^{_ADDRESS}(,{_ADDRESS})*$")]

BlobPlace = Annotated[str, Field(pattern=r"^(s3://[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9](/[A-Za-z0-9_.\-]+)*|[^:]+)$")]


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

    # Goes into join tokens; of replicas, with commas between.
    enrollment_address: Addresses


class Storage(_Part):
    database: str = "sqlite:///coordinator.db"
    # A directory, or s3://bucket/prefix.
    blobs: BlobPlace = "blobs"
    # Of an S3 server that is not Amazon's. Credentials come from where every AWS tool takes them.
    s3_endpoint_url: Annotated[str, Field(pattern=r"^(https?://[^\s/@]+/?)?$")] = ""
    s3_region: Annotated[str, Field(pattern=r"^[a-z0-9\-]*$")] = ""
    # Copies of S3's blobs on this disk; what is in use may exceed it.
    cache_bytes: Annotated[int, Field(ge=0)] = 16 << 30
    # Nothing is uploaded, and the coordinator is not ready, with less than this free.
    reserve_bytes: Annotated[int, Field(ge=0)] = 1 << 30
    # The largest single blob that a site may upload.
    max_blob_bytes: Annotated[int, Field(gt=0)] = 64 << 30
    # How many of a job's newest versions are kept, besides the best one and those in use; 0: all.
    keep_versions: Annotated[int, Field(ge=0)] = 0


class Certificates(_Part):
    # Sites and house agents; they renew by themselves when a third is left.
    client_days: Annotated[float, Field(gt=0, le=397)] = 30
    operator_days: Annotated[float, Field(gt=0, le=3650)] = 365
    # Renewed at a start of the coordinator when a third is left.
    server_days: Annotated[float, Field(gt=0, le=3650)] = 397
    # A certificate of the operator's own for both listeners, and its key: PEM files. Agents then name its CA as their
    # ca_bundle. Read when the coordinator starts.
    server_certificate: str = ""
    server_key: str = ""
    # Names and addresses that agents may dial.
    hosts: Annotated[tuple[str, ...], Field(min_length=1)] = ("localhost", "127.0.0.1")

    @model_validator(mode="after")
    def _come_together(self) -> Certificates:
        if bool(self.server_certificate) != bool(self.server_key):
            raise ValueError("server_certificate and server_key go together; one of them is missing")
        return self


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


def bucket_and_prefix(settings: Settings) -> tuple[str, str] | None:
    """Where the blobs are in S3; None when they are files."""
    scheme, _, location = settings.storage.blobs.partition("s3://")
    bucket, _, prefix = location.partition("/")
    return (bucket, prefix) if not scheme and location else None


def blob_directory(settings: Settings, directory: Path) -> Path:
    """Where blobs lie on this disk: all of them, or copies of S3's and what is on its way there."""
    return directory / ("cache" if bucket_and_prefix(settings) else settings.storage.blobs)


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
blobs = "{storage.blobs}"                  # a directory, or "s3://bucket/prefix"
s3_endpoint_url = ""             # of an S3 server that is not Amazon's; credentials as for every AWS tool:
s3_region = ""                   # environment, ~/.aws, or the role of the machine
cache_bytes = {storage.cache_bytes}        # with S3: copies of blobs on this disk, below cache/
reserve_bytes = {storage.reserve_bytes}         # uploads are refused with less than this free
max_blob_bytes = {storage.max_blob_bytes}       # the largest single upload
keep_versions = {storage.keep_versions}                # the newest of each job, besides the best; 0: all

[certificates]
client_days = {certificates.client_days:g}                 # sites; renewed by the agents themselves
operator_days = {certificates.operator_days:g}              # see `silotune-coordinator operator`
server_days = {certificates.server_days:g}                # renewed when the coordinator starts
server_certificate = ""          # PEM files of a certificate of your own, where an ingress wants one;
server_key = ""                  # agents then name its CA as ca_bundle
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
