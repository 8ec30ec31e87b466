"""The agent's side of AgentService: lease, heartbeat, finish, renew, over one mutually authenticated channel.

Every call may be repeated, and every call has a deadline. What is retryable is repeated for ever; what it waits for is
said once, when it changes. Where the coordinator has several addresses, an attempt that finds it unavailable at one
makes the next attempt at another, and an address that works is kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc
import structlog

from client_agent import identity as identities
from client_agent import insecure, rpc
from client_agent.bandwidth import paces
from client_agent.home import Home
from client_agent.identity import SiteIdentity
from client_agent.probe import probe
from client_agent.route import Route, route_of
from client_agent.settings import Network
from protos.errors import Internal, SilotuneError, Unavailable
from protos.v1 import agent_pb2, agent_pb2_grpc

LEASE_WAIT_SECONDS = 20.0
DEFECT_ATTEMPTS = 10

log = structlog.get_logger()
Answer = TypeVar("Answer")


def open_channel(identity: SiteIdentity, address: str, *, route: Route) -> grpc.aio.Channel:
    """A channel of its own with the agent's certificate. Unauthenticated when the certificate has expired."""
    identity.check_valid(now=identities.utc_now())
    credentials = grpc.ssl_channel_credentials(
        root_certificates=route.trusted, private_key=identity.key, certificate_chain=identity.certificate
    )
    return grpc.aio.secure_channel(address, credentials, options=route.options(address))


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

    def __init__(
        self, home: Home, *, waiting: Waiting, network: Network | None = None, insecure_loopback: bool = False
    ) -> None:
        network = network or Network()
        self._home = home
        self._insecure_loopback = insecure_loopback
        self._waiting = waiting
        identities.complete_renewal(home.identity)
        self.identity = identities.load(home.identity)
        self._route = route_of(network, ca=self.identity.ca, directory=home.site_file.parent)
        self.sending, self.receiving = paces(network)
        # Where the next attempt goes.
        self._address = self.identity.addresses[0]
        self._channel: grpc.aio.Channel | None = None
        self._retired: set[asyncio.Task[None]] = set()
        self.connected = False

    @asynccontextmanager
    async def open_channel(self) -> AsyncIterator[grpc.aio.Channel]:
        """A channel of its own, closed in the end."""
        address = self._address
        channel = self._dial(address)
        try:
            yield channel
        except Unavailable:
            self._leave(address)
            raise
        finally:
            await channel.close(None)

    async def lease(
        self, agent: agent_pb2.AgentInfo, *, holding: Iterable[str], keeps: Iterable[str] = (),
        wait_seconds: float = LEASE_WAIT_SECONDS,
    ) -> agent_pb2.LeaseTaskResponse:  # fmt: skip
        """Work, or the sentence why there is none. One attempt.

        `holding` are the ids of the tasks in hand; any other task of this site is granted anew. `keeps` are jobs of
        which something is kept; the answer says which of them have ended.
        """
        if not self.connected:
            # The first answer says whether this agent is welcome; it must not wait for work.
            wait_seconds = 0.0
        request = agent_pb2.LeaseTaskRequest(agent=agent, holding=holding, keeps=keeps, wait_seconds=wait_seconds)
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
        self._retire_channel()
        return self.identity

    async def close(self) -> None:
        """Cuts what is in flight."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close(None)
        for retired in self._retired:
            retired.cancel()

    async def patiently(self, operation: Callable[[], Awaitable[Answer]]) -> Answer:
        """`operation` repeated while its error is a retryable one, with growing pauses.

        A defect of the coordinator is met DEFECT_ATTEMPTS times: it may pass, and finished training must not be thrown
        away for one call that went wrong.
        """
        pauses = rpc.delays()
        said, defects = False, 0
        while True:
            try:
                answer = await operation()
            except SilotuneError as error:
                defects += isinstance(error, Internal)
                if not error.retryable and not (isinstance(error, Internal) and defects < DEFECT_ATTEMPTS):
                    raise
                self._waiting.say(f"{await self._in_words(error)} Trying again.")
                said = True
                await asyncio.sleep(next(pauses))
            else:
                if said:
                    self._waiting.clear()
                return answer

    async def _in_words(self, error: SilotuneError) -> str:
        """gRPC does not tell a proxy that inspects TLS, or a certificate that is not taken; a look at the port does."""
        tls = any(words in error.message for words in (rpc.TLS_FAILED, rpc.NOT_OF_OUR_CA, rpc.CLOSED))
        for address in self.identity.addresses if error.message.startswith(rpc.UNREACHABLE) else ():
            if tls or self._route.proxy_for(address) is not None:
                own = self._home.identity / identities.CERTIFICATE, self._home.identity / identities.KEY
                found = await asyncio.to_thread(probe, address, route=self._route, own=own)
                if not found.reachable:
                    return f"{rpc.UNREACHABLE}: {found.sentence}."
        return str(error)

    async def _call(self, method: str, request: object, *, timeout_seconds: float = rpc.CALL_TIMEOUT_SECONDS) -> Any:
        address = self._address
        try:
            if self._channel is None:
                self._channel = self._dial(address)
            stub = agent_pb2_grpc.AgentServiceStub(self._channel)
            answer = await rpc.call(getattr(stub, method), request, timeout_seconds=timeout_seconds)
        except SilotuneError as error:
            # Any answer of the coordinator's own, a refusal too, shows that it is there.
            self.connected = not error.retryable and error.code != "UNAUTHENTICATED"
            if isinstance(error, Unavailable):
                self._leave(address)
            raise
        self.connected = True
        return answer

    def _dial(self, address: str) -> grpc.aio.Channel:
        if self._insecure_loopback:
            return insecure.open_channel(address, uri=self.identity.uri)
        return open_channel(self.identity, address, route=self._route)

    def _leave(self, address: str) -> None:
        """The next attempt goes to the next address, unless another one has moved on from this one already."""
        addresses = self.identity.addresses
        if len(addresses) > 1 and address == self._address:
            self._address = addresses[(addresses.index(address) + 1) % len(addresses)]
            self._retire_channel()

    def _retire_channel(self) -> None:
        if self._channel is not None:
            retired = asyncio.create_task(_close_later(self._channel))
            self._retired.add(retired)
            retired.add_done_callback(self._retired.discard)
            self._channel = None


async def _close_later(channel: grpc.aio.Channel) -> None:
    """Calls in flight are not cut: each has a deadline, and the last of them passes first."""
    await asyncio.sleep(LEASE_WAIT_SECONDS + rpc.CALL_TIMEOUT_SECONDS)
    await channel.close(None)
