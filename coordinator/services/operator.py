"""OperatorService: what the operator's certificate may ask, translated to the store and its views."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Callable

import structlog

from coordinator.ca import CertificateAuthority
from coordinator.rounds.state import Evaluation
from coordinator.services import views
from coordinator.services.forecast import estimates, warnings
from coordinator.services.wire import Caller
from coordinator.storage.base_models import File
from coordinator.storage.blobs import BlobStore
from coordinator.storage.store import Store
from coordinator.storage.views import JobRecord
from protos import jobspec
from protos.digests import check_digest
from protos.errors import InvalidInput
from protos.identity import Role, check_name
from protos.model_files import BASE_MODEL_NAME, check_base_file
from protos.v1 import operator_pb2 as pb
from protos.v1.manifest_pb2 import BlobRef

DEFAULT_ROUNDS, MAX_ROUNDS = 100, 1000
# Below gRPC's limit of 4 MiB for one message.
MAX_RESPONSE_BYTES = 3 << 20
# All of them are in each task that may need them.
MAX_BASE_FILES = 1000
DEFAULT_INVITATION_SECONDS, MAX_INVITATION_SECONDS = 3600.0, 7 * 86_400.0

_log = structlog.get_logger("operator")


class OperatorService:
    """Blocking work runs in threads; what the controller must know at once is told to it by `wake_controller`."""

    def __init__(
        self,
        store: Store,
        *,
        blobs: BlobStore,
        authority: CertificateAuthority,
        enrollment_address: str,
        wake_controller: Callable[[], None],
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._authority = authority
        self._enrollment_address = enrollment_address
        self._wake_controller = wake_controller

    # --- jobs

    async def submit_job(self, request: pb.SubmitJobRequest, caller: Caller) -> pb.SubmitJobResponse:
        spec = jobspec.from_json(request.spec_json)
        response = await asyncio.to_thread(self._forecast, spec)
        if not request.dry_run:
            slug = re.sub(r"[^a-z0-9]+", "-", spec.name.lower()).strip("-")[:40]
            response.job_id = await asyncio.to_thread(
                self._store.jobs.create,
                spec,
                job_id=f"{slug}-{secrets.token_hex(3)}",
                submit_token=request.submit_token[:128],
                now_unix_seconds=time.time(),
            )
            _log.info("a job was submitted", job=response.job_id, operator=caller.identity.name)
            self._wake_controller()
        return response

    def _forecast(self, spec: jobspec.JobSpec) -> pb.SubmitJobResponse:
        sites, now = self._store.sites.all(), time.time()
        return pb.SubmitJobResponse(
            estimates=estimates(spec, sites=sites),
            warnings=warnings(
                spec,
                sites=sites,
                spare_bytes=self._blobs.spare_bytes(),
                now_unix_seconds=now,
                is_served=self._store.base_models.serves(spec),
            ),
        )

    async def list_jobs(self, _request: pb.ListJobsRequest, _caller: Caller) -> pb.ListJobsResponse:
        jobs = await asyncio.to_thread(self._store.views.jobs)
        return pb.ListJobsResponse(jobs=[views.job(record) for record in jobs])

    async def get_job(self, request: pb.GetJobRequest, _caller: Caller) -> pb.GetJobResponse:
        return await asyncio.to_thread(self._get_job, request)

    def _get_job(self, request: pb.GetJobRequest) -> pb.GetJobResponse:
        found = self._store.views.job(request.job)
        rounds = self._store.views.rounds(found.id, last=min(request.last_rounds or DEFAULT_ROUNDS, MAX_ROUNDS))
        first = rounds[0].number if rounds else 0
        evaluations = self._store.views.evaluations(found.id, since_version=first)
        if found.best_version is not None and found.best_version < first:
            evaluations = self._evaluations_of(found, version=found.best_version) + evaluations
        response = pb.GetJobResponse(
            job=views.job(found),
            rounds=[views.round_(record) for record in rounds],
            tasks=[views.task(task) for task in self._store.views.tasks(found.id, round_number=found.round)],
            evaluations=[views.evaluation(evaluation) for evaluation in evaluations],
            spec_json=found.spec.canonical_json,
        )
        while response.ByteSize() > MAX_RESPONSE_BYTES and len(response.rounds) > 1:
            del response.rounds[: len(response.rounds) // 2]
        return response

    async def list_events(self, request: pb.ListEventsRequest, _caller: Caller) -> pb.ListEventsResponse:
        return await asyncio.to_thread(self._list_events, request)

    def _list_events(self, request: pb.ListEventsRequest) -> pb.ListEventsResponse:
        job_id = self._store.views.job(request.job).id
        events = self._store.views.events(job_id, after_id=request.after_id)
        return pb.ListEventsResponse(events=[views.event(record) for record in events])

    async def control_job(self, request: pb.ControlJobRequest, caller: Caller) -> pb.ControlJobResponse:
        if request.action not in pb.JobAction.values() or request.action == pb.JOB_ACTION_UNSPECIFIED:
            raise InvalidInput("The request does not say what to do with the job.")
        action = pb.JobAction.Name(request.action).removeprefix("JOB_ACTION_").lower()
        found = await asyncio.to_thread(self._control, request.job, action, request.site)
        _log.info(f"a job was told to {action}", job=found.id, operator=caller.identity.name)
        self._wake_controller()
        return pb.ControlJobResponse(job=views.job(found))

    def _control(self, job: str, action: str, site: str) -> JobRecord:
        job_id = self._store.views.job(job).id
        self._store.jobs.control(job_id, action=action, site=site, now_unix_seconds=time.time())
        return self._store.views.job(job_id)

    async def get_model(self, request: pb.GetModelRequest, _caller: Caller) -> pb.GetModelResponse:
        version = request.version if request.HasField("version") else None
        return await asyncio.to_thread(self._get_model, request.job, version)

    def _get_model(self, job: str, version: int | None) -> pb.GetModelResponse:
        found = self._store.views.job(job)
        model = self._store.views.model(found.id, version=version)
        contributors = {part.site for part in model.contributions}
        rounds = self._store.views.rounds(found.id, last=1, until=model.version)
        updates = [update for record in rounds if record.number == model.version for update in record.updates]
        return pb.GetModelResponse(
            job_id=found.id,
            version=model.version,
            model=BlobRef(digest=model.digest, size=model.size),
            files=views.file_refs(model.files),
            base_digest=found.base_digest,
            evaluations=[
                views.evaluation(each)
                for version in sorted({model.version, _last_measured(found)})
                for each in self._evaluations_of(found, version=version)
            ],
            contributors=[views.update(update) for update in updates if update.site in contributors],
            spec_json=found.spec.canonical_json,
        )

    def _evaluations_of(self, found: JobRecord, *, version: int) -> list[Evaluation]:
        return self._store.views.evaluations(found.id, version=version)

    # --- base models

    async def add_base_model(self, request: pb.AddBaseModelRequest, caller: Caller) -> pb.AddBaseModelResponse:
        if not BASE_MODEL_NAME.fullmatch(request.name):
            raise InvalidInput(f"{request.name[:80]!r} is not a model name.", hint="For example org/model-name.")
        if len(request.files) > MAX_BASE_FILES:
            raise InvalidInput(f"A base model of {len(request.files)} files; {MAX_BASE_FILES} at most.")
        files = tuple(
            (check_base_file(file.name), check_digest(file.blob.digest), file.blob.size) for file in request.files
        )
        response = await asyncio.to_thread(self._add_base_model, request.name, files)
        _log.info("a base model was added", model=request.name, missing=len(response.missing))
        return response

    def _add_base_model(self, name: str, files: tuple[File, ...]) -> pb.AddBaseModelResponse:
        # Announced before it is looked for: from then on nobody deletes its blobs.
        self._store.base_models.announce(name, files, complete=None)
        missing = [file for file in files if self._blobs.size(file[1]) != file[2]]
        digest = self._store.base_models.announce(name, files, complete=not missing)
        return pb.AddBaseModelResponse(digest=digest, missing=views.file_refs(missing))

    async def list_base_models(self, _request: pb.ListBaseModelsRequest, _caller: Caller) -> pb.ListBaseModelsResponse:
        rows = await asyncio.to_thread(self._store.base_models.all)
        return pb.ListBaseModelsResponse(models=[views.base_model(row) for row in rows])

    async def remove_base_model(self, request: pb.RemoveBaseModelRequest, caller: Caller) -> pb.RemoveBaseModelResponse:
        await asyncio.to_thread(self._store.base_models.remove, request.name)
        _log.info("a base model was removed", model=request.name, operator=caller.identity.name)
        return pb.RemoveBaseModelResponse()

    # --- sites

    async def invite_site(self, request: pb.InviteSiteRequest, caller: Caller) -> pb.InviteSiteResponse:
        name = check_name(request.name)
        token = self._authority.token(name, enrollment_address=self._enrollment_address)
        now = time.time()
        expires = now + min(request.valid_seconds or DEFAULT_INVITATION_SECONDS, MAX_INVITATION_SECONDS)
        await asyncio.to_thread(
            self._store.sites.invite,
            name,
            role=Role.HOUSE if request.house else Role.SITE,
            secret_hash=token.secret_hash,
            expires_unix_seconds=expires,
            now_unix_seconds=now,
        )
        _log.info("a site was invited", site=name, operator=caller.identity.name)
        return pb.InviteSiteResponse(token=token.encode(), expires_unix_seconds=expires)

    async def list_sites(self, _request: pb.ListSitesRequest, _caller: Caller) -> pb.ListSitesResponse:
        rows, now = await asyncio.to_thread(self._store.sites.all), time.time()
        paused = await asyncio.to_thread(self._store.views.paused_sites)
        return pb.ListSitesResponse(
            sites=[views.site(row, paused=row.name in paused, now_unix_seconds=now) for row in rows]
        )

    async def revoke_site(self, request: pb.RevokeSiteRequest, caller: Caller) -> pb.RevokeSiteResponse:
        await asyncio.to_thread(self._store.sites.revoke, request.name)
        _log.warning("a site was revoked", site=request.name, operator=caller.identity.name)
        self._wake_controller()
        return pb.RevokeSiteResponse()


def _last_measured(found: JobRecord) -> int:
    """The newest version that is measured: an export says how much worse than its own it is."""
    head, every = found.head_version or 0, found.spec.evaluation.every
    return head if found.spec.is_evaluated(head) else head - head % every
