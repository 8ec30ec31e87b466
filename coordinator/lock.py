"""One process for each directory: a lock that goes with the process, however it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from protos.errors import Conflict


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds the directory. Conflict names the process that has it."""
    with (directory / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise Conflict(
                f"Another coordinator (process {holder}) serves from {directory}.",
                hint="One directory has one coordinator; stop the other, or name another directory.",
            ) from None
        # Who holds it, for the sentence above; a full disk must not keep a coordinator from starting.
        with suppress(OSError):
            file.truncate(0)
            os.write(file.fileno(), str(os.getpid()).encode())
        yield
