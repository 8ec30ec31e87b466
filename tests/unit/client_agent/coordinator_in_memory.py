"""A coordinator that keeps everything in memory: the real protocol over real TLS sockets, with faults on demand."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import ipaddress
import ssl
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from protos import frames
from protos.channel import SERVER_OPTIONS
from protos.digests import digest_of
from protos.errors import (
    DETAILS_KEY,
    Conflict,
    LeaseFenced,
    NotFound,
    SilotuneError,
    Unauthenticated,
    Unavailable,
    WrongOffset,
    to_details,
)
from protos.identity import Identity, JoinToken, Role
from protos.v1 import agent_pb2, transfer_pb2
from protos.v1.manifest_pb2 import BlobRef

SECRET = "one-time-secret"
# In the certificate, and unknown to every DNS: only a proxy of the test can lead there.
UNRESOLVABLE = "federation.invalid"


class Authority:
    """A certificate authority for one test."""

    def __init__(self, name: str = "test federation") -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = self._build(self.name, self.key.public_key(), days=30, ca=True)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def server(self) -> tuple[bytes, bytes]:
        key = ec.generate_private_key(ec.SECP256R1())
        names = [
            x509.DNSName("localhost"),
            x509.DNSName(UNRESOLVABLE),
            x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        ]
        leaf = self._build(_common_name("coordinator"), key.public_key(), days=30, names=names)
        return _private(key), leaf.public_bytes(serialization.Encoding.PEM)

    def server_context(self) -> ssl.SSLContext:
        """For a server that shows a certificate of this authority."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_alpn_protocols(["h2"])
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"".join(self.server()))
            file.flush()
            context.load_cert_chain(file.name)
        return context

    def sign(self, csr: bytes, *, name: str, days: float = 30, age_days: float = 0) -> bytes:
        public = x509.load_pem_x509_csr(csr).public_key()
        names = [x509.UniformResourceIdentifier(Identity(Role.SITE, name).uri)]
        leaf = self._build(_common_name(name), public, days=days, names=names, age_days=age_days)
        return leaf.public_bytes(serialization.Encoding.PEM)

    def token(self, name: str, *, address: str) -> JoinToken:
        ca = base64.b64encode(self.certificate.public_bytes(serialization.Encoding.DER)).decode()
        return JoinToken(name=name, secret=SECRET, enrollment_address=address, ca=ca)

    def _build(self, subject, public, *, days, names=(), ca=False, age_days=0):
        now = datetime.now(UTC) - timedelta(days=age_days)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
            usage = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            builder = builder.add_extension(x509.ExtendedKeyUsage(usage), critical=False)
        return builder.sign(self.key, hashes.SHA256())


