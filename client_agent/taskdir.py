"""The task directory: where the daemon, which may never touch a GPU, and the trainer, which may never touch the
network, meet.

    spec.json            what to do                                   written by the daemon
    update.safetensors   the trained tensors, or version 0            written by the trainer
    files/               INIT: config, tokenizer, frozen tensors      written by the trainer
    result.json          numbers; written last and atomically, so its presence means: finished

Control is JSON lines. To the trainer: {"run": "<directory>"}, {"cancel": true}; end of input means: exit.
From it: {"event": "progress", "stage", "done", "total", "unit", "metrics"}, then exactly one of {"event": "done"},
{"event": "failed", "reason", "hint"}, {"event": "cancelled"}.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SPEC = "spec.json"
UPDATE = "update.safetensors"
FILES = "files"
RESULT = "result.json"


@dataclass(frozen=True)
class TaskSpec:
    """Everything a trainer needs; paths are absolute and local."""

    task_id: str
    job_id: str
    round: int
    kind: str  # "init" | "train" | "evaluate"
    spec: dict[str, Any]  # the JobSpec as JSON
    seed: int
    split: str  # evaluate: "validation" | "test"
    model_path: str | None  # the version to start from; None for init
    base_model_path: str | None  # directory; None for a synthetic task
    base_digest: str
    data_set: dict[str, Any] | None  # settings.DataSet as JSON; None for synthetic, and for init
    device: str  # "cpu" | "cuda:0"
    threads: int


@dataclass(frozen=True)
class TaskResult:
    examples: int = 0
    steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)  # names of protos.metrics.METRICS
    seconds: dict[str, float] = field(default_factory=dict)  # names of protos.metrics.STAGE_SECONDS


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all, and on disk when this returns: write, fsync, rename, fsync the directory."""
    temporary = path.with_suffix(path.suffix + ".new")
    with temporary.open("w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_spec(directory: Path, spec: TaskSpec) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / SPEC, asdict(spec))


def read_spec(directory: Path) -> TaskSpec:
    return TaskSpec(**json.loads((directory / SPEC).read_text()))


def write_result(directory: Path, result: TaskResult) -> None:
    write_json(directory / RESULT, asdict(result))


def read_result(directory: Path) -> TaskResult | None:
    """None while the work is not finished."""
    path = directory / RESULT
    return TaskResult(**json.loads(path.read_text())) if path.exists() else None
