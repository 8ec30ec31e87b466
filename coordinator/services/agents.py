"""AgentService: what a site's agent asks and reports, translated to the store. The decisions are elsewhere: which task
is whose in storage/work.py, what a round does next in rounds/machine.py, what an update may contain in
aggregation/admission.py.

Every call may be repeated, because an agent that hears nothing asks again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial

import structlog
from google.protobuf.json_format import MessageToDict

from coordinator.ca import CertificateAuthority, utc_now
from coordinator.observe import Metrics
from coordinator.rounds.state import Fate, Task, TaskState
from coordinator.services import results, views
from coordinator.services.doorbell import Board, Doorbell
from coordinator.services.wire import Caller
from coordinator.storage.blobs import BlobStore
from coordinator.storage.grants import Grant
from coordinator.storage.store import Store
from coordinator.storage.work import Result
from protos import jobspec
from protos.digests import DIGEST, digest_of
from protos.encodings import block_of
from protos.errors import InvalidInput, LeaseFenced
from protos.metrics import METRICS, check_numbers
from protos.v1 import agent_pb2 as pb
from protos.v1.manifest_pb2 import FORM_DELTA, BlobRef, Manifest
from protos.versions import check_versions

READERS = 2
MAX_WAIT_SECONDS = 30.0
LOOK_SECONDS = 1.0
# A site that says nothing new is noted as seen at most this often: each note is a write to the database.
SEEN_EVERY_SECONDS = 10.0
MAX_AGENT_INFO_BYTES = 64 << 10
MAX_REASON_CHARACTERS = 500
MAX_KEPT_JOBS = 1000

_log = structlog.get_logger("agents")


class AgentService:
    def __init__(
        self,
        store: Store,
        *,
        blobs: BlobStore,
        authority: CertificateAuthority,
        doorbell: Doorbell,
        wake_controller: Callable[[], None],
        metrics: Metrics,
        version: str,
        lease_seconds: float,
        client_days: float,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._authority = authority
        self._doorbell = doorbell
        self._wake_controller = wake_controller
        self._metrics = metrics
        self._version = version
        self._lease_seconds = lease_seconds
        self._client_days = client_days
        self._board = Board(store.work.sites_with_work)
        self._live_jobs = Board(store.work.live_jobs)
        self._seen: dict[str, tuple[float, pb.AgentInfo | None]] = {}
        self._checks: dict[tuple[str, int], asyncio.Future[Result | str]] = {}
        # Whole updates are read in threads of their own: heartbeats and leases share the others.
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="admission")

    # --- asking for work

    async def lease_task(self, request: pb.LeaseTaskRequest, caller: Caller) -> pb.LeaseTaskResponse:
        site = caller.identity.name
        if request.agent.ByteSize() > MAX_AGENT_INFO_BYTES:
            raise InvalidInput(f"The agent says {request.agent.ByteSize()} bytes about itself; too much to keep.")
        check_versions(agent=request.agent.version, coordinator=self._version)
        await self._see(site, agent=request.agent)
        until = time.monotonic() + min(max(0.0, request.wait_seconds), MAX_WAIT_SECONDS)
        holding = tuple(request.holding[:100])
        ended_before = ended = await self._ended(request)
        lease = partial(self._store.work.lease, site, lease_seconds=self._lease_seconds, holding=holding)
        while True:
            grant = None
            if not self._doorbell.closed and await self._board.has(site):
                grant = await asyncio.to_thread(lease)
            if grant is not None:
                self._wake_controller()
                return pb.LeaseTaskResponse(task=self._task(grant), ended=ended)
            left, ended = until - time.monotonic(), await self._ended(request)
            # An agent that was told before and could not clear away must not ask again and again.
            if self._doorbell.closed or left <= 0 or ended != ended_before:
                why = "The coordinator is restarting." if self._doorbell.closed else "No job needs this site now."
                return pb.LeaseTaskResponse(sentence=why, ended=ended)
            await self._doorbell.wait(seconds=min(left, LOOK_SECONDS))

    async def _ended(self, request: pb.LeaseTaskRequest) -> list[str]:
        """Of the jobs that the agent keeps something of: those that will not go on, or that nobody here knows."""
        keeps = request.keeps[:MAX_KEPT_JOBS]
        live = await asyncio.gather(*(self._live_jobs.has(job) for job in keeps))
        return [job for job, goes_on in zip(keeps, live, strict=True) if not goes_on]

    def _task(self, grant: Grant) -> pb.Task:
        task, spec = grant.task, jobspec.from_json(grant.spec_json)
        model = BlobRef(digest=grant.model_digest, size=grant.model_size) if grant.model_digest else None
        encoded = None
        if grant.encoded_digest:
            down, block = spec.encoding.down, spec.encoding.block
            encoded = Manifest(
                blob=BlobRef(digest=grant.encoded_digest, size=grant.encoded_size),
                encoding=f"ENCODING_{down.upper()}",
                form=FORM_DELTA,
                block=block_of(down, block),
            )
        return pb.Task(
            id=task.id,
            job_id=task.job_id,
            round=task.round,
            kind=f"TASK_KIND_{task.kind.value}",
            spec_json=grant.spec_json,
            spec_hash=digest_of(grant.spec_json.encode()),
            base_digest=grant.base_digest,
            version=task.version,
            model=model,
            seed=jobspec.task_seed(spec.seed, round_number=task.round, site=task.site),
            split=task.split,
            generation=task.generation,
            lease_seconds=self._lease_seconds,
            counted_round=grant.counted_round,
            encoded=encoded,
            initial=grant.initial_digest,
            base_files=views.file_refs(grant.base_files),
            members=[
                pb.Member(blob=BlobRef(digest=part.digest, size=part.size), weight=part.weight)
                for part in grant.members
            ],
        )

    async def heartbeat(self, request: pb.HeartbeatRequest, caller: Caller) -> pb.HeartbeatResponse:
        site, progress = caller.identity.name, request.progress
        stage = pb.Stage.Name(progress.stage).removeprefix("STAGE_") if progress.stage in pb.Stage.values() else ""
        if progress.unit not in ("", "steps", "bytes", "rows"):
            raise InvalidInput(f"{progress.unit[:40]!r} is not a unit of progress.")
        await self._see(site, agent=None)
        proceed, reason = await asyncio.to_thread(
            self._store.work.heartbeat,
            request.task_id,
            site=site,
            generation=request.generation,
            progress={
                "stage": "" if stage == "UNSPECIFIED" else stage,
                "done": progress.done,
                "total": progress.total,
                "unit": progress.unit,
                "metrics": check_numbers(progress.metrics, allowed=METRICS),
            },
            lease_seconds=self._lease_seconds,
        )
        return pb.HeartbeatResponse(proceed=proceed, reason=reason, lease_seconds=self._lease_seconds)

    async def _see(self, site: str, *, agent: pb.AgentInfo | None) -> None:
        at, known = self._seen.get(site, (float("-inf"), None))
        now = time.monotonic()
        said = None if agent is None else _lasting(agent)
        # What has changed is noted at once: a site that has added rows may train on them in this very task.
        if now - at >= SEEN_EVERY_SECONDS or said not in (None, known):
            facts = None if agent is None else MessageToDict(agent, preserving_proto_field_name=True)
            await asyncio.to_thread(self._store.sites.see, site, agent=facts, now_unix_seconds=time.time())
            self._seen[site] = now, said or known

    # --- reporting

    async def finish_task(self, request: pb.FinishTaskRequest, caller: Caller) -> pb.FinishTaskResponse:
        outcome = request.WhichOneof("outcome")
        if outcome is None:
            raise InvalidInput("The report says neither that the task succeeded nor that it did not.")
        if outcome == "succeeded":
            response = await self._succeeded(request, site=caller.identity.name)
        else:
            response = await self._not_succeeded(request, site=caller.identity.name, outcome=outcome)
        self._wake_controller()
        return response

    async def _not_succeeded(self, request: pb.FinishTaskRequest, *, site: str, outcome: str) -> pb.FinishTaskResponse:
        state = TaskState.FAILED if outcome == "failed" else TaskState.DECLINED
        told = f"{request.failed.reason} {request.failed.hint}" if outcome == "failed" else request.declined.reason
        reason = "".join(c if c.isprintable() else " " for c in told).strip()[:MAX_REASON_CHARACTERS]
        await asyncio.to_thread(
            self._store.work.fail,
            request.task_id,
            site=site,
            generation=request.generation,
            state=state,
            reason=reason or "no reason was given",
        )
        _log.info(f"a task {outcome}", site=site, task=request.task_id, reason=reason)
        return pb.FinishTaskResponse(reason=reason)

    async def _succeeded(self, request: pb.FinishTaskRequest, *, site: str) -> pb.FinishTaskResponse:
        task_id, generation, work = request.task_id, request.generation, self._store.work
        try:
            task = await asyncio.to_thread(work.live, task_id, site=site, generation=generation)
        except LeaseFenced as fenced:
            # A repeat of a report that was taken, or one that is too late: the store tells them apart.
            try:
                result = results.parse(request.succeeded)
            except InvalidInput:
                raise fenced from None
        else:
            checked = await self._check(task, request.succeeded)
            if isinstance(checked, str):
                await self._reject(task, request.succeeded, reason=checked)
                return self._answer(Fate.REJECTED, checked, request=request, site=site)
            result = checked
        finish = partial(work.finish, task_id, site=site, generation=generation, result=result)
        fate, reason = await asyncio.to_thread(finish, sealed_size=self._blobs.size)
        return self._answer(fate, reason, request=request, site=site)

    async def _check(self, task: Task, succeeded: pb.Succeeded) -> Result | str:
        """The result, or why it is rejected. A repeat that comes while a large update is still read waits for that."""
        key = (task.id, task.generation)
        check = self._checks.get(key)
        if check is None:
            read = partial(results.check, succeeded, task=task, store=self._store, blobs=self._blobs)
            check = asyncio.get_running_loop().run_in_executor(self._readers, read)
            self._checks[key] = check
            check.add_done_callback(lambda _: self._checks.pop(key, None))
        return await asyncio.shield(check)

    async def _reject(self, task: Task, succeeded: pb.Succeeded, *, reason: str) -> None:
        blob = succeeded.manifest.blob
        await asyncio.to_thread(
            self._store.work.reject,
            task.id,
            site=task.site,
            generation=task.generation,
            result=Result(digest=blob.digest if DIGEST.fullmatch(blob.digest) else "", size=blob.size),
            reason=reason,
        )

    def _answer(self, fate: Fate, reason: str, *, request: pb.FinishTaskRequest, site: str) -> pb.FinishTaskResponse:
        if request.succeeded.HasField("manifest"):
            self._metrics.updates.labels(fate=fate.value.lower()).inc()
        _log.info(f"a result was {fate.value.lower()}", site=site, task=request.task_id, reason=reason)
        return pb.FinishTaskResponse(fate=f"FATE_{fate.value}", reason=reason)

    # --- staying enrolled

    async def renew_certificate(
        self, request: pb.RenewCertificateRequest, caller: Caller
    ) -> pb.RenewCertificateResponse:
        return await asyncio.to_thread(self._renew, request.csr, caller)

    def _renew(self, csr: bytes, caller: Caller) -> pb.RenewCertificateResponse:
        row = self._store.sites.get(caller.identity.name)
        # A clock that was set back since must not give a certificate from before the enrollment.
        enrolled = datetime.fromtimestamp(row.enrolled_unix_seconds, UTC) if row else utc_now()
        certificate = self._authority.sign_request(
            csr, identity=caller.identity, valid_days=self._client_days, now=max(utc_now(), enrolled)
        )
        self._store.sites.record_certificate(
            caller.identity.name, serial=certificate.serial, expires_unix_seconds=certificate.expires_unix_seconds
        )
        _log.info("a certificate was renewed", site=caller.identity.name, serial=certificate.serial)
        return pb.RenewCertificateResponse(certificate=certificate.pem)


def _lasting(agent: pb.AgentInfo) -> pb.AgentInfo:
    """What an agent says of itself, without what is another number each time."""
    said = pb.AgentInfo()
    said.CopyFrom(agent)
    said.ClearField("free_disk_bytes")
    return said
