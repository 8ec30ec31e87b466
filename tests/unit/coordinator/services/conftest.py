"""A whole coordinator on loopback, with real certificates, and agents that a test drives by hand."""

from __future__ import annotations

import asyncio
import json
import queue
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from coordinator import ca
from coordinator.main import Addresses, serve
from coordinator.settings import Listen, Public, Settings, Storage, database_url
from coordinator.storage.store import Store
from protos import frames
from protos.channel import CLIENT_OPTIONS
from protos.digests import digest_of
from protos.errors import DETAILS_KEY, SilotuneError, from_details
from protos.identity import Identity, JoinToken, Role
from protos.tensors import make_header
from protos.v1 import agent_pb2, agent_pb2_grpc, operator_pb2, operator_pb2_grpc, transfer_pb2, transfer_pb2_grpc
from protos.v1.manifest_pb2 import ENCODING_RAW, FORM_VALUES, BlobRef, Manifest

LOOPBACK = "127.0.0.1:0"
# Longer than anything takes that comes at all.
PATIENCE_SECONDS = 120
# Not the loop's own threads: the coordinator of the test works in those, and open writes hold theirs until they end.
WRITERS = ThreadPoolExecutor(64)


def tensor_file(*, fill: float, elements: int = 1000, name: str = "layer.weight") -> bytes:
    """One float32 tensor in canonical layout."""
    header, _ = make_header([(name, "F32", (elements,))])
    return header + np.full(elements, fill, dtype="<f4").tobytes()


def recipe(**changes: Any) -> str:
    """The JSON of a synthetic job for every enrolled site."""
    spec = {
        "name": "trial",
        "task": {"type": "synthetic"},
        "local": {"steps": 1},
        "rounds": 1,
        "cohort": {"gather_seconds": 0, "retries": 0},
        "evaluation": {"where": []},
    }
    return json.dumps({**spec, **changes})


@dataclass
class Peer:
    """One certificate's view of the coordinator. Failed calls raise what the coordinator raised."""

    address: str
    credentials: grpc.ChannelCredentials
    metadata: tuple[tuple[str, str], ...] = ()
    channels: list[grpc.aio.Channel] = field(default_factory=list)

    @property
    def channel(self) -> grpc.aio.Channel:
        if not self.channels:
            self.channels.append(grpc.aio.secure_channel(self.address, self.credentials, options=CLIENT_OPTIONS))
        return self.channels[0]

    async def close(self) -> None:
        for channel in self.channels:
            await channel.close(None)

    async def agent(self, method: str, request: Any) -> Any:
        return await answer(
            getattr(agent_pb2_grpc.AgentServiceStub(self.channel), method)(request, timeout=PATIENCE_SECONDS)
        )

    async def operator(self, method: str, request: Any) -> Any:
        return await answer(
            getattr(operator_pb2_grpc.OperatorServiceStub(self.channel), method)(request, timeout=PATIENCE_SECONDS)
        )

    async def transfer(self, method: str, request: Any) -> Any:
        return await answer(
            getattr(transfer_pb2_grpc.TransferServiceStub(self.channel), method)(request, timeout=PATIENCE_SECONDS)
        )

    async def read(self, digest: str, *, offset: int = 0) -> bytes:
        call = self.channel.unary_stream(
            "/silotune.v1.TransferService/Read",
            request_serializer=transfer_pb2.ReadRequest.SerializeToString,
        )(transfer_pb2.ReadRequest(digest=digest, offset=offset), timeout=PATIENCE_SECONDS)
        received = b""
        try:
            async for message in call:
                frame = frames.decode(message)
                assert frame.offset == offset + len(received)
                received += frame.data
        except grpc.aio.AioRpcError as error:
            raise ours(error) from error
        return received

    async def write(self, messages: Iterable[bytes]) -> transfer_pb2.WriteResponse:
        """An upload by gRPC's synchronous client: the asyncio one may lose the status of a stream that ended early."""

        def call() -> transfer_pb2.WriteResponse:
            with grpc.secure_channel(self.address, self.credentials, options=CLIENT_OPTIONS) as channel:
                write = channel.stream_unary(
                    "/silotune.v1.TransferService/Write", response_deserializer=transfer_pb2.WriteResponse.FromString
                )
                return write(iter(messages), timeout=PATIENCE_SECONDS)

        try:
            return await asyncio.get_running_loop().run_in_executor(WRITERS, call)
        except grpc.RpcError as error:
            raise ours(error) from error

    def open_write(self) -> OpenWrite:
        messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        return OpenWrite(messages, asyncio.create_task(self.write(iter(messages.get, None))))

    async def upload(self, task: agent_pb2.Task, content: bytes) -> BlobRef:
        blob = BlobRef(digest=digest_of(content), size=len(content))
        status = await self.write(upload_frames(task, content))
        assert status.sealed
        return blob

    async def lease(self, *, holding: tuple[str, ...] = ()) -> agent_pb2.Task:
        """The site's next task, asked for as often as it takes."""
        request = agent_pb2.LeaseTaskRequest(agent=agent_pb2.AgentInfo(version="1"), wait_seconds=5, holding=holding)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not (response := await self.agent("LeaseTask", request)).HasField("task"):
                pass
        return response.task

    async def finish(self, task: agent_pb2.Task, **succeeded: Any) -> agent_pb2.FinishTaskResponse:
        """Reports success, of one step where the test does not say how many."""
        outcome = agent_pb2.Succeeded(**{"steps": 1, **succeeded})
        request = agent_pb2.FinishTaskRequest(task_id=task.id, generation=task.generation, succeeded=outcome)
        return await self.agent("FinishTask", request)


