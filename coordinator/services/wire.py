"""From a service's descriptor to its gRPC handlers.

Messages arrive as raw bytes and are parsed here: gRPC's own parsing answers INTERNAL to an undecodable request, which
would blame us for it. Streamed messages stay raw, because they are frames (protos/frames.py) and a protobuf `bytes`
field of a megabyte costs twice the time.

A method `LeaseTask` is answered by the service's `lease_task(request, caller)`. One that streams its answer gets a
third argument to send frames with; one whose request is a stream gets the frames instead of a request.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any, Protocol

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from protos.errors import InvalidInput
from protos.identity import Identity

Frames = AsyncIterator[bytes]
Send = Callable[[bytes], Awaitable[None]]


class Caller(Protocol):
    """Who makes this call, as the gate found out from its certificate."""

    @property
    def identity(self) -> Identity: ...


# Set by the gate for the duration of one call; None on the enrollment listener, where nobody is known yet.
CALLER: ContextVar[Caller | None] = ContextVar("silotune_caller", default=None)


def handlers(service: ServiceDescriptor, *, answered_by: object) -> grpc.GenericRpcHandler:
    """The handlers of every method of `service`; AttributeError when `answered_by` lacks one."""
    found = {method.name: _handler(method, getattr(answered_by, _snake(method.name))) for method in service.methods}
    return grpc.method_handlers_generic_handler(service.full_name, found)


def _handler(method: MethodDescriptor, answer: Callable[..., Awaitable[Any]]) -> grpc.RpcMethodHandler:
    request_class = GetMessageClass(method.input_type)

    async def unary(raw: bytes, _context: grpc.aio.ServicerContext) -> bytes:
        response: Message = await answer(_parse(request_class, raw), CALLER.get())
        return response.SerializeToString()

    async def downward(raw: bytes, context: grpc.aio.ServicerContext) -> None:
        await answer(_parse(request_class, raw), CALLER.get(), context.write)

    async def upward(frames: Frames, _context: grpc.aio.ServicerContext) -> bytes:
        response: Message = await answer(frames, CALLER.get())
        return response.SerializeToString()

    if method.client_streaming:
        return grpc.stream_unary_rpc_method_handler(upward)
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(downward)
    return grpc.unary_unary_rpc_method_handler(unary)


def _parse(request_class: type[Message], raw: bytes) -> Message:
    try:
        return request_class.FromString(raw)
    except DecodeError as error:
        raise InvalidInput(f"The request is not a {request_class.DESCRIPTOR.name}.") from error


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
