"""The aggregation process: one command on standard input, one JSON line out.

It is started by exec for each command, so that its memory is its own, heartbeats never wait for it, and a crash in it
is one failed command. Killing it at any instant leaves a temporary file and nothing else.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from coordinator.aggregation.combine import CorruptUpdate, Input, combine
from protos.jobspec import ServerOptimizer


def carry_out(command: dict[str, Any]) -> dict[str, Any]:
    """{"digest", "size", "optimizer_digest", "seconds"}, or {"corrupt_site"} when an input is damaged."""

    def path(name: str) -> Path | None:
        return Path(command[name]) if command.get(name) else None

    inputs = [
        Input(part["site"], Path(part["path"]), part["digest"], part["weight"]) for part in command["contributions"]
    ]
    optimizer: ServerOptimizer = TypeAdapter(ServerOptimizer).validate_python(command["optimizer"])
    try:
        combined = combine(
            inputs,
            output=Path(command["output"]),
            previous=path("previous"),
            optimizer=optimizer,
            state=path("state"),
            state_output=path("state_output"),
        )
    except CorruptUpdate as error:
        return {"corrupt_site": error.site}
    return asdict(combined)


def main() -> None:
    print(json.dumps(carry_out(json.load(sys.stdin))))


if __name__ == "__main__":
    main()