@dataclass
class OpenWrite:
    """An upload whose messages a test sends one by one; None ends them."""

    messages: queue.SimpleQueue[bytes | None]
    outcome: asyncio.Task[transfer_pb2.WriteResponse]

    async def end(self) -> transfer_pb2.WriteResponse:
        self.messages.put(None)
        return await self.outcome


def manifest(blob: BlobRef, *, base_version: int = 0) -> Manifest:
    return Manifest(blob=blob, encoding=ENCODING_RAW, form=FORM_VALUES, base_version=base_version)


def upload_frames(task: agent_pb2.Task, content: bytes, *, offset: int = 0, until: int | None = None) -> list[bytes]:
    """The messages that upload content[offset:until]."""
    target = transfer_pb2.UploadTarget(
        task_id=task.id,
        generation=task.generation,
        blob=BlobRef(digest=digest_of(content), size=len(content)),
    )
    end = len(content) if until is None else until
    starts = range(offset, end, frames.FRAME_BYTES)
    data = [frames.encode(content[at : min(end, at + frames.FRAME_BYTES)], offset=at) for at in starts]
    return [frames.encode_target(target), *data]


async def answer(call: Any) -> Any:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise ours(error) from error


def ours(error: Any) -> SilotuneError:
    packed = dict(error.trailing_metadata() or ()).get(DETAILS_KEY)
    return from_details(error.code().name, error.details() or "", packed)


