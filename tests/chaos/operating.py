"""The operator as an actor: submits, looks again and again, pauses, revokes; patient as a person with a retry key.

It runs in a thread, because a stopped coordinator lets a call hang until its deadline. What it was told goes into the
history: a job that was acknowledged must exist for ever after, and a head that was shown must not go back.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import replace
from typing import Any

from google.protobuf.message import Message

from coordinator.client import OperatorClient, facts, load_profile
from protos.errors import Conflict, NotFound, SilotuneError
from protos.v1 import operator_pb2
from tests.chaos.arena import Arena
from tests.chaos.history import History

LOOK_SECONDS = 0.3
CALL_SECONDS = 3.0
ACTIONS = {"pause job": operator_pb2.JOB_ACTION_PAUSE, "resume job": operator_pb2.JOB_ACTION_RESUME}


class Operator:
    """Use as a context manager; `submit`, `control` and `revoke` return at once and are done in turn."""

    def __init__(self, arena: Arena) -> None:
        profile = replace(load_profile(str(arena.federation.profile)), address=arena.operator_address)
        self._client = OperatorClient(profile)
        self._orders: queue.Queue[tuple[str, str, Message]] = queue.Queue()
        self._paused = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="operator", daemon=True)
        self._history: History | None = None
        self._job = ""
        # Monotonic times of the first answer after a silence began.
        self.answered = 0.0

    def __enter__(self) -> Operator:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._client.__exit__()

    def begin(self, history: History, *, spec_json: str, token: str) -> None:
        """Submits a job; `job` has its id once that is acknowledged."""
        self._job, self._history = "", history
        self._order("submit", "SubmitJob", operator_pb2.SubmitJobRequest(spec_json=spec_json, submit_token=token))

    @property
    def job(self) -> str:
        return self._job

    def control(self, what: str) -> None:
        self._order(what, "ControlJob", operator_pb2.ControlJobRequest(job=self._job, action=ACTIONS[what]))

    def revoke(self, site: str) -> None:
        self._order(f"revoke {site}", "RevokeSite", operator_pb2.RevokeSiteRequest(name=site))

    @property
    def idle(self) -> bool:
        """Whether everything that was ordered was answered; an order that is tried again has left the queue."""
        return not self._orders.unfinished_tasks

    def look(self) -> dict[str, Any] | None:
        """The job as it is shown now; None without an answer."""
        try:
            shown = facts(
                self._client.ask("GetJob", operator_pb2.GetJobRequest(job=self._job), timeout_seconds=CALL_SECONDS)
            )
        except SilotuneError:
            return None
        self.answered = time.monotonic()
        return shown

    def _order(self, what: str, method: str, request: Message) -> None:
        self._orders.put((what, method, request))

    def _run(self) -> None:
        order: tuple[str, str, Message] | None = None
        while not self._over.wait(LOOK_SECONDS if self._job or order else 0.02):
            order = order or self._next()
            if order is not None and self._carry_out(*order):
                order = None
                self._orders.task_done()
            if self._job and (shown := self.look()) is not None and self._history is not None:
                job = shown["job"]
                self._history.add(
                    "operator", "shown", job=job["id"], state=job["state"], head=job["head_version"],
                    round=job["round"], sentence=job["sentence"],
                )  # fmt: skip

    def _next(self) -> tuple[str, str, Message] | None:
        try:
            return self._orders.get_nowait()
        except queue.Empty:
            return None

    def _carry_out(self, what: str, method: str, request: Message) -> bool:
        """Whether it was answered for good."""
        assert self._history is not None
        if what == "resume job" and not self._paused:
            return True  # It had ended before it could be paused; a failed one would run again.
        try:
            answer = self._client.ask(method, request, timeout_seconds=CALL_SECONDS)
        except (Conflict, NotFound) as error:
            self._history.add("operator", "refused", order=what, reason=error.message)
            return True
        except SilotuneError as error:
            if not error.retryable:
                self._history.add("operator", "refused", order=what, reason=error.message)
            return not error.retryable
        self.answered = time.monotonic()
        self._paused = what == "pause job"
        if method == "SubmitJob":
            self._job = answer.job_id
        self._history.add("operator", what, job=self._job)
        return True
