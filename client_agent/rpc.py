"""From gRPC's errors to ours, and how long to wait before trying again.

Every call has a deadline: a stopped server answers nothing, and keepalive notices only a dead connection.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import grpc

from protos.errors import DETAILS_KEY, SilotuneError, Unavailable, from_details

CALL_TIMEOUT_SECONDS = 30
# The longest pause bounds how late an agent notices that its coordinator is back.
FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 0.25, 10.0

UNREACHABLE = "The coordinator cannot be reached"
TLS_FAILED = "the TLS handshake failed"
CLOSED = "it closed the connection"
NOT_OF_OUR_CA = "its certificate was not issued by this federation's CA"

Answer = TypeVar("Answer")


def from_rpc_error(error: Any) -> SilotuneError:
    """The error that the coordinator raised, or what a bare transport failure means here.

    `error` is what grpc or grpc.aio raised: it has code(), details() and trailing_metadata().
    """
    code = error.code().name
    packed = None
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY:
            packed = value
    found = from_details(code, error.details() or "", packed)
    # A broken connection may also show as INTERNAL or UNKNOWN; the coordinator's own errors always have details.
    if packed is None and (isinstance(found, Unavailable) or code in ("INTERNAL", "UNKNOWN")):
        why = _plain(code, error.details() or "")
        return Unavailable(f"{UNREACHABLE}: {why}.", hint="`silotune-agent check` finds out more.")
    return found


def _plain(code: str, details: str) -> str:
    """gRPC's own text holds addresses and library line numbers; the part that a person can use is short."""
    if code == "DEADLINE_EXCEEDED":
        return "it did not answer in time"
    known = {
        "HTTP proxy returned response code 407": "the proxy wants another login",
        "HTTP proxy returned response code": "the proxy refuses the way to it",
        "CERTIFICATE_VERIFY_FAILED": NOT_OF_OUR_CA,
        "Connection refused": "nothing listens at its address",
        "Hostname Verification Check failed": "its certificate is for another host name",
        "Peer name": "its certificate is for another host name",
        "Name or service not known": "its host name is not known",
        "Domain name not found": "its host name is not known",
        "Temporary failure in name resolution": "its host name could not be looked up",
        "Network is unreachable": "the network is unreachable",
        "No route to host": "there is no route to its host",
        "Socket closed": CLOSED,
        "Connection reset": "the connection was reset",
        "Handshake": TLS_FAILED,
        "handshake failed": TLS_FAILED,
    }
    for mark, words in known.items():
        if mark in details:
            return words
    return details.split("\n")[0][:200].rstrip(".") or code


async def call(
    method: Callable[..., Awaitable[Answer]], request: object, *, timeout_seconds: float = CALL_TIMEOUT_SECONDS
) -> Answer:
    """One unary call. SilotuneError as the coordinator raised it; Unavailable when there was no answer."""
    try:
        return await method(request, timeout=timeout_seconds)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


def delays() -> Iterator[float]:
    """Seconds before each next attempt: doubling, each drawn anew so that sites do not come as one."""
    ceiling = FIRST_DELAY_SECONDS
    while True:
        yield random.uniform(ceiling / 2, ceiling)
        ceiling = min(2 * ceiling, LONGEST_DELAY_SECONDS)
