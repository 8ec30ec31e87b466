"""The folder that a run of the demo has to itself, and the processes' clock.

A marker file says that the folder is the demo's own: only then is what an earlier run left in it replaced. The marker
is locked while a run goes on, so two runs never share ports, certificates or a report.
"""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protos.errors import AlreadyExists, Conflict

MARKER = ".silotune-demo"


@contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Empties `directory` for one run and keeps others out until the end.

    AlreadyExists: it holds something that no demo made. Conflict: a run goes on in it.
    """
    marker = directory / MARKER
    if directory.exists() and not marker.exists() and any(directory.iterdir()):
        raise AlreadyExists(
            f"{directory} holds files that no demo made.", hint="Name another folder with --out, or move them away."
        )
    directory.mkdir(parents=True, exist_ok=True)
    with marker.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                f"A demo runs in {directory} at this moment.", hint="Wait for its end, or stop it with Ctrl-C."
            ) from None
        for entry in directory.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry != marker:
                entry.unlink()
        yield


class Stopwatch:
    """Wall-clock seconds by part of the run, in the order in which the parts began."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = time.monotonic() - began
