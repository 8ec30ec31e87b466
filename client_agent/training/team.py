"""The other processes of a training that needs several GPUs: started by the trainer that the daemon talks to, which is
one of them itself, and ended with it.

Each is the same worker program and speaks the same lines of JSON with this one as this one does with the daemon. What
one of them has to say only matters when it fails: then this one, which may be waiting for it inside a collective
operation, cannot go on, and the task ends with its reason. After anything but success all of them are ended, and the
next task starts new ones: nobody has to agree with anybody on how far an interrupted task came.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from client_agent.settings import trainer_environment
from client_agent.taskdir import Seat, TaskSpec
from client_agent.training.parallel import ALONE, Group, join, leave
from client_agent.training.tasks import choose_device
from client_agent.training.warm import Warm
from protos.errors import Internal

# How long a failure may take to show here too, when another process has met it.
NOTICE_SECONDS = 10.0


class _Peers:
    """The other processes of a group. `say_failed(reason, hint)` is called by a thread of this one, just before it
    ends."""

    def __init__(self, size: int, *, say_failed: Callable[[str, str], None]) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="silotune-")
        self.meeting = Path(self._directory.name) / "meeting"
        self._say_failed = say_failed
        self._reason: tuple[str, str] | None = None
        self._told = threading.Event()
        # Set by whoever may end the task: the thread that works, or one that saw another process fail.
        self._over = threading.Event()
        self._claim = threading.Lock()
        self.busy = False
        self.complete = True
        command = [sys.executable, "-m", "client_agent.tether", "client_agent.training.worker", str(os.getpid())]
        pipe = subprocess.PIPE
        self._processes = [
            subprocess.Popen(command, stdin=pipe, stdout=pipe, env=trainer_environment(), text=True)
            for _ in range(1, size)
        ]
        for process in self._processes:
            threading.Thread(target=self._watch, args=(process,), daemon=True).start()

    def run(self, directory: Path) -> None:
        self.busy = True
        for rank, process in enumerate(self._processes, start=1):
            assert process.stdin
            process.stdin.write(json.dumps({"run": str(directory), "rank": rank, "meeting": str(self.meeting)}) + "\n")
            process.stdin.flush()

    def reason_of(self, error: Exception) -> Exception:
        """Why the task failed: a connection that breaks here is how another process's failure shows."""
        elsewhere = isinstance(error, RuntimeError) and self._told.wait(NOTICE_SECONDS)
        with self._claim:
            if self._over.is_set():
                threading.Event().wait()  # A thread has begun to end this process.
            self._over.set()
        return Internal(self._reason[0], hint=self._reason[1]) if elsewhere and self._reason else error

    def end(self) -> None:
        self._over.set()
        for process in self._processes:
            process.kill()
            process.wait()
        self._directory.cleanup()

    def _watch(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "failed":
                self._reason = event["reason"], event["hint"]
                self._told.set()
                # Most likely this process meets the same, and says so itself.
                self._over.wait(NOTICE_SECONDS)
                break
        self.complete = False
        with self._claim:
            if not self.busy or self._over.is_set():
                return
            self._over.set()
            if self._reason:
                self._say_failed(*self._reason)
            print("A process of this training has ended, and this one ends with it.", file=sys.stderr, flush=True)
            os._exit(1)


@dataclass
class Team:
    """The group that this process works in, from task to task."""

    warm: Warm
    say_failed: Callable[[str, str], None]
    _group: Group = ALONE
    _device: str = ""
    _peers: _Peers | None = None

    @contextmanager
    def at(self, task: TaskSpec, directory: Path, *, seat: Seat | None) -> Iterator[Group]:
        """The processes that do this task. `seat`: this one was called by another, which decides when it ends."""
        if seat:
            if self._group is ALONE:
                self._join(task, rank=seat.rank, meeting=Path(seat.meeting))
            yield self._group
            return
        # Version 0 is only built: that needs no GPU, and so no others.
        size = 1 if task.kind == "init" else task.processes
        if (self._group.size, self._device) != (size, task.device) or not (self._peers is None or self._peers.complete):
            self.end()
            self._device = task.device
        try:
            if size > 1:
                self._peers = self._peers or _Peers(size, say_failed=self.say_failed)
                self._peers.run(directory)
                if self._group is ALONE:
                    self._join(task, rank=0, meeting=self._peers.meeting)
            yield self._group
        except Exception as error:
            reason = self._peers.reason_of(error) if self._peers else error
            self.end()
            if reason is error:
                raise
            raise reason from error
        if self._peers:
            self._peers.busy = False

    def end(self) -> None:
        """Ends the others, and forgets what is warm with them: parts of one model."""
        if self._peers:
            self.warm.clear()
            self._peers.end()
            leave()
        self._peers, self._group = None, ALONE

    def _join(self, task: TaskSpec, *, rank: int, meeting: Path) -> None:
        device = choose_device(task.device, place=rank)
        self._group = join(rank=rank, size=task.processes, device=device, meeting=meeting)
