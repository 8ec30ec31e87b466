"""The agent's home directory: where everything that an agent keeps has its place.

site.toml      what the administrator writes: data sets, device, policy
identity/      key, certificate, CA certificate, name and coordinator
models.json    base models that this site holds
blobs/         versions of the global model, named by digest
tasks/         one directory for each task in hand: the journal
jobs/          what is kept of each job from task to task
approvals/     job specs that wait for, or have, the administrator's verdict
log/           output of the trainer; it never leaves the site
status.json    what the running agent does now, for `silotune-agent status`
pause.json     there while the administrator has paused the site
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from protos.errors import Conflict


@dataclass(frozen=True)
class Home:
    path: Path

    @property
    def site_file(self) -> Path:
        return self.path / "site.toml"

    @property
    def identity(self) -> Path:
        return self.path / "identity"

    @property
    def models_file(self) -> Path:
        return self.path / "models.json"

    @property
    def models(self) -> Path:
        """Base models that were downloaded; those of the administrator stay where they are."""
        return self.path / "models"

    @property
    def blobs(self) -> Path:
        return self.path / "blobs"

    @property
    def tasks(self) -> Path:
        return self.path / "tasks"

    @property
    def jobs(self) -> Path:
        return self.path / "jobs"

    @property
    def approvals(self) -> Path:
        return self.path / "approvals"

    @property
    def log(self) -> Path:
        return self.path / "log"

    @property
    def status_file(self) -> Path:
        return self.path / "status.json"

    @property
    def pause_file(self) -> Path:
        return self.path / "pause.json"

    @property
    def row_counts_file(self) -> Path:
        return self.path / "rows.json"

    def create(self) -> None:
        """The directory, readable by its owner only: it holds a private key and trained tensors."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        for part in (self.identity, self.blobs, self.tasks, self.approvals, self.log):
            part.mkdir(exist_ok=True, mode=0o700)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Held for as long as a daemon works in this home. Conflict when another process holds it."""
        handle = self._lock()
        if handle is None:
            raise Conflict(
                f"Another agent already runs in {self.path}.",
                hint="Stop it first, or give this one a home of its own with --home.",
            )
        try:
            yield
        finally:
            os.close(handle)

    def is_locked(self) -> bool:
        """Whether a daemon runs in this home now."""
        if not self.path.exists():
            return False
        handle = self._lock()
        if handle is not None:
            os.close(handle)
        return handle is None

    def _lock(self) -> int | None:
        # The kernel drops the lock with the process, however it ends; nothing is left to clean up.
        handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        return handle
