"""The agent's side of AgentService: lease, heartbeat, finish, renew, over one mutually authenticated channel.

Every call may be repeated, and every call has a deadline. What is retryable is repeated for ever; what it waits for is
said once, when it changes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

import grpc
import structlog

from client_agent import identity as identities
from client_agent import rpc
from client_agent.home import Home
from client_agent.identity import SiteIdentity
from protos.channel import CLIENT_OPTIONS
from protos.errors import SilotuneError
from protos.v1 import agent_pb2, agent_pb2_grpc

LEASE_WAIT_SECONDS = 20.0

log = structlog.get_logger()
Answer = TypeVar("Answer")


def open_channel(identity: SiteIdentity) -> grpc.aio.Channel:
    """A channel of its own with the agent's certificate. Unauthenticated when the certificate has expired."""
    identity.check_valid(now=identities.utc_now())
    credentials = grpc.ssl_channel_credentials(
        root_certificates=identity.ca, private_key=identity.key, certificate_chain=identity.certificate
    )
    return grpc.aio.secure_channel(identity.coordinator, credentials, options=CLIENT_OPTIONS)


class Waiting:
    """What the agent waits for now, in one sentence; it is logged when it changes, not each time it is true."""

    def __init__(self) -> None:
        self.sentence = ""

    def say(self, sentence: str) -> None:
        if sentence != self.sentence:
            self.sentence = sentence
            if sentence:
                log.info(sentence)

    def clear(self) -> None:
        self.sentence = ""


class Session:
    """One channel for the short calls; transfers open their own through `open_channel`."""

    def __init__(self, home: Home, *, waiting: Waiting) -> None:
        self._home = home
        self._waiting = waiting
        self.identity = identities.load(home.identity)
        self._channel: grpc.aio.Channel | None = None
        self.connected = False

    def open_channel(self) -> grpc.aio.Channel:
        return open_channel(self.identity)

    async def lease(
        self, agent: agent_pb2.AgentInfo, *, holding: Iterable[str], wait_seconds: float = LEASE_WAIT_SECONDS
    ) -> agent_pb2.LeaseTaskResponse:
        """Work, or the sentence why there is none. One attempt.

        `holding` are the ids of the tasks in hand; any other task of this site is granted anew.
        """
        request = agent_pb2.LeaseTaskRequest(agent=agent, holding=holding, wait_seconds=wait_seconds)
        return await self._call("LeaseTask", request, timeout_seconds=wait_seconds + rpc.CALL_TIMEOUT_SECONDS)

    async def heartbeat(self, request: agent_pb2.HeartbeatRequest) -> agent_pb2.HeartbeatResponse:
        """One attempt: the next beat is the repeat."""
        return await self._call("Heartbeat", request)

    async def finish(self, request: agent_pb2.FinishTaskRequest) -> agent_pb2.FinishTaskResponse:
        """Repeated until it is answered: the result is the coordinator's only when it says so."""
        return await self.patiently(lambda: self._call("FinishTask", request))

    async def renew(self) -> SiteIdentity:
        """A certificate over a fresh key. The next call, and every channel opened from now on, uses it."""
        directory = self._home.identity
        key = await asyncio.to_thread(identities.new_key_for_renewal, directory)
        csr = identities.make_csr(key, name=self.identity.name)
        answer = await self._call("RenewCertificate", agent_pb2.RenewCertificateRequest(csr=csr))
        self.identity = await asyncio.to_thread(
            identities.install_renewal, directory, key=key, certificate=answer.certificate
        )
        # Calls in flight on the old channel end by themselves.
        await self.close(grace_seconds=LEASE_WAIT_SECONDS + rpc.CALL_TIMEOUT_SECONDS)
        return self.identity

    async def close(self, *, grace_seconds: float | None = None) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close(grace=grace_seconds)

    async def patiently(self, operation: Callable[[], Awaitable[Answer]]) -> Answer:
        """`operation` repeated while its error is a retryable one, with growing pauses."""
        pauses = rpc.delays()
        said = False
        while True:
            try:
                answer = await operation()
            except SilotuneError as error:
                if not error.retryable:
                    raise
                self._waiting.say(f"{error} Trying again.")
                said = True
                await asyncio.sleep(next(pauses))
            else:
                if said:
                    self._waiting.clear()
                return answer

    async def _call(self, method: str, request: object, *, timeout_seconds: float = rpc.CALL_TIMEOUT_SECONDS) -> Any:
        try:
            if self._channel is None:
                self._channel = self.open_channel()
            stub = agent_pb2_grpc.AgentServiceStub(self._channel)
            answer = await rpc.call(getattr(stub, method), request, timeout_seconds=timeout_seconds)
        except SilotuneError as error:
            # Any answer of the coordinator's own, a refusal too, shows that it is there.
            self.connected = not error.retryable and error.code != "UNAUTHENTICATED"
            raise
        self.connected = True
        return answer
