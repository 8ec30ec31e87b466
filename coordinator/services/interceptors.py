"""What every call passes before a service sees it: outcome (errors, metrics, logs), then gate (identity, role).

The identity comes from the client certificate alone. gRPC verified its signature when the connection was made, but it
neither looks at expiry again nor knows revocation, so both are checked here on every call, and again while a stream
runs. A method that is not in ACCESS is refused: a new one cannot be reachable by oversight.
"""

from __future__ import annotations

import asyncio
import errno
import inspect
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import grpc
import structlog
from cryptography import x509

from coordinator.ca import BACKDATE
from coordinator.observe import Metrics
from coordinator.services.wire import CALLER
from coordinator.storage.sites import SiteRow
from protos.errors import (
    DETAILS_KEY,
    Forbidden,
    Internal,
    OutOfSpace,
    SilotuneError,
    Unauthenticated,
    Unavailable,
    to_details,
)
from protos.identity import INSECURE_IDENTITY_KEY, Identity, Role, parse_uri

REGISTRY_CACHE_SECONDS = 1.0
# How often a call that goes on is looked at again; with the cache a revoked site is out within two seconds.
RECHECK_SECONDS = 0.5

_SITES = frozenset({Role.SITE, Role.HOUSE})
_OPERATOR = frozenset({Role.OPERATOR})
_ANYONE = _SITES | _OPERATOR

ACCESS: dict[str, frozenset[Role]] = {
    "/silotune.v1.AgentService/LeaseTask": _SITES,
    "/silotune.v1.AgentService/Heartbeat": _SITES,
    "/silotune.v1.AgentService/FinishTask": _SITES,
    "/silotune.v1.AgentService/RenewCertificate": _SITES,
    "/silotune.v1.TransferService/FindMissing": _SITES,
    "/silotune.v1.TransferService/Read": _ANYONE,
    "/silotune.v1.TransferService/Write": _ANYONE,
    "/silotune.v1.TransferService/QueryWriteStatus": _ANYONE,
    "/silotune.v1.OperatorService/SubmitJob": _OPERATOR,
    "/silotune.v1.OperatorService/ListJobs": _OPERATOR,
    "/silotune.v1.OperatorService/GetJob": _OPERATOR,
    "/silotune.v1.OperatorService/ListEvents": _OPERATOR,
    "/silotune.v1.OperatorService/ControlJob": _OPERATOR,
    "/silotune.v1.OperatorService/GetModel": _OPERATOR,
    "/silotune.v1.OperatorService/AddBaseModel": _OPERATOR,
    "/silotune.v1.OperatorService/ListBaseModels": _OPERATOR,
    "/silotune.v1.OperatorService/RemoveBaseModel": _OPERATOR,
    "/silotune.v1.OperatorService/InviteSite": _OPERATOR,
    "/silotune.v1.OperatorService/ListSites": _OPERATOR,
    "/silotune.v1.OperatorService/RevokeSite": _OPERATOR,
    "/grpc.health.v1.Health/Check": _ANYONE,
    "/grpc.health.v1.Health/Watch": _ANYONE,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _OPERATOR,
}

_log = structlog.get_logger("rpc")

Around = Callable[[grpc.aio.ServicerContext], AbstractAsyncContextManager[None]]


