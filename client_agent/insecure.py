"""Talking to a coordinator without TLS: for benchmarks on one machine, never to another one."""

from __future__ import annotations

from typing import Any

import grpc

from protos.channel import CLIENT_OPTIONS
from protos.errors import Conflict
from protos.identity import INSECURE_IDENTITY_KEY


def open_channel(address: str, *, uri: str) -> grpc.aio.Channel:
    """A channel that says who it is in its metadata. Conflict when `address` is not this machine's loopback."""
    if not address.startswith("127.0.0.1:"):
        raise Conflict(f"--insecure-loopback talks to 127.0.0.1 only, and the coordinator is at {address}.")
    names = [kind(uri) for kind in (_UnaryUnary, _UnaryStream, _StreamUnary)]
    return grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS, interceptors=names)


class _Named:
    def __init__(self, uri: str) -> None:
        self._uri = uri

    async def _named(self, continuation: Any, details: Any, request: Any) -> Any:
        metadata = grpc.aio.Metadata(*(details.metadata or ()), (INSECURE_IDENTITY_KEY, self._uri))
        return await continuation(details._replace(metadata=metadata), request)


class _UnaryUnary(_Named, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._named(continuation, client_call_details, request)


class _UnaryStream(_Named, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._named(continuation, client_call_details, request)


class _StreamUnary(_Named, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._named(continuation, client_call_details, request_iterator)
