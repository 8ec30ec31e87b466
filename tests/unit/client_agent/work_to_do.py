"""Tasks for the tests of the agent: synthetic ones, as a coordinator would grant them."""

from __future__ import annotations

from typing import Any

import numpy as np

from client_agent.synthetic import tensor_shapes
from protos import jobspec
from protos.digests import digest_of
from protos.tensors import make_header
from protos.v1 import agent_pb2


def spec(*, name: str = "job", payload_mb: float = 0.2, train_seconds: float = 0.0, **more: Any) -> jobspec.JobSpec:
    fields: dict[str, Any] = {
        "name": name,
        "task": {"type": "synthetic", "payload_mb": payload_mb, "train_seconds": train_seconds},
        "local": {"steps": 4},
        "rounds": 3,
    }
    return jobspec.parse({**fields, **more})


def task(kind: str = "train", *, round: int = 1, job: jobspec.JobSpec | None = None, **more: Any) -> agent_pb2.Task:
    text = (job or spec()).canonical_json
    fields: dict[str, Any] = {
        "id": f"{kind}-{round}",
        "job_id": "j1",
        "round": round,
        "kind": agent_pb2.TaskKind.Value(f"TASK_KIND_{kind.upper()}"),
        "spec_json": text,
        "spec_hash": digest_of(text.encode()),
        "version": max(0, round - 1),
        "seed": 7,
        "lease_seconds": 0.3,
    }
    return agent_pb2.Task(**{**fields, **more})


def model_bytes(payload_mb: float = 0.2) -> bytes:
    """A version of the global model: all values 0.5."""
    header, layout = make_header(tensor_shapes(int(payload_mb * 1e6)))
    return header + np.full(layout.data_bytes // 4, 0.5, dtype=np.float32).tobytes()
