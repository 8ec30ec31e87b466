"""What the agent does with one task, stage by stage: approve, fetch, run, upload. The loop owns the lease.

Each stage may be cut off anywhere. What it has finished is in the journal or on the coordinator, and the next grant of
the same work goes on from there.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import structlog

from client_agent import facts, transfers
from client_agent.grant import Grant
from client_agent.hold import Hold
from client_agent.home import Home
from client_agent.journal import UNKNOWN_KIND, Entry, Journal, check_work
from client_agent.models import Models
from client_agent.observe import AgentMetrics
from client_agent.policy import Answer, Approvals, decide, parse_spec
from client_agent.runner import Finished, Paused, Runner
from client_agent.session import Session
from client_agent.settings import DataSet, SiteSettings
from client_agent.taskdir import (
    FILES,
    UPDATE,
    TaskResult,
    TaskSpec,
    checkpoint_step,
    disk_is_full,
    read_result,
    write_spec,
)
from protos.errors import CorruptData, InvalidInput, NotFound, OutOfSpace, SilotuneError
from protos.jobspec import JobSpec, Synthetic
from protos.metrics import METRICS, STAGE_SECONDS
from protos.v1 import agent_pb2
from protos.v1.manifest_pb2 import ENCODING_RAW, FORM_VALUES, BlobRef, FileRef, Manifest

APPROVAL_POLL_SECONDS = 2.0
UNITS = ("steps", "bytes", "rows")

log = structlog.get_logger()
Answered = TypeVar("Answered")
Outcome = agent_pb2.Succeeded | agent_pb2.Failed | agent_pb2.Declined

TRAINER_STAGES = {
    "loading": agent_pb2.STAGE_LOADING,
    "training": agent_pb2.STAGE_TRAINING,
    "evaluating": agent_pb2.STAGE_EVALUATING,
    "waiting_for_disk": agent_pb2.STAGE_WAITING_FOR_DISK,
}


# Runs an operation that needs the lease, again after the lease was granted anew.
UnderLease = Callable[[Grant, Callable[[], Awaitable[Answered]]], Awaitable[Answered]]


class Refused(Exception):
    """The site does not do this task, for a reason that the operator is told."""


@dataclass
class Stages:
    """Everything that the stages use; made once, by client_agent/main.py."""

    home: Home
    settings: SiteSettings
    session: Session
    runner: Runner
    metrics: AgentMetrics
    hold: Hold
    gpu: str
    rows: dict[str, int]

    def __post_init__(self) -> None:
        self.cache = transfers.BlobCache(self.home.blobs)
        self.journal = Journal(self.home.tasks)
        self.models = Models(self.home.models_file)
        self.approvals = Approvals(self.home.approvals)

    def info(self) -> agent_pb2.AgentInfo:
        """What the agent says of itself now, with its data sets counted anew where a file has changed."""
        self.rows = facts.count_rows(self.home, self.settings, before=self.rows)
        return facts.agent_info(self.home, self.settings, gpu=self.gpu, rows=self.rows)

    # --- approve

    async def approve(self, grant: Grant, *, on_ask: Callable[[], None]) -> JobSpec:
        """The spec, once it may run here. Refused with the reason; while a person is asked, it waits.

        InvalidInput: the task is not one that a sound coordinator gives.
        """
        check_work(grant.work)
        if grant.work.kind == UNKNOWN_KIND:
            raise Refused(f"This agent ({facts.agent_version()}) is too old for this kind of task; update it.")
        spec = parse_spec(grant.task.spec_json, spec_hash=grant.task.spec_hash)
        base_digest = await self._check_base_model(grant, spec)
        rows = None
        if spec.data is not None and grant.work.kind != "init":
            if self.settings.policy is not None and spec.data.name not in self.settings.data:
                raise Refused(f"This site describes no data set named {spec.data.name!r}.")
            rows = self.rows.get(spec.data.name, 0)
        verdict = decide(self.settings.policy, spec, base_digest=base_digest, data_rows=rows)
        if verdict.answer is Answer.DENY:
            raise Refused(verdict.reason)
        if verdict.answer is Answer.ASK:
            await self._ask(grant, spec, on_ask=on_ask)
        return spec

    async def _ask(self, grant: Grant, spec: JobSpec, *, on_ask: Callable[[], None]) -> None:
        grant.at(agent_pb2.STAGE_APPROVING)
        self.approvals.ask(grant.task.spec_json, spec_hash=grant.work.spec_hash, job_name=spec.name)
        while (verdict := self.approvals.verdict(grant.work.spec_hash)) == "waiting":
            if not grant.asking:
                log.info(f"Job {spec.name} waits: silotune-agent approve {grant.work.spec_hash[:12]}")
                grant.asking = True
                on_ask()
            await asyncio.sleep(APPROVAL_POLL_SECONDS)
        grant.asking = False
        grant.at(agent_pb2.STAGE_UNSPECIFIED)
        if verdict == "denied":
            raise Refused("The site's administrator denied this job.")

    async def _check_base_model(self, grant: Grant, spec: JobSpec) -> str:
        """The digest of this site's copy of the base model. Refused when it has none, or not the job's."""
        if spec.base_model is None or self.settings.policy is None:
            return ""
        try:
            model = await asyncio.to_thread(self.models.current, spec.base_model.name)
        except (NotFound, InvalidInput) as error:
            raise Refused(str(error)) from error
        for wanted in (spec.base_model.digest, grant.task.base_digest):
            if wanted and wanted != model.digest:
                raise Refused(
                    f"This site's copy of base model {model.name} has the digest {model.digest[:12]}; "
                    f"the job was begun with {wanted[:12]}."
                )
        return model.digest

    # --- fetch

    async def fetch(self, grant: Grant, *, under_lease: UnderLease[Path]) -> Path | None:
        """The version that the task starts from; None for INIT. CorruptData after several bad arrivals."""
        if not grant.task.HasField("model"):
            return None
        blob = grant.task.model

        def progress(done: int, total: int) -> None:
            grant.at(agent_pb2.STAGE_FETCHING, done=done, total=total, unit="bytes")

        received = self.metrics.transfer_bytes.labels("down").inc
        corrupt = 0

        async def attempt() -> Path:
            nonlocal corrupt
            try:
                return await transfers.download(
                    blob,
                    cache=self.cache,
                    open_channel=self.session.open_channel,
                    progress=progress,
                    received=received,
                    pace=self.session.receiving,
                )
            except CorruptData as error:
                corrupt += 1
                if corrupt >= transfers.CORRUPT_ATTEMPTS:
                    raise InvalidInput("The model arrived damaged several times.", hint=error.hint) from error
                raise
            except OutOfSpace:
                grant.at(agent_pb2.STAGE_WAITING_FOR_DISK)
                raise

        progress(0, blob.size)
        path = await under_lease(grant, attempt)
        await asyncio.to_thread(self.cache.prune, needed={blob.digest})
        return path

    # --- run

    async def run(self, grant: Grant, spec: JobSpec, entry: Entry, *, model: Path | None) -> tuple[Entry, TaskResult]:
        """The trainer's sealed result. InvalidInput with the trainer's reason when it fails."""
        directory = self.journal.path(grant.work)
        task_spec = await asyncio.to_thread(self._task_spec, grant, spec, model=model)
        entry = await asyncio.to_thread(self.journal.restart, replace(entry, base_digest=task_spec.base_digest))
        kind = "synthetic" if isinstance(spec.task, Synthetic) else "training"
        await asyncio.to_thread(write_spec, directory, task_spec)
        await self._until_trained(grant, directory, kind=kind)
        adopted = await asyncio.to_thread(self.journal.adopt, entry)
        if adopted is None:
            raise InvalidInput("The trainer says that it is done, but left no result.")
        grant.log.info("The result is sealed.", **adopted[0].update_facts())
        return adopted

    async def _until_trained(self, grant: Grant, directory: Path, *, kind: str) -> None:
        """Runs the trainer until the result is there: again after a pause, and after a death that a checkpoint mends.

        InvalidInput with the trainer's reason when it fails; OutOfSpace when it may go on once the disk has room.
        """
        while True:
            await self._while_held(grant)
            grant.at(agent_pb2.STAGE_LOADING)
            before = await asyncio.to_thread(checkpoint_step, directory)
            try:
                ended = await self.runner.run(
                    directory, kind=kind, on_progress=self._on_progress(grant), pausing=self.hold.begun
                )
            except asyncio.CancelledError:
                if self.runner.shutting_down:
                    self._say_what_was_not_saved(grant, directory)
                raise
            # A result that is there counts, whatever became of the trainer that wrote it: nothing is trained again.
            if isinstance(ended, Finished) or await asyncio.to_thread(read_result, directory) is not None:
                grant.log.info("The trainer has finished.", steps=grant.progress.done)
                return
            if isinstance(ended, Paused):
                self._say_what_was_not_saved(grant, directory)
                continue
            saved = await asyncio.to_thread(checkpoint_step, directory)
            # Each run must get further than the one before, or a trainer that always dies would never be reported.
            if ended.died and saved > before:
                grant.log.warning("The trainer died; it goes on from its checkpoint.", reason=ended.reason, step=saved)
                continue
            if ended.full_disk:
                raise disk_is_full()
            raise InvalidInput(self.without_paths(ended.reason), hint=self.without_paths(ended.hint))

    def _say_what_was_not_saved(self, grant: Grant, directory: Path) -> None:
        """Of a training that was to be saved, and was not in time, or for want of room."""
        saved = checkpoint_step(directory)
        if grant.progress.unit == "steps" and grant.progress.done > saved and read_result(directory) is None:
            grant.log.warning(f"The training since step {saved} was not saved.", reached_step=grant.progress.done)

    async def _while_held(self, grant: Grant) -> None:
        """Returns when the trainer may run here. Until then it gives back the memory that it holds."""
        while reason := self.hold.sentence:
            await self.runner.close()
            grant.log.info("The task is paused.", reason=reason)
            now = grant.progress
            trained = now.unit == "steps"
            grant.at(
                agent_pb2.STAGE_PAUSED,
                done=now.done if trained else 0, total=now.total if trained else 0, unit="steps" if trained else "",
            )  # fmt: skip
            await self.hold.over.wait()
            grant.log.info("The task goes on.")

    def _task_spec(self, grant: Grant, spec: JobSpec, *, model: Path | None) -> TaskSpec:
        base = self.models.current(spec.base_model.name) if spec.base_model else None
        data_set: DataSet | None = None
        if spec.data is not None and grant.work.kind != "init":
            data_set = self.settings.data[spec.data.name].at(self.home.site_file.parent)
        return TaskSpec(
            task_id=grant.task.id,
            job_id=grant.work.job_id,
            round=grant.work.round,
            kind=grant.work.kind,
            spec=spec.model_dump(mode="json"),
            seed=grant.work.seed,
            split=grant.work.split,
            model_path=None if model is None else str(model),
            base_model_path=base.directory if base else None,
            base_digest=base.digest if base else "",
            data_set=data_set.model_dump(mode="json") if data_set else None,
            device=facts.choose_device(self.settings.device, gpu=self.gpu),
            threads=self.settings.device.threads,
            model_digest=grant.work.model_digest,
            site=self.session.identity.name,
        )

    def _on_progress(self, grant: Grant) -> Callable[[dict[str, Any]], None]:
        """For one run of the trainer."""
        begun = False

        def on_progress(event: dict[str, Any]) -> None:
            nonlocal begun
            metrics = _reportable(event.get("metrics", {}), allowed=METRICS)
            training = event["stage"] == "training"
            grant.at(
                TRAINER_STAGES.get(event["stage"], agent_pb2.STAGE_LOADING),
                done=int(event["done"]),
                total=int(event["total"]),
                unit=event["unit"] if event["unit"] in UNITS else "",
                metrics=metrics,
            )
            if not begun and (training or grant.work.kind != "train"):
                begun = True
                grant.log.info("The trainer begins.", resumed_step=int(event["done"]) if training else 0)
            if training and event["done"] >= 1 and grant.first_step_seconds is None:
                grant.first_step_seconds = time.monotonic() - grant.began
                self.metrics.first_step_seconds.set(grant.first_step_seconds)
            if "loss" in metrics:
                self.metrics.train_loss.set(metrics["loss"])

        return on_progress

    # --- upload

    async def upload(self, grant: Grant, entry: Entry, *, under_lease: UnderLease[None]) -> None:
        """All blobs of the result, sealed at the coordinator."""
        blobs = entry.blobs or ()
        total = sum(blob.size for blob in blobs)
        before = 0
        on_wire = 0

        def sent(count: int) -> None:
            nonlocal on_wire
            on_wire += count
            self.metrics.transfer_bytes.labels("up").inc(count)

        for blob in blobs:

            def progress(done: int, size: int, before: int = before) -> None:
                grant.at(agent_pb2.STAGE_UPLOADING, done=before + done, total=total, unit="bytes")

            def attempt(file: str = blob.file, size: int = blob.size, digest: str = blob.digest) -> Awaitable[None]:
                return transfers.upload(
                    self.journal.path(grant.work) / file,
                    BlobRef(digest=digest, size=size),
                    task_id=grant.task.id,
                    generation=grant.task.generation,
                    open_channel=self.session.open_channel,
                    progress=progress,
                    sent=sent,
                    pace=self.session.sending,
                )

            await under_lease(grant, attempt)
            before += blob.size
        if blobs:
            grant.log.info("The result was uploaded.", **entry.update_facts(), sent_bytes=on_wire)

    # --- what is reported

    def succeeded(self, grant: Grant, entry: Entry, result: TaskResult, *, seconds: dict[str, float]) -> Outcome:
        blobs = {blob.file: BlobRef(digest=blob.digest, size=blob.size) for blob in entry.blobs or ()}
        outcome = agent_pb2.Succeeded(
            examples=result.examples,
            steps=result.steps,
            metrics=_reportable(result.metrics, allowed=METRICS),
            seconds=_reportable({**result.seconds, **seconds}, allowed=STAGE_SECONDS),
        )
        if UPDATE in blobs:
            outcome.manifest.CopyFrom(
                Manifest(blob=blobs[UPDATE], encoding=ENCODING_RAW, form=FORM_VALUES, base_version=grant.work.version)
            )
        if grant.work.kind == "init":
            prefix = f"{FILES}/"
            outcome.files.extend(
                FileRef(name=file.removeprefix(prefix), blob=blob)
                for file, blob in blobs.items()
                if file.startswith(prefix)
            )
            outcome.base_digest = entry.base_digest
        for stage, spent in outcome.seconds.items():
            self.metrics.task_seconds.labels(grant.work.kind, stage).observe(spent)
        self.metrics.train_steps.inc(result.steps)
        return outcome

    def without_paths(self, text: str) -> str:
        """`text` with this site's paths replaced by what they are: a path may name a patient or a study."""
        directory = self.home.site_file.parent
        hidden = {str(self.home.path): "the agent's home"}
        for name, data_set in self.settings.data.items():
            place = data_set.at(directory)
            for path in (place.path, data_set.path, place.validation, data_set.validation, place.test, data_set.test):
                if isinstance(path, str):
                    hidden[path] = f"data set {name!r}"
        for path in sorted(hidden, key=len, reverse=True):
            text = text.replace(path, hidden[path])
        return text


def failed(error: SilotuneError) -> agent_pb2.Failed:
    return agent_pb2.Failed(reason=error.message, hint=error.hint)


def failed_by_surprise(error: Exception) -> agent_pb2.Failed:
    """Of an error that is none of ours: its text may quote anything, so only its kind leaves the site."""
    # Some errors are an OSError by descent only, a TimeoutError for one; those of a disk have a number.
    if isinstance(error, OSError) and error.errno is not None:
        return agent_pb2.Failed(reason=f"The agent could not use its disk: {error.strerror}.")
    return agent_pb2.Failed(
        reason=f"The agent failed with {type(error).__name__}.", hint="The agent's log at the site has the details."
    )


def _reportable(numbers: Mapping[str, float], *, allowed: frozenset[str]) -> dict[str, float]:
    """Only what may leave the site, and only what is a number."""
    return {name: value for name, value in numbers.items() if name in allowed and math.isfinite(value)}