class Outcome(grpc.aio.ServerInterceptor):
    """Turns whatever a call raises into its gRPC status, counts it, times it and logs it. The outermost."""

    def __init__(self, *, metrics: Metrics) -> None:
        self._metrics = metrics

    async def intercept_service(self, continuation, details):
        handler = await continuation(details)
        return handler and _wrap(handler, lambda context: self._around(details.method, context))

    @asynccontextmanager
    async def _around(self, method: str, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        begun, code = time.monotonic(), "OK"
        try:
            yield
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except grpc.aio.AbortError:
            code = "ABORTED_BY_LIBRARY"
            raise
        except Exception as error:
            ours = _as_ours(error, method=method)
            code = ours.code
            status = grpc.StatusCode[code]
            details = to_details(ours, code_number=status.value[0])
            await context.abort(status, ours.message, trailing_metadata=((DETAILS_KEY, details),))
        finally:
            seconds = time.monotonic() - begun
            short = method.rsplit(".", 1)[-1]
            self._metrics.rpc_seconds.labels(method=short, code=code).observe(seconds)
            caller = CALLER.get()
            _log.debug(
                "call ended",
                method=short,
                code=code,
                caller=caller.identity.name if caller else None,
                seconds=round(seconds, 4),
            )


class Gate(grpc.aio.ServerInterceptor):
    """Lets a call through when its certificate is good now, its site is enrolled now, and its role may call it."""

    def __init__(
        self,
        *,
        sites: Callable[[Collection[str]], Mapping[str, SiteRow]],
        unix_seconds: Callable[[], float] = time.time,
        insecure: bool = False,
    ) -> None:
        """`sites(names)` answers with their registry rows; it may block and runs in a thread."""
        self._sites = sites
        self._unix_seconds = unix_seconds
        self._insecure = insecure
        # Rows of all who call, read together: one reading a second, however many sites wait.
        self._rows: Mapping[str, SiteRow] = {}
        self._read_at = float("-inf")
        self._wanted: set[str] = set()
        self._turn = asyncio.Lock()
        self._next: asyncio.Task[Mapping[str, SiteRow]] | None = None

    async def intercept_service(self, continuation, details):
        handler = await continuation(details)
        return handler and _wrap(handler, lambda context: self._around(details.method, context))

    @asynccontextmanager
    async def _around(self, method: str, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        certificate = _insecure_certificate(context) if self._insecure else _certificate(context)
        admitted = Admitted(certificate, self)
        # Each call is a task of its own, and so is its context.
        CALLER.set(admitted)
        await admitted.check()
        if admitted.identity.role not in ACCESS.get(method, frozenset()):
            raise Forbidden(f"A certificate of role {admitted.identity.role.value} may not call {method}.")
        async with _while_admitted(admitted):
            yield

    async def check(self, certificate: _Certificate) -> None:
        identity = certificate.identity
        if self._unix_seconds() >= certificate.not_after_unix_seconds:
            raise Unauthenticated(
                f"The certificate of {identity.name} has expired.",
                hint="A site enrolls again with a new token; an operator runs `silotune-coordinator operator`.",
            )
        # Operators have no registry row: their certificates are made with the CA key itself.
        if identity.role is Role.OPERATOR:
            return
        row = await self._row(identity)
        if row is None or row.state == "INVITED" or row.role is not identity.role:
            raise Unauthenticated(
                f"{identity.name} is not enrolled as {identity.role.value} here.", hint="Enroll with a new token."
            )
        if row.state != "ENROLLED" or certificate.issued_unix_seconds < row.enrolled_unix_seconds - 1:
            raise Unauthenticated(
                f"The enrollment of {identity.name} was revoked.", hint="The operator can invite the site again."
            )

    async def _row(self, identity: Identity) -> SiteRow | None:
        known = self._rows.get(identity.name)
        is_fresh = time.monotonic() - self._read_at < REGISTRY_CACHE_SECONDS
        # Who is to be refused is looked up first: a site that was revoked may have enrolled again since.
        if known and is_fresh and (known.state, known.role) == ("ENROLLED", identity.role):
            return known
        self._wanted.add(identity.name)
        if self._next is None:
            self._next = asyncio.create_task(self._read_in_turn())
        # One whose call ends does not take the reading away from the others.
        return (await asyncio.shield(self._next)).get(identity.name)

    async def _read_in_turn(self) -> Mapping[str, SiteRow]:
        async with self._turn:
            # Whoever asks from here on needs a later reading.
            self._next = None
            wanted, self._wanted = {*self._rows, *self._wanted}, set()
            read_at = time.monotonic()
            rows = await asyncio.to_thread(self._sites, wanted)
            self._rows, self._read_at = rows, read_at
            return rows


@dataclass(frozen=True)
class Admitted:
    """wire.Caller of one call."""

    certificate: _Certificate
    gate: Gate

    @property
    def identity(self) -> Identity:
        return self.certificate.identity

    async def check(self) -> None:
        await self.gate.check(self.certificate)


@asynccontextmanager
async def _while_admitted(admitted: Admitted) -> AsyncIterator[None]:
    """Cuts the call off when its certificate expires or its site is revoked, wherever the call waits."""
    call = asyncio.current_task()
    assert call is not None
    refused: list[Unauthenticated] = []

    async def watch() -> None:
        while not refused:
            await asyncio.sleep(RECHECK_SECONDS)
            try:
                await admitted.check()
            except Unauthenticated as error:
                refused.append(error)
                call.cancel()
            except SilotuneError:
                # The registry cannot be asked now, which is no reason to end what was let in.
                continue
            except Exception:
                _log.exception("a call could not be checked")

    watching = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not refused:
            raise
        call.uncancel()
        raise refused[0] from None
    finally:
        watching.cancel()


class RateLimit(grpc.aio.ServerInterceptor):
    """A token bucket for each peer address, for the listener where nobody is known yet."""

    def __init__(self, *, burst: int = 60, per_second: float = 1.0, peers: int = 4096) -> None:
        self._burst = burst
        self._per_second = per_second
        self._peers = peers
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def intercept_service(self, continuation, details):
        handler = await continuation(details)
        return handler and _wrap(handler, self._around)

    @asynccontextmanager
    async def _around(self, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        peer = context.peer().rsplit(":", 1)[0]
        now = time.monotonic()
        tokens, at = self._buckets.pop(peer, (float(self._burst), now))
        tokens = min(self._burst, tokens + (now - at) * self._per_second)
        self._buckets[peer] = (max(0.0, tokens - 1), now)
        if len(self._buckets) > self._peers:
            self._buckets.popitem(last=False)
        if tokens < 1:
            raise Unavailable("Too many enrollments came from this address.", hint="Try again in a minute.")
        yield


@dataclass(frozen=True)
class _Certificate:
    identity: Identity
    issued_unix_seconds: float
    not_after_unix_seconds: float


def _certificate(context: grpc.aio.ServicerContext) -> _Certificate:
    presented = context.auth_context().get("x509_pem_cert")
    if not presented:
        raise Unauthenticated("This call needs a client certificate.")
    return _read_certificate(next(iter(presented)))


@lru_cache(maxsize=4096)
def _read_certificate(pem: bytes) -> _Certificate:
    certificate = x509.load_pem_x509_certificate(pem)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise Unauthenticated("The client certificate names nobody.") from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise Unauthenticated("The client certificate does not have exactly one identity.")
    return _Certificate(
        parse_uri(uris[0]),
        issued_unix_seconds=(certificate.not_valid_before_utc + BACKDATE).timestamp(),
        not_after_unix_seconds=certificate.not_valid_after_utc.timestamp(),
    )


def _insecure_certificate(context: grpc.aio.ServicerContext) -> _Certificate:
    for key, value in context.invocation_metadata() or ():
        if key == INSECURE_IDENTITY_KEY:
            return _Certificate(parse_uri(str(value)), float("inf"), float("inf"))
    raise Unauthenticated(f"This call needs {INSECURE_IDENTITY_KEY} in its metadata.")


def _wrap(handler: grpc.RpcMethodHandler, around: Around) -> grpc.RpcMethodHandler:
    """The same handler with `around(context)` about its behaviour, whichever of gRPC's four kinds it is."""
    streaming = (handler.request_streaming, handler.response_streaming)
    kind = "_".join("stream" if streams else "unary" for streams in streaming)
    inner = getattr(handler, kind)

    async def awaited(request: Any, context: grpc.aio.ServicerContext) -> Any:
        async with around(context):
            return await inner(request, context)

    async def generated(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        async with around(context):
            async for message in inner(request, context):
                yield message

    return handler._replace(**{kind: generated if inspect.isasyncgenfunction(inner) else awaited})  # type: ignore


def _as_ours(error: Exception, *, method: str) -> SilotuneError:
    if isinstance(error, SilotuneError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutOfSpace("The coordinator's disk is full.", hint="It goes on by itself when there is room again.")
    correlation = secrets.token_hex(6)
    _log.error("call failed", method=method, correlation_id=correlation, exc_info=error)
    return Internal(
        f"The coordinator failed on this call (id {correlation}).", hint="Its log has the details under this id."
    )