class Coordinator:
    """`tasks` are handed out in order; everything that agents say is kept for the test to look at."""

    def __init__(self) -> None:
        self.authority = Authority()
        # Who signed the coordinator's own certificate.
        self.server_authority = self.authority
        # Who signs the certificates that enrollment answers with.
        self.client_authority = self.authority
        self.address = ""
        self.enrollment_address = ""
        self.tasks: list[agent_pb2.Task] = []
        self.blobs: dict[str, bytes] = {}
        self.leased: dict[str, int] = {}
        self.asked: list[agent_pb2.LeaseTaskRequest] = []
        self.beats: list[agent_pb2.HeartbeatRequest] = []
        self.finished: list[agent_pb2.FinishTaskRequest] = []
        self.uploads: dict[str, bytearray] = {}
        self.sealed: dict[str, bytes] = {}
        self.reads: list[int] = []  # the offset of each Read
        self.bytes_read = 0
        self.bytes_written = 0
        self.lose_blobs = False
        # Jobs that have ended for good.
        self.ended: set[str] = set()
        # Faults: `cut_*` end the next stream after so many bytes; the rest hold until they are taken back.
        self.cut_read_at: int | None = None
        self.cut_write_at: int | None = None
        self.cuts_for_good = False
        self.damage_next_frame = False
        self.down = False
        self.stop_reason = ""
        self.fenced = False
        self.enrolled_keys: set[bytes] = set()
        self.lose_enrollment_answers = 0
        self.certificate_days = 30.0
        # Calls that came without a deadline; an agent never makes one.
        self.without_deadline: list[str] = []

    def add_task(self, task: agent_pb2.Task, *, model: bytes | None = None) -> None:
        if model is not None:
            self.blobs[digest_of(model)] = model
            task.model.CopyFrom(BlobRef(digest=digest_of(model), size=len(model)))
        self.tasks.append(task)

    async def until(self, condition: Callable[[], object], *, seconds: float = 120) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.02)

    # --- AgentService and EnrollmentService

    async def lease_task(self, request: agent_pb2.LeaseTaskRequest) -> agent_pb2.LeaseTaskResponse:
        self.asked.append(request)
        free = [task for task in self.tasks if task.id not in request.holding]
        if not free:
            await asyncio.sleep(min(request.wait_seconds, 0.1))
            ended = self.ended & set(request.keeps)
            return agent_pb2.LeaseTaskResponse(sentence="No job needs this site now.", ended=ended)
        self.leased[free[0].id] = self.leased.get(free[0].id, 0) + 1
        self.fenced = False
        task = agent_pb2.Task(generation=self.leased[free[0].id])
        task.MergeFrom(free[0])
        return agent_pb2.LeaseTaskResponse(task=task)

    async def heartbeat(self, request: agent_pb2.HeartbeatRequest) -> agent_pb2.HeartbeatResponse:
        self.beats.append(request)
        self._check_lease(request.task_id, request.generation)
        return agent_pb2.HeartbeatResponse(proceed=not self.stop_reason, reason=self.stop_reason, lease_seconds=0.3)

    async def finish_task(self, request: agent_pb2.FinishTaskRequest) -> agent_pb2.FinishTaskResponse:
        self._check_lease(request.task_id, request.generation)
        if self.lose_blobs:
            self.lose_blobs = False
            self.sealed.clear()
            self.uploads.clear()
            raise Conflict("The blob is not here.", hint="Upload it again, then report again.")
        self.finished.append(request)
        self.tasks = [task for task in self.tasks if task.id != request.task_id]
        return agent_pb2.FinishTaskResponse(fate=agent_pb2.FATE_ACCEPTED)

    async def renew(self, request: agent_pb2.RenewCertificateRequest) -> agent_pb2.RenewCertificateResponse:
        certificate = self.authority.sign(request.csr, name="st-olav", days=self.certificate_days)
        return agent_pb2.RenewCertificateResponse(certificate=certificate)

    async def enroll(self, request: agent_pb2.EnrollRequest) -> agent_pb2.EnrollResponse:
        if request.token != SECRET:
            raise Unauthenticated("This join token is not known here.")
        public = x509.load_pem_x509_csr(request.csr).public_key()
        key = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        if self.enrolled_keys and key not in self.enrolled_keys:
            raise Unauthenticated("This join token was used already.")
        self.enrolled_keys.add(key)
        if self.lose_enrollment_answers:
            self.lose_enrollment_answers -= 1
            raise Unavailable("The answer is lost.")
        certificate = self.client_authority.sign(request.csr, name="st-olav", days=self.certificate_days)
        return agent_pb2.EnrollResponse(name="st-olav", certificate=certificate)

    def _check_lease(self, task_id: str, generation: int) -> None:
        if task_id not in {task.id for task in self.tasks}:
            raise NotFound("There is no such task for this site.")
        if self.fenced or self.leased.get(task_id) != generation:
            raise LeaseFenced("This lease is no longer the current one.")

    # --- TransferService

    async def find_missing(self, request: transfer_pb2.FindMissingRequest) -> transfer_pb2.FindMissingResponse:
        return transfer_pb2.FindMissingResponse(missing=[b for b in request.blobs if b.digest not in self.sealed])

    async def query(self, request: transfer_pb2.QueryWriteStatusRequest) -> transfer_pb2.QueryWriteStatusResponse:
        kept = len(self.uploads.get(request.blob.digest, b""))
        return transfer_pb2.QueryWriteStatusResponse(committed_size=kept, sealed=request.blob.digest in self.sealed)

    async def read(self, message: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        request = transfer_pb2.ReadRequest.FromString(message)
        data = self.blobs.get(request.digest)
        if data is None:
            raise NotFound("There is no such blob for this caller.")
        self.reads.append(request.offset)
        offset = request.offset
        while offset < len(data):
            if self.cut_read_at is not None and offset >= self.cut_read_at:
                self.cut_read_at = None
                raise Unavailable("The connection was cut.")
            part = data[offset : offset + frames.FRAME_BYTES]
            frame = bytearray(frames.encode(part, offset=offset))
            if self.damage_next_frame:
                self.damage_next_frame = False
                frame[-1] ^= 1
            yield bytes(frame)
            offset += len(part)
            self.bytes_read += len(part)

    async def write(self, messages: AsyncIterator[bytes]) -> bytes:
        target = frames.decode(await anext(messages)).target
        self._check_lease(target.task_id, target.generation)
        kept = self.uploads.setdefault(target.blob.digest, bytearray())
        async for message in messages:
            frame = frames.decode(message)
            if frame.offset != len(kept):
                raise WrongOffset("Continue elsewhere.", committed_size=len(kept))
            if self.cut_write_at is not None and len(kept) >= self.cut_write_at:
                if not self.cuts_for_good:
                    self.cut_write_at = None
                raise Unavailable("The connection was cut.")
            kept += frame.data
            self.bytes_written += len(frame.data)
        whole = len(kept) == target.blob.size
        if whole:
            assert digest_of(bytes(kept)) == target.blob.digest
            self.sealed[target.blob.digest] = bytes(kept)
        return transfer_pb2.WriteResponse(committed_size=len(kept), sealed=whole).SerializeToString()

    # --- the servers

    def replica(self) -> Coordinator:
        """Another coordinator with the same authority and the same work, blobs and uploads."""
        other = Coordinator()
        for name in (
            "authority",
            "server_authority",
            "client_authority",
            "tasks",
            "blobs",
            "leased",
            "uploads",
            "sealed",
        ):
            setattr(other, name, getattr(self, name))
        return other

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Coordinator]:
        key, certificate = self.server_authority.server()
        server = grpc.aio.server(options=SERVER_OPTIONS)
        agents = {
            "LeaseTask": (self.lease_task, agent_pb2.LeaseTaskRequest),
            "Heartbeat": (self.heartbeat, agent_pb2.HeartbeatRequest),
            "FinishTask": (self.finish_task, agent_pb2.FinishTaskRequest),
            "RenewCertificate": (self.renew, agent_pb2.RenewCertificateRequest),
        }
        transfers = {
            "FindMissing": (self.find_missing, transfer_pb2.FindMissingRequest),
            "QueryWriteStatus": (self.query, transfer_pb2.QueryWriteStatusRequest),
        }
        streams = {
            "Read": grpc.unary_stream_rpc_method_handler(self._reading),
            "Write": grpc.stream_unary_rpc_method_handler(self._writing),
        }
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler("silotune.v1.AgentService", self._unary(agents)),
                grpc.method_handlers_generic_handler(
                    "silotune.v1.TransferService", {**self._unary(transfers), **streams}
                ),
            )
        )
        credentials = grpc.ssl_server_credentials(
            [(key, certificate)], root_certificates=self.authority.pem, require_client_auth=True
        )
        self.address = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}"
        door = grpc.aio.server(options=SERVER_OPTIONS)
        enrollment = self._unary({"Enroll": (self.enroll, agent_pb2.EnrollRequest)})
        door.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("silotune.v1.EnrollmentService", enrollment),)
        )
        door_port = door.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
        self.enrollment_address = f"127.0.0.1:{door_port}"
        await server.start()
        await door.start()
        try:
            yield self
        finally:
            await asyncio.gather(server.stop(None), door.stop(None))

    def _unary(self, methods):
        def handler(method, request_class):
            async def handle(request, context):
                self._check_deadline(type(request).__name__, context)
                try:
                    if self.down:
                        raise Unavailable("The coordinator is being restarted.")
                    return await method(request)
                except SilotuneError as error:
                    await _abort(context, error)

            return grpc.unary_unary_rpc_method_handler(
                handle,
                request_deserializer=request_class.FromString,
                response_serializer=lambda answer: answer.SerializeToString(),
            )

        return {name: handler(*parts) for name, parts in methods.items()}

    def _check_deadline(self, name: str, context: grpc.aio.ServicerContext) -> None:
        if context.time_remaining() is None:
            self.without_deadline.append(name)

    async def _reading(self, message: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        self._check_deadline("Read", context)
        try:
            async for frame in self.read(message, context):
                yield frame
        except SilotuneError as error:
            await _abort(context, error)

    async def _writing(self, messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes:
        self._check_deadline("Write", context)
        try:
            return await self.write(aiter(messages))
        except SilotuneError as error:
            await _abort(context, error)
            raise


async def _abort(context: grpc.aio.ServicerContext, error: SilotuneError) -> None:
    code = grpc.StatusCode[error.code]
    context.set_trailing_metadata(((DETAILS_KEY, to_details(error, code_number=code.value[0])),))
    await context.abort(code, error.message)


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def changed_token(token: JoinToken, **changes: str) -> JoinToken:
    return dataclasses.replace(token, **changes)
