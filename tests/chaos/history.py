"""What every actor says that it was told: one fact a line, as JSON, in the order in which it was told.

Three actors speak: the operator (this process), each agent by its own log, and the coordinator by its events. A fact is
something that an actor may rely on from then on, such as a result that was acknowledged; the checker holds the store
against it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

# What an agent logs -> the kind of fact that it is (client_agent/loop.py lists them).
AGENT_EVENTS = {
    "The agent runs.": "started",
    "A task was granted.": "granted",
    "The trainer begins.": "begun",
    "The trainer has finished.": "trained",
    "The trainer died; it goes on from its checkpoint.": "resumed",
    "The result is sealed.": "sealed",
    "The finished result of an earlier grant is offered again.": "adopted",
    "The result was uploaded.": "uploaded",
    "The task succeeded.": "acknowledged",
    "The task failed.": "failed",
    "The task declined.": "declined",
    "The task is stopped.": "stopped",
}


@dataclass(frozen=True)
class Fact:
    """`kind` of thing that `actor` learned; `unix_seconds` is for people, nothing is decided by it."""

    actor: str
    kind: str
    unix_seconds: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        return self.about.get(key)


class History:
    """Facts of one run, kept in memory and appended to a file; from any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self.facts: list[Fact] = []

    def add(self, actor: str, kind: str, **about: Any) -> None:
        self.extend([Fact(actor, kind, time.time(), about)])

    def extend(self, facts: Iterable[Fact]) -> None:
        with self._lock, self._path.open("a") as file:
            for fact in facts:
                self.facts.append(fact)
                file.write(json.dumps(asdict(fact)) + "\n")


class AgentLog:
    """Reads an agent's JSON log on from where it was read before."""

    def __init__(self, site: str, path: Path) -> None:
        self._site = site
        self._path = path
        self._offset = 0

    def read(self) -> Iterator[Fact]:
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # Half a line of a process that was killed, or that writes it now.
                self._offset += len(line)
                if (fact := fact_of(self._site, line)) is not None:
                    yield fact


def fact_of(site: str, line: bytes) -> Fact | None:
    """What one line of an agent's log says; None for a line that says nothing that the checker needs."""
    # A killed process may leave half a line, to which the next one's first line is joined.
    start = line.rfind(b'{"')
    for at in {line.find(b"{"), start}:
        try:
            fields = json.loads(line[max(0, at) :])
        except ValueError:
            continue
        kind = AGENT_EVENTS.get(fields.get("event", ""))
        if kind is not None:
            about = {key: value for key, value in fields.items() if key not in ("event", "level", "timestamp")}
            return Fact(site, kind, _unix(fields.get("timestamp", "")), about)
    return None


def _unix(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp() if stamp else 0.0
