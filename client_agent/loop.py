"""The daemon's loop: lease -> approve -> fetch -> run -> upload -> finish.

Nothing depends on a message that is sent once: each step asks the coordinator what to do, or repeats what was done. A
fenced lease stops no work by itself. The loop asks for the same work again, and goes on under the new generation when
it is granted; only what is granted no more is stopped.

What the log says of a task is the site's history of it, each line once when it is true, with job, round, task (its
kind), version, split and generation:

    A task was granted.             The lease was granted anew; the work goes on.
    The trainer begins.             resumed_step: 0, or that of the checkpoint from which it goes on
    The whole version is fetched.   reason: the trainer cannot make it from the difference from version 0
    The trainer has finished.       steps
    The trainer died; it goes on from its checkpoint.      reason, step
    The training since step n was not saved.               reached_step (a pause or a stop did not get it saved)
    The task is paused.             reason           The task goes on.
    The result is sealed.           digest, bytes    (of the update; empty and 0 for an evaluation)
    The finished result of an earlier grant is offered again.      digest, bytes
    The result was uploaded.        digest, bytes, sent_bytes (payload on the wire, all attempts of this process)
    The task succeeded. | failed. | declined.      fate, digest: the coordinator has committed it
    The task is stopped.            reason: it is not wanted any more
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, TypeVar

import structlog

from client_agent.grant import Grant
from client_agent.identity import utc_now
from client_agent.journal import work_of
from client_agent.observe import STAGES, Disk, StatusFile
from client_agent.reports import Outcome, failed, failed_by_surprise, succeeded
from client_agent.session import Session, Waiting
from client_agent.stages import Refused, Stages
from client_agent.taskdir import disk_is_full, full_disk_waits
from protos.errors import (
    AlreadyExists,
    Conflict,
    InvalidInput,
    LeaseFenced,
    NotFound,
    OutOfSpace,
    SilotuneError,
    Unavailable,
)
from protos.v1 import agent_pb2

# Progress is shown to people, so it goes out more often than the lease needs.
BEAT_SECONDS = 5.0
STAGE_BEAT_SECONDS = 1.0
REGAIN_WAIT_SECONDS = 5.0
REGRANTS = 5
REFUSED_PAUSE_SECONDS = 30.0
RENEWAL_CHECK_SECONDS = 60.0
HOLD_LOOK_SECONDS = 1.0
TASK, TRANSFER = "The task in hand", "A transfer"

log = structlog.get_logger()
Answer = TypeVar("Answer")


class LeaseLost(Exception):
    """The work is not wanted from this site any more; the message says why."""


class Daemon:
    def __init__(
        self, *, stages: Stages, session: Session, waiting: Waiting, status: StatusFile, device: asyncio.Lock
    ) -> None:
        self._stages = stages
        self._session = session
        self._waiting = waiting
        self._status = status
        self._disk = Disk()
        self._info = agent_pb2.AgentInfo()
        self._held: dict[str, Grant] = {}
        self._granted: list[agent_pb2.Task] = []
        # One task computes at a time; one that waits for approval does not keep others from it.
        self._device = device
        self._wants_work = asyncio.Event()
        self._wants_work.set()

    async def run(self) -> None:
        """Until cancelled. Work in hand stays in the journal."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._renew_certificate())
            group.create_task(self._watch_hold())
            while True:
                await self._wants_work.wait()
                task = self._granted.pop(0) if self._granted else await self._next_task()
                if task is not None:
                    grant = Grant.of(task)
                    self._held[task.id] = grant
                    self._count_hands()
                    group.create_task(self._work(grant))

    def not_ready(self) -> str:
        """Why no job can run here now, in a sentence; empty when one can."""
        if self._stages.settings.policy is None:
            return "site.toml has no [policy]: nothing runs here"
        if not self._session.connected:
            return self._waiting.sentence or "the coordinator has not answered yet"
        if any(grant.progress.stage == agent_pb2.STAGE_WAITING_FOR_DISK for grant in self._held.values()):
            return self._disk.sentence or disk_is_full().message
        return self._disk.sentence or self._stages.hold.sentence

    def show_status(self) -> None:
        """Metrics and the status file, from the state as it is now."""
        metrics = self._stages.metrics
        metrics.connected.set(self._session.connected)
        metrics.certificate_expiry.set(self._session.identity.expires.timestamp())
        stages = [grant.progress.stage for grant in self._held.values()]
        metrics.set_stage(STAGES[max(stages, default=0)])
        with self._disk.tried("Looking at the disk"):
            metrics.disk_spare.set(shutil.disk_usage(self._stages.home.path).free)
        with self._disk.tried("Writing the status file"):
            self._status.write(
                connected=self._session.connected,
                waits_for=self._waiting.sentence,
                not_ready=self.not_ready(),
                hold=self._stages.hold.sentence,
                tasks=[
                    {
                        "job": grant.work.job_id,
                        "round": grant.work.round,
                        "kind": grant.work.kind,
                        "stage": STAGES[grant.progress.stage],
                        "done": grant.progress.done,
                        "total": grant.progress.total,
                        "unit": grant.progress.unit,
                    }
                    for grant in self._held.values()
                ],
            )

    def _count_hands(self) -> None:
        """More work is wanted while all that is in hand waits for a person."""
        if all(grant.asking for grant in self._held.values()):
            self._wants_work.set()
        else:
            self._wants_work.clear()

    # --- leases

    async def _next_task(self) -> agent_pb2.Task | None:
        try:
            answer = await self._session.patiently(self._ask_for_work)
        except SilotuneError as error:
            # Revoked, expired, or of another version: a person has to act, so the agent waits and says so.
            self._waiting.say(str(error))
            self.show_status()
            await asyncio.sleep(REFUSED_PAUSE_SECONDS)
            return None
        if answer.HasField("task"):
            return answer.task
        self._waiting.say(answer.sentence)
        return None

    async def _ask_for_work(self, **options: Any) -> agent_pb2.LeaseTaskResponse:
        self.show_status()
        with self._disk.tried("Looking at the agent's home"):
            self._info = await asyncio.to_thread(self._stages.info)
        states, keeps = self._stages.job_states, []
        with self._disk.tried("Looking at the agent's home"):
            keeps = await asyncio.to_thread(states.jobs)
        holding = options.pop("holding", self._held)
        answer = await self._session.lease(self._info, holding=holding, keeps=keeps, **options)
        if ended := set(answer.ended) - {grant.work.job_id for grant in self._held.values()}:
            await asyncio.to_thread(states.drop, ended)
        return answer

    async def _regain(self, grant: Grant, *, generation: int) -> bool:
        """After this generation was fenced: whether the same work is granted to this agent under a newer one."""
        async with grant.regaining:
            if grant.task.generation != generation:
                return True
            others = [task_id for task_id in self._held if task_id != grant.task.id]
            answer = await self._session.patiently(
                lambda: self._ask_for_work(holding=others, wait_seconds=REGAIN_WAIT_SECONDS)
            )
            if not answer.HasField("task"):
                return False
            if work_of(answer.task) != grant.work:
                self._granted.append(answer.task)
                return False
            del self._held[grant.task.id]
            grant.task = answer.task
            self._held[grant.task.id] = grant
            grant.log.info("The lease was granted anew; the work goes on.")
            return True

    async def _under_lease(self, grant: Grant, operation: Callable[[], Awaitable[Answer]]) -> Answer:
        """`operation`, repeated while its errors are retryable and while a fenced lease can be regained."""
        for _ in range(REGRANTS):
            generation = grant.task.generation
            try:
                return await self._session.patiently(lambda: self._noting(grant, operation))
            except (LeaseFenced, NotFound) as error:
                if not await self._regain(grant, generation=generation):
                    raise LeaseLost(str(error)) from error
        raise Conflict("The lease of this task was replaced again and again.", hint="Do two agents use one identity?")

    async def _noting(self, grant: Grant, operation: Callable[[], Awaitable[Answer]]) -> Answer:
        try:
            with self._disk.noted(TRANSFER):
                return await operation()
        except Unavailable:
            if self._session.sending.closed():
                now = grant.progress
                grant.at(agent_pb2.STAGE_PAUSED, done=now.done, total=now.total, unit=now.unit)
            raise

    async def _heartbeats(self, grant: Grant) -> str:
        """Renews the lease until the work is not wanted any more; returns why."""
        said = False
        while True:
            generation = grant.task.generation
            request = agent_pb2.HeartbeatRequest(task_id=grant.task.id, generation=generation, progress=grant.progress)
            lease_seconds = grant.task.lease_seconds
            try:
                answer = await self._session.heartbeat(request)
            except (LeaseFenced, NotFound) as error:
                if not await self._regain(grant, generation=generation):
                    return error.message
            except SilotuneError as error:
                self._waiting.say(f"{error} The work goes on meanwhile.")
                said = True
            else:
                if said:
                    self._waiting.clear()
                said = False
                if not answer.proceed:
                    return answer.reason
                lease_seconds = answer.lease_seconds or lease_seconds
            self.show_status()
            await self._pause(grant, seconds=min(lease_seconds / 3, BEAT_SECONDS))

    async def _pause(self, grant: Grant, *, seconds: float) -> None:
        """Until the next heartbeat is due: a new stage is told soon, but a fast task does not beat at each of them."""
        await asyncio.sleep(min(seconds, STAGE_BEAT_SECONDS))
        try:
            async with asyncio.timeout(max(0.0, seconds - STAGE_BEAT_SECONDS)):
                await grant.stage_changed.wait()
        except TimeoutError:
            pass
        grant.stage_changed.clear()

    # --- one task

    async def _work(self, grant: Grant) -> None:
        grant.log.info("A task was granted.")
        beats = asyncio.create_task(self._heartbeats(grant))
        steps = asyncio.create_task(self._outcome(grant))
        try:
            await asyncio.wait({beats, steps}, return_when=asyncio.FIRST_COMPLETED)
            if steps.done():
                # The answer to the finish says whether it counts; a beat that crosses it would only confuse.
                await _cancelled(beats)
                await self._finish(grant, steps.result())
            else:
                grant.log.info("The task is stopped.", reason=beats.result())
                await _cancelled(steps)
        except LeaseLost as lost:
            grant.log.info("The task is stopped.", reason=str(lost))
        except SilotuneError as error:
            # The coordinator does not talk to this agent any more. What is finished waits in the journal.
            grant.log.error("The result could not be handed in.", reason=error.message, hint=error.hint)
        finally:
            await _cancelled(beats)
            await _cancelled(steps)
            self._held.pop(grant.task.id, None)
            self._count_hands()
            for what in (TASK, TRANSFER):
                self._disk.forget(what)
            held = [other.work for other in self._held.values()]
            with self._disk.tried("Removing old task directories"):
                await asyncio.to_thread(self._stages.journal.prune, held=held, seen=grant.work)
            self.show_status()

    async def _outcome(self, grant: Grant) -> Outcome:
        """What is reported for the task. LeaseLost when nobody wants to hear it."""
        stages = self._stages
        try:
            spec = await stages.approve(grant, on_ask=self._count_hands)
            self._count_hands()
            return await self._session.patiently(lambda: self._compute(grant, spec))
        except Refused as refused:
            grant.log.warning("The site declines the task.", reason=str(refused))
            return agent_pb2.Declined(reason=stages.without_paths(str(refused)))
        except SilotuneError as error:
            grant.log.error("The work failed.", reason=error.message, hint=error.hint)
            return failed(error)
        except LeaseLost:
            raise
        except Exception as error:
            # A disk that fails, or a defect of ours, must be reported, not end the daemon.
            grant.log.exception("The work failed unexpectedly.")
            return failed_by_surprise(error)

    async def _compute(self, grant: Grant, spec: Any) -> Outcome:
        """One attempt. OutOfSpace when this machine's disk is full; what was reached is in the journal."""
        try:
            with self._disk.noted(TASK), full_disk_waits():
                return await self._steps(grant, spec)
        except OutOfSpace:
            grant.at(agent_pb2.STAGE_WAITING_FOR_DISK)
            raise

    async def _steps(self, grant: Grant, spec: Any) -> Outcome:
        stages = self._stages
        seconds: dict[str, float] = {}
        entry = await asyncio.to_thread(stages.journal.open, grant.work, generation=grant.task.generation)
        adopted = await asyncio.to_thread(stages.journal.adopt, entry)
        if adopted is None:
            entry, result, seconds["fetch"] = await stages.run(
                grant, spec, entry, device=self._device, under_lease=self._under_lease
            )
            if grant.first_step_seconds is not None:
                seconds["first_step"] = grant.first_step_seconds
        else:
            entry, result = adopted
            grant.log.info("The finished result of an earlier grant is offered again.", **entry.update_facts())
        began = time.monotonic()
        await stages.upload(grant, entry, under_lease=self._under_lease)
        seconds["upload"] = time.monotonic() - began
        outcome = succeeded(grant, spec, entry, result, seconds=seconds)
        for stage, spent in outcome.seconds.items():
            stages.metrics.task_seconds.labels(grant.work.kind, stage).observe(spent)
        stages.metrics.train_steps.inc(result.steps)
        return outcome

    async def _finish(self, grant: Grant, outcome: Outcome) -> None:
        """Reports the outcome until it is answered, and only then forgets the work."""
        field = type(outcome).__name__.lower()  # succeeded | failed | declined

        def attempt() -> Awaitable[agent_pb2.FinishTaskResponse]:
            request = agent_pb2.FinishTaskRequest(task_id=grant.task.id, generation=grant.task.generation)
            getattr(request, field).CopyFrom(outcome)
            return self._session.finish(request)

        try:
            answer = await self._under_lease(grant, attempt)
        except (InvalidInput, AlreadyExists) as error:
            grant.log.error("The coordinator refused the result.", reason=error.message, hint=error.hint)
        else:
            told: dict[str, str] = {"fate": agent_pb2.Fate.Name(answer.fate).removeprefix("FATE_").lower()}
            if isinstance(outcome, agent_pb2.Succeeded):
                told["digest"] = outcome.manifest.blob.digest
            if answer.reason:
                told["reason"] = answer.reason
            grant.log.info(f"The task {field}.", **told)
        self._stages.metrics.tasks_finished.labels(grant.work.kind, field).inc()
        await asyncio.to_thread(self._stages.journal.remove, grant.work)

    async def _watch_hold(self) -> None:
        hold = self._stages.hold
        while True:
            with self._disk.tried("Looking for a pause"):
                if hold.look(now=datetime.now()):
                    log.info(hold.sentence or "The site works again.")
                    self.show_status()
            if hold.sentence and not self._device.locked():
                # Nothing runs in it, but what it keeps warm is memory of the device.
                async with self._device:
                    await self._stages.runner.close()
            await asyncio.sleep(HOLD_LOOK_SECONDS)

    async def _renew_certificate(self) -> None:
        said = ""
        while True:
            if self._session.identity.renewal_due(now=utc_now()):
                try:
                    with self._disk.tried("Renewing the certificate"):
                        identity = await self._session.renew()
                        log.info("The certificate was renewed.", valid_until=f"{identity.expires:%Y-%m-%d %H:%M} UTC")
                except SilotuneError as error:
                    if error.message != said:
                        log.warning("The certificate could not be renewed yet.", reason=error.message)
                    said = error.message
            await asyncio.sleep(RENEWAL_CHECK_SECONDS)


async def _cancelled(task: asyncio.Task[Any]) -> None:
    """Returns when the task has ended; its own errors are its caller's business."""
    task.cancel()
    await asyncio.wait({task})