@dataclass
class Federation:
    directory: Path
    settings: Settings
    authority: ca.CertificateAuthority
    addresses: Addresses
    store: Store
    stop: asyncio.Event
    task: asyncio.Task[None]
    peers: list[Peer] = field(default_factory=list)

    async def shut_down(self) -> None:
        self.stop.set()
        await self.task

    def peer(
        self,
        identity: Identity | None,
        *,
        authority: ca.CertificateAuthority | None = None,
        valid_seconds: float = 3600,
        issued_seconds_ago: float = 0,
    ) -> Peer:
        """A caller with a certificate for `identity`, or with none."""
        key = chain = None
        if identity is not None:
            made = ca.new_key()
            now = ca.utc_now() - timedelta(seconds=issued_seconds_ago)
            days = (valid_seconds + issued_seconds_ago) / 86_400
            signer = authority or self.authority
            chain = signer.issue_client(made.public_key(), identity=identity, valid_days=days, now=now).pem
            key = ca.key_pem(made)
        credentials = grpc.ssl_channel_credentials(self.authority.pem, key, chain)
        peer = Peer(self.addresses.main, credentials)
        self.peers.append(peer)
        return peer

    def operator(self) -> Peer:
        return self.peer(Identity(Role.OPERATOR, "operator"))

    def site(self, name: str, *, role: Role = Role.SITE, **certificate: Any) -> Peer:
        """An enrolled site."""
        self.enroll(name, role=role)
        return self.peer(Identity(role, name), **certificate)

    def enroll(self, name: str, *, role: Role = Role.SITE) -> None:
        token = self.invite(name, role=role)
        self.store.sites.redeem(
            token.secret_hash,
            key_hash="k",
            serial="1",
            expires_unix_seconds=time.time() + 3600,
            now_unix_seconds=time.time(),
        )

    def invite(self, name: str, *, role: Role = Role.SITE, valid_seconds: float = 600) -> JoinToken:
        token = self.authority.token(name, enrollment_address=self.addresses.enrollment)
        now = time.time()
        self.store.sites.invite(
            name,
            role=role,
            secret_hash=token.secret_hash,
            expires_unix_seconds=now + valid_seconds,
            now_unix_seconds=now,
        )
        return token

    async def enrollment(self, *, token: str, csr: bytes) -> agent_pb2.EnrollResponse:
        peer = Peer(self.addresses.enrollment, grpc.ssl_channel_credentials(self.authority.pem))
        self.peers.append(peer)
        request = agent_pb2.EnrollRequest(token=token, csr=csr)
        return await answer(
            agent_pb2_grpc.EnrollmentServiceStub(peer.channel).Enroll(request, timeout=PATIENCE_SECONDS)
        )

    async def submit(self, **changes: Any) -> str:
        response = await self.operator().operator(
            "SubmitJob", operator_pb2.SubmitJobRequest(spec_json=recipe(**changes))
        )
        return response.job_id

    async def job_with_version_0(
        self, site: Peer, *, content: bytes, others: tuple[Peer, ...] = (), **changes: Any
    ) -> agent_pb2.Task:
        """Submits a job, makes `content` its version 0, and leases the site's first training task.

        `others` come into the first round's cohort too.
        """
        # The round begins when all of them are there, however slow the machine is.
        if others:
            changes["cohort"] = {"gather_seconds": 0, "retries": 0, "quorum": 1 + len(others)}
        await self.submit(**changes)
        task = await site.lease()
        assert task.kind == agent_pb2.TASK_KIND_INIT
        blob = await site.upload(task, content)
        # Who asks for work is there; an agent does so all the time, and on a slow machine once would not be enough.
        asking = [asyncio.create_task(other.lease()) for other in others]
        done = await site.finish(task, manifest=manifest(blob))
        assert done.fate == agent_pb2.FATE_ACCEPTED, done.reason
        task = await site.lease()
        assert task.kind == agent_pb2.TASK_KIND_TRAIN
        await asyncio.gather(*asking)
        return task


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Starts coordinators on one data directory, one after another: `await start()`, `await start(insecure=True)`."""
    running: list[Federation] = []

    async def start_one(*, insecure: bool = False, **changes: Any) -> Federation:
        settings = Settings(
            listen=Listen(address=LOOPBACK, enrollment_address=LOOPBACK, http_address=LOOPBACK),
            public=Public(enrollment_address="localhost:1"),
            **{"storage": Storage(reserve_bytes=0), **changes},
        )
        if not (tmp_path / ca.KEY_FILE).exists():
            ca.create(now=ca.utc_now()).save(tmp_path)
        ready: asyncio.Future[Addresses] = asyncio.get_running_loop().create_future()
        stop = asyncio.Event()
        task = asyncio.create_task(
            serve(tmp_path, settings, insecure_loopback=insecure, started=ready.set_result, stop=stop)
        )
        await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        store = Store.open(database_url(settings, tmp_path))
        federation = Federation(tmp_path, settings, ca.load(tmp_path), ready.result(), store, stop, task)
        running.append(federation)
        return federation

    yield start_one
    for federation in running:
        for peer in federation.peers:
            await peer.close()
        await federation.shut_down()
        federation.store.close()


@pytest.fixture
async def federation(start: Callable[..., Any]) -> Federation:
    return await start()
