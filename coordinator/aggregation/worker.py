"""The aggregation process: orders as JSON lines on standard input, a JSON line out for each.

It is a process of its own, so that its memory is its own, heartbeats never wait for it, and a crash in it is one failed
command. It stays warm, because starting an interpreter takes longer than averaging a small model. Killing it at any
instant leaves a temporary file and nothing else. It ends with its standard input.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from coordinator.aggregation.combine import CorruptUpdate, Input, combine
from coordinator.aggregation.downlink import round_version
from protos import jobspec
from protos.jobspec import ServerOptimizer


def carry_out(command: dict[str, Any]) -> dict[str, Any]:
    """{"digest", "size", "optimizer_digest", "metrics", "seconds"}, or {"corrupt_site"} when an input is damaged.

    An order with "down" (aggregation/downlink.py) makes a version that is rounded for the way down.
    """

    def path(name: str) -> Path | None:
        return Path(command[name]) if command.get(name) else None

    spec = jobspec.parse(command["spec"]) if "spec" in command else None
    encoding = spec.encoding if spec else jobspec.Encoding()
    inputs = [
        Input(
            part["site"],
            Path(part["path"]),
            part["digest"],
            part["weight"],
            encoding.up,
            encoding.block,
            control_weight=part.get("control_weight", 0.0),
            steps=part.get("steps", 0),
        )
        for part in command["contributions"]
    ]
    optimizer: ServerOptimizer = TypeAdapter(ServerOptimizer).validate_python(command["optimizer"])
    try:
        combined = combine(
            inputs,
            output=Path(command["output"]),
            previous=path("previous"),
            previous_digest=command.get("previous_digest", ""),
            optimizer=optimizer,
            state=path("state"),
            state_digest=command.get("state_digest", ""),
            state_output=path("state_output"),
            spec=spec,
            round_number=command.get("round", 0),
            history=command.get("history", ()),
        )
    except CorruptUpdate as error:
        return {"corrupt_site": error.site}
    answer = asdict(combined)
    if spec and "down" in command:
        began = time.perf_counter()
        number = command.get("round", 1)
        answer |= round_version(Path(command["output"]), spec=spec, round_number=number, **command["down"])
        answer["seconds"]["encode"] = time.perf_counter() - began
    return answer


def main() -> None:
    for line in sys.stdin:
        try:
            answer = carry_out(json.loads(line))
        except Exception as error:
            # The controller writes this down as the command's error and tries again later.
            answer = {"error": f"{type(error).__name__}: {error}", "os_error": isinstance(error, OSError)}
        answer["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
