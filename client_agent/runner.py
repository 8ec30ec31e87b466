"""The trainer process as the daemon sees it: started by exec, kept warm between tasks, ended when idle.

The daemon never forks: gRPC's threads do not survive it. What the trainer prints stays in a log at the site; of an
unexpected end only the kind of error is reported, because the text of an exception may quote a sample.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import structlog

from client_agent.settings import trainer_environment
from protos.errors import Internal

CANCEL_SECONDS = 10.0
# A step may take long, and a checkpoint may be large; then the trainer is killed and goes on from its last checkpoint.
PAUSE_SECONDS = 120.0
EXIT_SECONDS = 3.0
KILL_GRACE_SECONDS = 5.0
LINE_BYTES = 1 << 20
LOG_BYTES = 10 << 20
MODULES = {"synthetic": "client_agent.synthetic", "training": "client_agent.training.worker"}
_EXCEPTION = re.compile(r"^(?:[A-Za-z_]\w*\.)*([A-Za-z_]\w*(?:Error|Exception|Interrupt|Exit))\b")

log = structlog.get_logger()
OnProgress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Finished:
    """The task directory holds the result."""


@dataclass(frozen=True)
class Failure:
    """Why the trainer could not do it, in a sentence that may leave the site."""

    reason: str
    hint: str = ""
    # The trainer's process ended; what it has saved is in the task directory.
    died: bool = False
    full_disk: bool = False
    # It cannot make the version by itself.
    needs_version: bool = False
    # The site's policy does not allow what only the trainer could count.
    declined: bool = False


@dataclass(frozen=True)
class Paused:
    """The trainer ended the task because it was told to; the directory holds what it goes on from, if anything."""


class Runner:
    """At most one trainer process, and at most one task in it at a time."""

    def __init__(self, *, log_directory: Path, idle_seconds: float) -> None:
        self._log_directory = log_directory
        self._idle_seconds = idle_seconds
        self._process: asyncio.subprocess.Process | None = None
        self._kind = ""
        self._last_lines: deque[str] = deque(maxlen=50)
        self._reader: asyncio.Task[None] | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()
        # How long a cancelled task may take to stop before its trainer is killed; shorter at shutdown.
        self.cancel_seconds = CANCEL_SECONDS
        self.shutting_down = False
        self._killed_to_pause = False

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self._process.returncode is None else None

    def shut_down(self, *, within_seconds: float) -> None:
        """From now on a cancelled task is one that goes on after the daemon's next start, so its state is saved."""
        self.cancel_seconds = within_seconds
        self.shutting_down = True

    async def run(
        self, directory: Path, *, kind: str, on_progress: OnProgress, pausing: asyncio.Event | None = None
    ) -> Finished | Failure | Paused:
        """The task in `directory`, by the trainer of this kind ("synthetic" or "training").

        When `pausing` is set, now or later, the trainer saves what it has and ends the task. Cancelling the caller
        cancels the task. Either way the trainer stays warm when it obeys in time.
        """
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        process = await self._warm(kind)
        self._killed_to_pause = False
        pause = asyncio.create_task(self._pause(process, pausing or asyncio.Event()))
        try:
            self._send(process, {"run": str(directory)})
            ended = await self._follow(process, on_progress)
            return Paused() if isinstance(ended, Failure) and self._killed_to_pause else ended
        except asyncio.CancelledError:
            await asyncio.shield(self._cancel(process))
            raise
        finally:
            pause.cancel()
            if process.returncode is None:
                self._idle = asyncio.get_running_loop().call_later(self._idle_seconds, self._stop_idle)

    async def close(self) -> None:
        """Ends the trainer: end of input first, then SIGKILL."""
        if self._idle is not None:
            self._idle.cancel()
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None and process.stdin is not None:
            process.stdin.close()
            try:
                async with asyncio.timeout(EXIT_SECONDS):
                    await process.wait()
            except TimeoutError:
                await self._kill(process)
        if self._reader is not None:
            await asyncio.wait({self._reader}, timeout=EXIT_SECONDS)

    def _stop_idle(self) -> None:
        log.info("The trainer was idle and gives its memory back.", idle_seconds=self._idle_seconds)
        closing = asyncio.ensure_future(self.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def _warm(self, kind: str) -> asyncio.subprocess.Process:
        if self._closing:
            await asyncio.wait(self._closing)
        if self._process is not None and (self._process.returncode is not None or self._kind != kind):
            await self.close()
        if self._process is None:
            self._process = await self._start(kind)
            self._kind = kind
        return self._process

    async def _start(self, kind: str) -> asyncio.subprocess.Process:
        self._log_directory.mkdir(parents=True, exist_ok=True)
        path = self._log_directory / "trainer.log"
        if path.exists() and path.stat().st_size > LOG_BYTES:
            path.replace(path.with_suffix(".log.1"))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "client_agent.tether", MODULES[kind], str(os.getpid()),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env=trainer_environment(), limit=LINE_BYTES, start_new_session=True,
        )  # fmt: skip
        log.info("A trainer was started.", kind=kind, pid=process.pid)
        self._last_lines.clear()
        self._reader = asyncio.ensure_future(self._keep_log(process, path.open("ab", buffering=0)))
        return process

    async def _keep_log(self, process: asyncio.subprocess.Process, file: BinaryIO) -> None:
        assert process.stderr is not None
        with file:
            while chunk := await process.stderr.read(1 << 16):
                with suppress(OSError):  # A full disk must not stop the reading: the trainer would wait for it.
                    file.write(chunk)
                self._last_lines.extend(chunk.decode(errors="replace").splitlines())

    def _send(self, process: asyncio.subprocess.Process, command: dict[str, Any]) -> None:
        assert process.stdin is not None
        if not process.stdin.is_closing():
            process.stdin.write(json.dumps(command).encode() + b"\n")

    async def _follow(
        self, process: asyncio.subprocess.Process, on_progress: OnProgress
    ) -> Finished | Failure | Paused:
        while (event := await self._event(process)) is not None:
            match event["event"]:
                case "progress":
                    on_progress(event)
                case "done":
                    return Finished()
                case "warning":
                    log.warning(event["sentence"])
                case "paused":
                    return Paused()
                case "failed":
                    return Failure(
                        event["reason"], event.get("hint", ""),
                        full_disk=event.get("full_disk", False), needs_version=event.get("needs_version", False),
                        declined=event.get("declined", False),
                    )  # fmt: skip
                case "cancelled":
                    raise Internal("The trainer reports a cancellation that nobody asked for.")
        return await self._explain_end(process)

    async def _event(self, process: asyncio.subprocess.Process) -> dict[str, Any] | None:
        """The trainer's next event; None at the end of its output. Anything else that it prints goes to the log."""
        assert process.stdout is not None
        while line := await process.stdout.readline():
            try:
                event = json.loads(line)
            except ValueError:
                self._last_lines.append(line.decode(errors="replace"))
                continue
            if isinstance(event, dict) and "event" in event:
                return event
        return None

    async def _explain_end(self, process: asyncio.subprocess.Process) -> Failure:
        try:
            async with asyncio.timeout(EXIT_SECONDS):
                code = await process.wait()
        except TimeoutError:
            await self._kill(process)
            return Failure("The trainer closed its output and did not end; it was stopped.", died=True)
        if self._reader is not None:
            await asyncio.wait({self._reader}, timeout=EXIT_SECONDS)
        log.error("The trainer ended in mid-task.", exit_code=code, last_lines=list(self._last_lines)[-10:])
        if code == -signal.SIGKILL:
            return Failure(
                "The trainer was killed by the system, most likely because the memory ran out.",
                hint="Give it a smaller micro_batch_size or max_length, or the machine more memory.",
                died=True,
            )
        if code < 0:
            return Failure(f"The trainer was ended by signal {signal.Signals(-code).name}.", died=True)
        names = [match[1] for line in self._last_lines if (match := _EXCEPTION.match(line))]
        kind = f" with {names[-1]}" if names else ""
        hint = "The site's log/trainer.log has the details."
        return Failure(f"The trainer ended{kind} (exit code {code}).", hint=hint, died=True)

    async def _pause(self, process: asyncio.subprocess.Process, pausing: asyncio.Event) -> None:
        """Cancelled when the task has ended."""
        await pausing.wait()
        self._send(process, {"pause": True})
        await asyncio.sleep(PAUSE_SECONDS)
        log.warning("The trainer did not pause when told to and is killed.", seconds=PAUSE_SECONDS)
        self._killed_to_pause = True
        await self._kill(process)

    async def _cancel(self, process: asyncio.subprocess.Process) -> None:
        self._send(process, {"pause" if self.shutting_down else "cancel": True})
        try:
            async with asyncio.timeout(self.cancel_seconds):
                while (event := await self._event(process)) is not None:
                    if event["event"] == "warning":
                        log.warning(event["sentence"])
                    elif event["event"] != "progress":
                        return
        except TimeoutError:
            log.warning("The trainer did not stop when told to and is killed.", seconds=self.cancel_seconds)
            await self._kill(process)

    async def _kill(self, process: asyncio.subprocess.Process) -> None:
        if process.returncode is None:
            # The group, so that data loaders of the trainer's own end with it. It may just have ended.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            try:
                async with asyncio.timeout(KILL_GRACE_SECONDS):
                    await process.wait()
            except TimeoutError:
                # It waits in the system, for a disk or a GPU's driver, and ends when that answers.
                log.error("The trainer was killed and has not ended yet.", pid=process.pid)
