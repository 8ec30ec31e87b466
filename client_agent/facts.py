"""What the agent says of its machine and its holdings with each request for work; found without torch."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import structlog

from client_agent.home import Home
from client_agent.models import Models
from client_agent.settings import Device, SiteSettings
from client_agent.taskdir import read_json, write_json
from client_agent.training.data import fingerprint, read, without_content
from protos.digests import digest_of
from protos.errors import SilotuneError
from protos.v1 import agent_pb2

NVIDIA_SMI_SECONDS = 10

log = structlog.get_logger()


def agent_version() -> str:
    try:
        return version("silotune")
    except PackageNotFoundError:
        return "0+unpackaged"


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_bytes: int


@functools.cache
def gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs that the driver knows, in its order; asked once, because the answer takes a second."""
    if not Path("/dev/nvidia0").exists():
        return ()
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=NVIDIA_SMI_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return (Gpu("NVIDIA GPU", 0),)  # The device file is there; the tool need not be.
    return parse_gpus(found.stdout)


def parse_gpus(table: str) -> tuple[Gpu, ...]:
    """From nvidia-smi's lines of a name and MiB; memory that it cannot tell is 0."""
    rows = [line.rpartition(",") for line in table.splitlines() if line.strip()]
    return tuple(Gpu(name.strip(), int(mib) << 20 if mib.strip().isdecimal() else 0) for name, _, mib in rows)


def gpu_name() -> str:
    """The first NVIDIA GPU's name; empty when there is none that the driver knows."""
    return gpus()[0].name if gpus() else ""


def choose_device(device: Device, *, gpu: str) -> str:
    """ "cpu" or "cuda:N", as the trainer understands it."""
    if device.name == "auto":
        return "cuda:0" if gpu else "cpu"
    return "cuda:0" if device.name == "cuda" else device.name


def count_rows(home: Home, settings: SiteSettings, *, before: Mapping[str, int] | None = None) -> dict[str, int]:
    """Training rows of each data set; 0 where it cannot be read. Counted anew only when a file has changed.

    `before` is the last answer: a data set that could not be read then either is not logged again.
    """
    noted = read_json(home.row_counts_file) or {}
    kept: dict[str, int] = {}
    counts = {}
    for name, data_set in settings.data.items():
        place = data_set.at(home.site_file.parent)
        try:
            # The stamp holds the path, so only its digest is kept.
            stamp = digest_of(repr(fingerprint(place, name=name, split="train")).encode())
            kept[stamp] = noted.get(stamp) or len(read(place, name=name, split="train"))
        except SilotuneError as error:
            if not before or before.get(name) != 0:
                log.warning("A data set cannot be used.", data_set=name, reason=without_content(error))
            counts[name] = 0
        else:
            counts[name] = kept[stamp]
    if kept != noted:
        try:
            write_json(home.row_counts_file, kept)
        except OSError as error:
            # Next time they are counted anew. At the start nothing else would say why that takes long.
            if before is None:
                log.warning("The row counts cannot be kept on this disk.", reason=error.strerror)
    return counts


def agent_info(home: Home, settings: SiteSettings, *, gpu: str, rows: dict[str, int]) -> agent_pb2.AgentInfo:
    device = choose_device(settings.device, gpu=gpu)
    there = gpus()[int(device.partition(":")[2] or 0) :] if device != "cpu" else ()
    return agent_pb2.AgentInfo(
        version=agent_version(),
        device=f"{device} ({gpu})" if gpu and device != "cpu" else device,
        data_sets=[agent_pb2.DataSetInfo(name=name, rows=rows.get(name, 0)) for name in settings.data],
        base_models=[
            agent_pb2.BaseModelInfo(
                name=model.name,
                digest=model.digest,
                parameters=model.parameters,
                size_bytes=model.size_bytes,
                hidden_size=model.hidden_size,
                layers=model.layers,
                linear=[agent_pb2.LinearLayers(**asdict(layers)) for layers in model.linear],
                vocabulary=model.vocabulary,
            )
            for model in Models(home.models_file).all()
        ],
        memory_bytes=psutil.virtual_memory().total,
        free_disk_bytes=shutil.disk_usage(home.path).free,
        gpu_memory_bytes=there[0].memory_bytes if there else 0,
        gpus=min(settings.device.processes, len(there)),
    )
