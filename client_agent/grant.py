"""A task in hand: its grant, which may be replaced, its work, which never changes, and how far it is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from client_agent.journal import Work, work_of
from protos.v1 import agent_pb2

log = structlog.get_logger()


@dataclass
class Grant:
    """A task in hand. `task` is replaced when the lease is granted anew; `work` never changes."""

    task: agent_pb2.Task
    work: Work
    progress: agent_pb2.Progress = field(default_factory=agent_pb2.Progress)
    regaining: asyncio.Lock = field(default_factory=asyncio.Lock)
    began: float = field(default_factory=time.monotonic)
    first_step_seconds: float | None = None
    # While a person is asked whether the job may run.
    asking: bool = False
    stage_changed: asyncio.Event = field(default_factory=asyncio.Event)

    @staticmethod
    def of(task: agent_pb2.Task) -> Grant:
        return Grant(task, work_of(task))

    @property
    def log(self) -> Any:
        """What is logged here says which task it is about: see client_agent/loop.py."""
        work = self.work
        return log.bind(
            job=work.job_id, round=work.round, task=work.kind, version=work.version, split=work.split,
            generation=self.task.generation,
        )  # fmt: skip

    def at(
        self, stage: agent_pb2.Stage, *, done: int = 0, total: int = 0, unit: str = "",
        metrics: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        if stage != self.progress.stage:
            self.stage_changed.set()
        self.progress = agent_pb2.Progress(stage=stage, done=done, total=total, unit=unit, metrics=metrics or {})
