"""Whether the trainer may use this machine now: the administrator's `silotune-agent pause`, and the hours in site.toml.

Both only decide when the site works, never what comes of it, so the machine's own clock may be wrong or step. Transfers
have hours of their own: see bandwidth.py.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from client_agent import hours
from client_agent.taskdir import read_json, write_json
from protos.errors import InvalidInput

UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
LATEST_UNIX_SECONDS = 10_000_000_000  # in 2286; what is later is no time that anybody meant
LONGEST_SECONDS = 366 * 86_400


@dataclass(frozen=True)
class Pause:
    # None: until `silotune-agent resume`.
    until_unix_seconds: float | None


class PauseFile:
    """Written by the command line and read by the daemon; it outlives both."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, pause: Pause) -> None:
        write_json(self._path, {"until_unix_seconds": pause.until_unix_seconds})

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def read(self) -> Pause | None:
        """None when there is none. One that cannot be understood holds until it is ended: somebody wanted a pause."""
        if not self._path.exists():
            return None
        match read_json(self._path):
            case {"until_unix_seconds": float() | int() as until} if 0 <= until < LATEST_UNIX_SECONDS:
                return Pause(until)
        return Pause(None)


def duration_seconds(text: str) -> float:
    """Of "90m", "2h" or "1d". InvalidInput when it is none of the kind, or longer than a year."""
    match = re.fullmatch(r"(\d{1,6})([smhd])", text.strip())
    if match is None or not int(match[1]):
        raise InvalidInput(f"{text[:40]!r} is not a time such as 90m, 2h or 1d.")
    seconds = int(match[1]) * UNIT_SECONDS[match[2]]
    if seconds > LONGEST_SECONDS:
        raise InvalidInput(f"{text} is longer than a year.", hint="Without a time a pause holds until it is ended.")
    return seconds


def reason(pause: Pause | None, windows: Sequence[str], *, now: datetime) -> str:
    """Why the trainer may not run now, and until when; empty when it may. `now` is local time without a zone."""
    if pause is not None:
        if pause.until_unix_seconds is None:
            return "This site is paused by its administrator, until `silotune-agent resume`."
        until = datetime.fromtimestamp(pause.until_unix_seconds)
        if now < until:
            return f"This site is paused by its administrator until {until:%a %H:%M}."
    outside = hours.outside(windows, now)
    return f"It is outside this site's hours {outside}." if outside else ""


class Hold:
    """What `reason` says, for those who wait for it to begin or to be over."""

    def __init__(self, file: PauseFile, *, windows: Sequence[str]) -> None:
        self._file = file
        self._windows = windows
        self.sentence = ""
        self.begun = asyncio.Event()
        self.over = asyncio.Event()
        self.over.set()

    def look(self, *, now: datetime) -> bool:
        """Whether it has begun or is over since the last look."""
        self.sentence = reason(self._file.read(), self._windows, now=now)
        held = bool(self.sentence)
        if held == self.begun.is_set():
            return False
        for event, state in ((self.begun, held), (self.over, not held)):
            event.set() if state else event.clear()
        return True
