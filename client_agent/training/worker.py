"""The trainer process: `python -m client_agent.training.worker`, started by the daemon and kept warm between tasks.

It speaks the protocol of client_agent/taskdir.py. Libraries print as they like, so standard output is kept aside for
events before any of them is imported, and whatever else is written to it goes to standard error, the site's own log.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TextIO

from client_agent.taskdir import (
    Paused,
    Seat,
    TooManyEpochs,
    VersionNeeded,
    is_full,
    read_spec,
    until_written,
    write_result,
)
from client_agent.training.data import without_content
from protos.errors import SilotuneError

PROGRESS_SECONDS = 0.25


class Cancelled(Exception):
    """The daemon wants no more of this task."""


@dataclass(frozen=True)
class Run:
    directory: Path
    received: float  # time.monotonic()
    # Where another trainer wants this one to help.
    seat: Seat | None = None
    # Each run has its own, so that a cancel that comes too late does not hit the next one.
    cancelled: threading.Event = field(default_factory=threading.Event)
    pausing: threading.Event = field(default_factory=threading.Event)


class Control:
    """The daemon's commands, read by a thread, and the events for it."""

    def __init__(self, *, commands: TextIO, events: TextIO) -> None:
        self._commands = commands
        self._events = events
        self._runs: queue.Queue[Run | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        latest: Run | None = None
        for line in self._commands:
            command = json.loads(line)
            if "run" in command:
                seat = Seat(command["rank"], command["meeting"]) if "rank" in command else None
                latest = Run(Path(command["run"]), time.monotonic(), seat)
                self._runs.put(latest)
            elif command.get("cancel") and latest:
                latest.cancelled.set()
            elif command.get("pause") and latest:
                latest.pausing.set()
        if latest:
            latest.cancelled.set()
        self._runs.put(None)

    def runs(self) -> Iterator[Run]:
        while (run := self._runs.get()) is not None:
            yield run

    def say(self, event: str, **fields: object) -> None:
        self._events.write(json.dumps({"event": event, **fields}) + "\n")
        self._events.flush()


class Progress:
    """Progress events, at most four a second, the first and the last of each stage always; ends a task that is to end.

    A training that is to pause is not ended here: its checkpoints do that, at the next step.
    """

    def __init__(self, run: Run, *, control: Control) -> None:
        self._run = run
        self._control = control
        self._stage = ""
        self._said = 0.0

    def __call__(self, stage: str, done: int, total: int, unit: str, metrics: dict[str, float]) -> None:
        if self._run.cancelled.is_set():
            raise Cancelled
        if self._run.pausing.is_set() and stage != "training":
            raise Paused
        now = time.monotonic()
        if stage != self._stage or done in (1, total) or now - self._said >= PROGRESS_SECONDS:
            self._control.say("progress", stage=stage, done=done, total=total, unit=unit, metrics=metrics)
            self._stage, self._said = stage, now


def main() -> None:
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    control = Control(commands=sys.stdin, events=events)
    # Not before standard output is safe; and the daemon's first command need not wait for it.
    import torch

    from client_agent.training.tasks import Work
    from client_agent.training.team import Team
    from client_agent.training.warm import Warm

    warm = Warm()
    team = Team(warm, say_failed=lambda reason, hint: control.say("failed", reason=reason, hint=hint))
    for run in control.runs():
        try:
            task = read_spec(run.directory)
            with team.at(task, run.directory, seat=run.seat) as group:
                work = Work(
                    task, run.directory, warm, Progress(run, control=control), run.received,
                    pausing=run.pausing.is_set, warn=lambda sentence: control.say("warning", sentence=sentence),
                    group=group,
                )  # fmt: skip
                result = work.run()
                if group.leads:
                    until_written(partial(write_result, run.directory, result), waits=work.wait_for_room)
        except Cancelled:
            control.say("cancelled")
        except Paused:
            control.say("paused")
        except VersionNeeded as needed:
            control.say("failed", reason=str(needed), hint="", needs_version=True)
        except TooManyEpochs as refused:
            control.say("failed", reason=str(refused), hint="", declined=True)
        except SilotuneError as error:
            control.say("failed", reason=without_content(error), hint=error.hint)
        except torch.OutOfMemoryError:
            warm.clear()
            control.say(
                "failed",
                reason="The GPU's memory is too small for the model.",
                hint="Choose a smaller base model or LoRA, or free the GPU of other work.",
            )
        except OSError as error:
            traceback.print_exc()
            reason = error.strerror or type(error).__name__
            sentence = f"The trainer could not use its disk: {reason}."
            control.say("failed", reason=sentence, hint="", full_disk=is_full(error))
        except Exception as error:
            # Its text may quote a sample, so only the kind leaves the site. What is warm may be half changed.
            traceback.print_exc()
            warm.clear()
            reason = f"The trainer met an unexpected {type(error).__name__}."
            control.say("failed", reason=reason, hint="The trainer's log at the site has the details.")
        else:
            control.say("done")


if __name__ == "__main__":
    main()
