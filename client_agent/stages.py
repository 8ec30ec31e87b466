"""What the agent does with one task, stage by stage: approve, fetch, run, upload. The loop owns the lease.

Each stage may be cut off anywhere. What it has finished is in the journal or on the coordinator, and the next grant of
the same work goes on from there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from client_agent import facts, reports, transfers
from client_agent.base_fetch import digest_for, fetch_missing
from client_agent.fetching import Fetched, Fetching, UnderLease
from client_agent.grant import Grant
from client_agent.hold import Hold
from client_agent.home import Home
from client_agent.job_states import JobStates
from client_agent.journal import UNKNOWN_KIND, Entry, Journal, check_work
from client_agent.models import Models
from client_agent.observe import AgentMetrics
from client_agent.policy import Answer, Approvals, decide, may_read, parse_spec
from client_agent.runner import Finished, Paused, Runner
from client_agent.session import Session
from client_agent.settings import SiteSettings
from client_agent.taskdir import (
    TaskResult,
    TaskSpec,
    VersionNeeded,
    checkpoint_step,
    disk_is_full,
    read_result,
    write_spec,
)
from protos.errors import InvalidInput, NotFound
from protos.jobspec import BaseModelRef, JobSpec, Synthetic
from protos.metrics import METRICS
from protos.v1 import agent_pb2
from protos.v1.manifest_pb2 import BlobRef

APPROVAL_POLL_SECONDS = 2.0
UNITS = ("steps", "bytes", "rows")

log = structlog.get_logger()

TRAINER_STAGES = {
    "loading": agent_pb2.STAGE_LOADING,
    "training": agent_pb2.STAGE_TRAINING,
    "evaluating": agent_pb2.STAGE_EVALUATING,
    "waiting_for_disk": agent_pb2.STAGE_WAITING_FOR_DISK,
}


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
        self.fetching = Fetching(transfers.BlobCache(self.home.blobs), self.session, self.metrics)
        self.journal = Journal(self.home.tasks)
        self.job_states = JobStates(self.home.jobs)
        # Jobs whose version 0 this site builds differently than the site that made it, so that no difference helps.
        self._wants_whole: set[str] = set()
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
        base_digest, distills = await self._check_base_model(grant, spec), grant.work.kind == "distill"
        teacher_digest = await self._check_teacher(spec.beside(grant.work.kind))
        rows = None
        if spec.data is not None and grant.work.kind != "init":
            asked = grant.work.kind == "evaluate" and self._benchmarks(spec)
            name = spec.proxy_data if distills else spec.data.name
            if self.settings.policy is not None and name not in self.settings.data and not asked:
                raise Refused(f"This site describes no data set named {name!r}.")
            rows = self.rows.get(name, None if asked else 0)
        verdict = decide(
            self.settings.policy, spec, base_digest=base_digest, data_rows=rows,
            distills=distills, teacher=spec.beside(grant.work.kind), teacher_digest=teacher_digest,
        )  # fmt: skip
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
        """The digest of this site's base model, or of what it will fetch. Refused: it has none, or not the job's."""
        if spec.base_model is None or self.settings.policy is None:
            return ""
        name, may_fetch = spec.base_model.name, self.settings.policy.fetch_base_models
        try:
            digest = await asyncio.to_thread(digest_for, grant.task, name=name, models=self.models, may_fetch=may_fetch)
        except (NotFound, InvalidInput) as error:
            raise Refused(str(error)) from error
        for wanted in (spec.base_model.digest, grant.task.base_digest):
            if wanted and wanted != digest:
                raise Refused(
                    f"This site's copy of base model {name} has the digest {digest[:12]}; "
                    f"the job was begun with {wanted[:12]}."
                )
        return digest

    async def _check_teacher(self, teacher: BaseModelRef | None) -> str:
        """The digest of this site's copy of a teacher, or of a mentor. Refused: it has none, or not the one that the
        recipe pins."""
        if not teacher or self.settings.policy is None:
            return ""
        try:
            digest = (await asyncio.to_thread(self.models.current, teacher.name)).digest
        except (NotFound, InvalidInput) as error:
            raise Refused(str(error)) from error
        if teacher.digest not in (None, digest):
            raise Refused(
                f"This site's copy of base model {teacher.name} has the digest {digest[:12]}; "
                f"the recipe pins {teacher.digest[:12]}."
            )
        return digest

    # --- run

    async def run(
        self, grant: Grant, spec: JobSpec, entry: Entry, *, device: asyncio.Lock, under_lease: UnderLease[Path]
    ) -> tuple[Entry, TaskResult, float]:
        """The trainer's sealed result, and the seconds that fetching took. InvalidInput with the trainer's reason when
        it fails. One task at a time has the device; others fetch and upload meanwhile."""
        began = time.monotonic()
        await fetch_missing(
            grant.task, spec, models=self.models, directory=self.home.models,
            download=lambda blob: self.fetching.blob(blob, grant, under_lease=under_lease),
        )  # fmt: skip
        # Several trainers would each have to make a version from a difference.
        whole = grant.work.job_id in self._wants_whole or self.settings.device.processes > 1
        while True:
            try:
                fetched = await self.fetching.version(grant, whole=whole, under_lease=under_lease)
                fetch_seconds = time.monotonic() - began
                return *await self._train(grant, spec, entry, fetched, device=device), fetch_seconds
            except VersionNeeded as needed:
                grant.log.warning("The whole version is fetched.", reason=str(needed))
                whole = True

    async def _train(
        self, grant: Grant, spec: JobSpec, entry: Entry, fetched: Fetched, *, device: asyncio.Lock
    ) -> tuple[Entry, TaskResult]:
        directory = self.journal.path(grant.work)
        task_spec = await asyncio.to_thread(self._task_spec, grant, spec, fetched)
        entry = await asyncio.to_thread(self.journal.restart, replace(entry, base_digest=task_spec.base_digest))
        kind = "synthetic" if isinstance(spec.task, Synthetic) else "training"
        await asyncio.to_thread(write_spec, directory, task_spec)
        if device.locked():
            # Another task is in the trainer: what was fetched is no news any more.
            grant.at(agent_pb2.STAGE_UNSPECIFIED)
        async with device:
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
            if ended.declined:
                raise Refused(ended.reason)
            if ended.needs_version:
                self._wants_whole.add(grant.work.job_id)
                raise VersionNeeded(ended.reason)
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

    def _task_spec(self, grant: Grant, spec: JobSpec, fetched: Fetched) -> TaskSpec:
        base = self.models.current(spec.base_model.name) if spec.base_model else None
        distills = grant.work.kind == "distill"
        named = spec.beside(grant.work.kind)
        teacher = self.models.current(named.name) if named else None
        data_set = self._data_set(spec.data.name) if spec.data and grant.work.kind != "init" else None
        if distills and spec.data and not may_read(self.settings.policy, spec.data.name):
            data_set = None  # Only the proxy data were asked about.
        return TaskSpec(
            task_id=grant.task.id,
            job_id=grant.work.job_id,
            round=grant.work.round,
            kind=grant.work.kind,
            spec=spec.model_dump(mode="json"),
            seed=grant.work.seed,
            split=grant.work.split,
            model_path=None if fetched.model is None else str(fetched.model),
            encoded_path=None if fetched.encoded is None else str(fetched.encoded),
            base_model_path=base.directory if base else None,
            base_digest=base.digest if base else "",
            data_set=data_set,
            device=facts.choose_device(self.settings.device, gpu=self.gpu),
            threads=self.settings.device.threads,
            processes=self.settings.device.processes,
            model_digest=grant.work.model_digest,
            site=self.session.identity.name,
            state_directory=str(self.job_states.path(grant.work.job_id)),
            counted_round=grant.task.counted_round,
            max_epochs=self.settings.policy.max_epochs if self.settings.policy else None,
            benchmarks=self._benchmarks(spec) if grant.work.kind == "evaluate" else {},
            teacher_model_path=teacher.directory if teacher else None,
            teacher_digest=teacher.digest if teacher else "",
            members=[
                {"path": str(path), "weight": member.weight}
                for path, member in zip(fetched.members, grant.task.members, strict=True)
            ],
            proxy_data_set=self._data_set(spec.proxy_data) if distills else None,
        )

    def _data_set(self, name: str) -> dict[str, Any] | None:
        """settings.DataSet as JSON of this site's data set of that name."""
        if name not in self.settings.data:
            return None
        return self.settings.data[name].at(self.home.site_file.parent).model_dump(mode="json")

    def _benchmarks(self, spec: JobSpec) -> dict[str, Any]:
        """settings.DataSet as JSON of each benchmark of the job that this site has and may read."""
        return {
            name: self._data_set(name)
            for name in spec.evaluation.benchmarks
            if name in self.settings.data and may_read(self.settings.policy, name)
        }

    def _on_progress(self, grant: Grant) -> Callable[[dict[str, Any]], None]:
        """For one run of the trainer."""
        begun = False

        def on_progress(event: dict[str, Any]) -> None:
            nonlocal begun
            metrics = reports.reportable(event.get("metrics", {}), allowed=METRICS)
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

    def without_paths(self, text: str) -> str:
        return reports.without_paths(text, home=self.home, settings=self.settings)
