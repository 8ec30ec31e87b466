"""A stand-in for the coordinator at its gRPC door: the operator's contract over real mutual TLS, state as plain values.

The operator's commands are tested against the contract, so what is imitated is the server, never one of our classes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import grpc
import pytest
from click.testing import CliRunner, Result

from coordinator import ca
from protos import frames
from protos.channel import SERVER_OPTIONS
from protos.digests import digest_of
from protos.errors import DETAILS_KEY, Conflict, NotFound, RecipeInvalid, SilotuneError, to_details
from protos.identity import Identity, Role
from protos.v1 import agent_pb2, manifest_pb2, operator_pb2, operator_pb2_grpc, transfer_pb2


@dataclass
class Door:
    """What the commands find; a test writes the answers it wants into it."""

    authority: ca.CertificateAuthority
    folder: Path
    port: int = 0
    jobs: dict[str, operator_pb2.GetJobResponse] = field(default_factory=dict)
    models: dict[int, operator_pb2.GetModelResponse] = field(default_factory=dict)
    sites: list[operator_pb2.SiteView] = field(default_factory=list)
    events: list[operator_pb2.EventView] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    submissions: dict[str, str] = field(default_factory=dict)
    # Called with each (digest, offset) that is read, and with the frames that are about to be sent.
    on_read: Callable[[str, int], None] | None = None
    on_frame: Callable[[bytes], bytes] | None = None
    # What ListJobs is refused with.
    trouble: SilotuneError | None = None
    # Called with each ControlJob.
    on_control: Callable[[operator_pb2.ControlJobRequest], None] | None = None
    _server: grpc.Server | None = None

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    def add_blob(self, content: bytes) -> manifest_pb2.BlobRef:
        digest = digest_of(content)
        self.blobs[digest] = content
        return manifest_pb2.BlobRef(digest=digest, size=len(content))

    def start(self) -> None:
        now = datetime.now(UTC)
        key = ca.new_key()
        certificate = self.authority.issue_server(key, hosts=["localhost"], valid_days=1, now=now)
        credentials = grpc.ssl_server_credentials(
            [(ca.key_pem(key), certificate.pem)], root_certificates=self.authority.pem, require_client_auth=True
        )
        server = grpc.server(futures.ThreadPoolExecutor(4), options=SERVER_OPTIONS)
        operator_pb2_grpc.add_OperatorServiceServicer_to_server(Operators(self), server)
        read = grpc.unary_stream_rpc_method_handler(
            self._read, request_deserializer=transfer_pb2.ReadRequest.FromString, response_serializer=None
        )
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("silotune.v1.TransferService", {"Read": read}),)
        )
        self.port = server.add_secure_port(f"localhost:{self.port}", credentials)
        server.start()
        self._server = server

    def stop(self) -> None:
        if self._server:
            self._server.stop(grace=None).wait()
            self._server = None

    def profile(self, name: str = "operator", *, valid_days: float = 1) -> str:
        """A fresh operator profile's folder."""
        directory = self.folder / name
        directory.mkdir(exist_ok=True)
        key = ca.new_key()
        issued = datetime.now(UTC)
        identity = Identity(Role.OPERATOR, "operator")
        certificate = self.authority.issue_client(
            key.public_key(), identity=identity, valid_days=valid_days, now=issued
        )
        (directory / "profile.toml").write_text(f'address = "{self.address}"\n')
        (directory / "ca.pem").write_bytes(self.authority.pem)
        (directory / "certificate.pem").write_bytes(certificate.pem)
        (directory / "key.pem").write_bytes(ca.key_pem(key))
        return str(directory)

    def _read(self, request: transfer_pb2.ReadRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        if request.digest not in self.blobs:
            refuse(context, NotFound("There is no such blob."))
        if self.on_read:
            self.on_read(request.digest, request.offset)
        content = self.blobs[request.digest]
        for offset in range(request.offset, len(content), frames.FRAME_BYTES):
            frame = frames.encode(content[offset : offset + frames.FRAME_BYTES], offset=offset)
            if self.on_frame:
                try:
                    frame = self.on_frame(frame)
                except ConnectionError:
                    context.abort(grpc.StatusCode.UNAVAILABLE, "the connection is gone")
            yield frame


def refuse(context: grpc.ServicerContext, error: SilotuneError) -> None:
    code = grpc.StatusCode[error.code]
    context.set_trailing_metadata(((DETAILS_KEY, to_details(error, code_number=code.value[0])),))
    context.abort(code, error.message)


class Operators(operator_pb2_grpc.OperatorServiceServicer):
    def __init__(self, door: Door) -> None:
        self.door = door

    def _job(self, name: str, context: Any) -> operator_pb2.GetJobResponse:
        if name not in self.door.jobs:
            refuse(context, NotFound(f"There is no job {name!r}.", hint="`silotune job list` shows them all."))
        return self.door.jobs[name]

    def SubmitJob(self, request: Any, context: Any) -> Any:
        if '"name":"refused"' in request.spec_json:
            refuse(context, RecipeInvalid("rounds is too many for this disk.", path="rounds"))
        job_id = (
            "" if request.dry_run else self.door.submissions.setdefault(request.submit_token, f"job-{time.time_ns()}")
        )
        return operator_pb2.SubmitJobResponse(
            job_id=job_id, estimates=["Each round moves 2.0 MB."], warnings=["No site is connected now."]
        )

    def ListJobs(self, request: Any, context: Any) -> Any:
        if self.door.trouble:
            refuse(context, self.door.trouble)
        return operator_pb2.ListJobsResponse(jobs=[job.job for job in self.door.jobs.values()])

    def GetJob(self, request: Any, context: Any) -> Any:
        return self._job(request.job, context)

    def ListEvents(self, request: Any, context: Any) -> Any:
        self._job(request.job, context)
        return operator_pb2.ListEventsResponse(
            events=[event for event in self.door.events if event.id > request.after_id][:2]
        )

    def ControlJob(self, request: Any, context: Any) -> Any:
        job = self._job(request.job, context).job
        if self.door.on_control:
            self.door.on_control(request)
        if job.state == operator_pb2.JOB_STATE_COMPLETED:
            refuse(context, Conflict("Job j1 is COMPLETED."))
        job.state = {
            operator_pb2.JOB_ACTION_PAUSE: operator_pb2.JOB_STATE_PAUSED,
            operator_pb2.JOB_ACTION_RESUME: operator_pb2.JOB_STATE_RUNNING,
            operator_pb2.JOB_ACTION_CANCEL: operator_pb2.JOB_STATE_CANCELLED,
            operator_pb2.JOB_ACTION_READMIT: job.state,
        }[request.action]
        return operator_pb2.ControlJobResponse(job=job)

    def GetModel(self, request: Any, context: Any) -> Any:
        version = request.version if request.HasField("version") else max(self.door.models)
        if version not in self.door.models:
            refuse(context, NotFound(f"Job j1 has no version {version}."))
        return self.door.models[version]

    def InviteSite(self, request: Any, context: Any) -> Any:
        token = self.door.authority.token(request.name, enrollment_address="localhost:9444")
        return operator_pb2.InviteSiteResponse(
            token=token.encode(), expires_unix_seconds=time.time() + request.valid_seconds
        )

    def ListSites(self, request: Any, context: Any) -> Any:
        return operator_pb2.ListSitesResponse(sites=self.door.sites)

    def RevokeSite(self, request: Any, context: Any) -> Any:
        if request.name not in {site.name for site in self.door.sites}:
            refuse(context, NotFound(f"There is no site {request.name!r}."))
        return operator_pb2.RevokeSiteResponse()


@pytest.fixture(scope="session")
def authority() -> ca.CertificateAuthority:
    return ca.create(now=datetime.now(UTC))


@pytest.fixture
def door(authority: ca.CertificateAuthority, tmp_path: Path) -> Iterator[Door]:
    opened = Door(authority, tmp_path)
    opened.start()
    yield opened
    opened.stop()


@pytest.fixture
def silotune(door: Any):
    """Runs one command against the door, with a profile of its own."""
    profile = door.profile()

    def run(group: click.Group, *arguments: str) -> Result:
        return CliRunner().invoke(group, [*arguments, "--profile", profile])

    return run


def facts_of(result: Result) -> Any:
    envelope = json.loads(result.stdout)
    assert (envelope["status"], envelope["exit_code"]) == ("ok", 0), result.stdout
    return envelope["data"]


def add_job(door: Any, *, state: operator_pb2.JobState = operator_pb2.JOB_STATE_RUNNING) -> operator_pb2.GetJobResponse:
    door.jobs["j1"] = operator_pb2.GetJobResponse(
        job=operator_pb2.JobView(
            id="j1", name="noise", state=state, sentence="round 1 waits for gard", round=1, rounds=2
        ),
        rounds=[
            operator_pb2.RoundView(
                number=1,
                phase=operator_pb2.ROUND_PHASE_COLLECTING,
                updates=[operator_pb2.UpdateView(site="ninds", fate=agent_pb2.FATE_REJECTED, reason="It has NaN.")],
            )
        ],
        tasks=[
            operator_pb2.TaskView(
                site="gard", kind=agent_pb2.TASK_KIND_TRAIN, state=operator_pb2.TASK_STATE_QUEUED, round=1
            )
        ],
        spec_json='{"name":"noise"}',
    )
    return door.jobs["j1"]
