"""The floors below a round: the same bytes over bare gRPC streams, and over streams that also digest and store.

A server process and a client process with one channel for each site; every site reads the payload and writes it back,
as in a round, with 1 MiB frames of raw bytes and the channel options of the product. `durable` adds what no durable
transfer can do without: a BLAKE3 digest at both ends, a file at the receiving end, and its fsync.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import shutil
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc

from protos.channel import CLIENT_OPTIONS, SERVER_OPTIONS
from protos.digests import new_hasher
from protos.frames import FRAME_BYTES

READ, WRITE = "/floor/Read", "/floor/Write"


@dataclass(frozen=True)
class Tls:
    """Paths of PEM files: what the coordinator and one agent of the measured federation use."""

    ca: str
    server_certificate: str
    server_key: str
    client_certificate: str
    client_key: str


@dataclass(frozen=True)
class Floor:
    """One read and one write of the payload by every site."""

    seconds: float
    server_cpu_seconds: float
    client_cpu_seconds: float


def measure(*, payload_bytes: int, sites: int, durable: bool, tls: Tls | None, directory: Path) -> Floor:
    """Starts both processes, moves the bytes once to warm up with one frame, then once for the clock."""
    context = multiprocessing.get_context("spawn")
    near_server, far_server = context.Pipe()
    near_client, far_client = context.Pipe()
    folder = directory / "floor"
    folder.mkdir(parents=True, exist_ok=True)
    server = context.Process(target=_serve, args=(far_server, payload_bytes, durable, tls, str(folder)))
    server.start()
    port = near_server.recv()
    client = context.Process(target=_drive, args=(far_client, port, payload_bytes, sites, durable, tls, str(folder)))
    client.start()
    seconds, client_cpu = near_client.recv()
    near_server.send("stop")
    server_cpu = near_server.recv()
    client.join()
    server.join()
    shutil.rmtree(folder)
    return Floor(seconds, server_cpu, client_cpu)


class _Sink:
    """Where received bytes go: nowhere, or through a digest into a file that is synced at the end."""

    def __init__(self, path: Path | None) -> None:
        self._hasher = new_hasher() if path else None
        self._file = path.open("wb", buffering=0) if path else None

    def take(self, data: bytes) -> None:
        if self._hasher is not None and self._file is not None:
            self._hasher.update(data)
            self._file.write(data)

    def close(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()


async def _drain(stream: Any, path: Path | None, pool: ThreadPoolExecutor) -> int:
    loop, sink, total, pending = asyncio.get_running_loop(), _Sink(path), 0, None
    async for frame in stream:
        total += len(frame)
        if path is not None:
            if pending is not None:
                await pending
            pending = loop.run_in_executor(pool, sink.take, frame)
    if pending is not None:
        await pending
    await loop.run_in_executor(pool, sink.close)
    return total


async def _frames(source: Path | None, payload_bytes: int, pool: ThreadPoolExecutor) -> AsyncIterator[bytes]:
    """The payload in frames: one buffer again and again, or read and digested from a file."""
    constant, loop = os.urandom(FRAME_BYTES), asyncio.get_running_loop()
    if source is None:
        for start in range(0, payload_bytes, FRAME_BYTES):
            size = min(FRAME_BYTES, payload_bytes - start)
            yield constant if size == FRAME_BYTES else constant[:size]
        return
    hasher = new_hasher()
    with source.open("rb", buffering=0) as file:

        def read() -> bytes:
            data = file.read(FRAME_BYTES)
            hasher.update(data)
            return data

        while data := await loop.run_in_executor(pool, read):
            yield data


def _serve(pipe: Connection, payload_bytes: int, durable: bool, tls: Tls | None, folder: str) -> None:
    asyncio.run(_serve_async(pipe, payload_bytes, durable, tls, Path(folder)))


async def _serve_async(pipe: Connection, payload_bytes: int, durable: bool, tls: Tls | None, folder: Path) -> None:
    pool = ThreadPoolExecutor(8)
    model = folder / "model" if durable else None
    if model:
        model.write_bytes(os.urandom(payload_bytes))
    uploads = 0

    async def read(_: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        async for frame in _frames(model, payload_bytes, pool):
            yield frame

    async def write(stream: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes:
        nonlocal uploads
        uploads += 1
        await _drain(stream, folder / f"upload-{uploads}" if durable else None, pool)
        return b""

    handlers: dict[str, Any] = {
        "Read": grpc.unary_stream_rpc_method_handler(read),
        "Write": grpc.stream_unary_rpc_method_handler(write),
    }
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("floor", handlers),))
    if tls is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        pair = (Path(tls.server_key).read_bytes(), Path(tls.server_certificate).read_bytes())
        credentials = grpc.ssl_server_credentials([pair], Path(tls.ca).read_bytes(), require_client_auth=True)
        port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    before = time.process_time()
    pipe.send(port)
    await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
    await server.stop(None)
    pipe.send(time.process_time() - before)


def _drive(
    pipe: Connection, port: int, payload_bytes: int, sites: int, durable: bool, tls: Tls | None, folder: str
) -> None:
    pipe.send(asyncio.run(_drive_async(port, payload_bytes, sites, durable, tls, Path(folder))))


async def _drive_async(
    port: int, payload_bytes: int, sites: int, durable: bool, tls: Tls | None, folder: Path
) -> tuple[float, float]:
    pool = ThreadPoolExecutor(8)
    address = f"127.0.0.1:{port}"
    if tls is None:
        channels = [grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS) for _ in range(sites)]
    else:
        credentials = grpc.ssl_channel_credentials(
            Path(tls.ca).read_bytes(), Path(tls.client_key).read_bytes(), Path(tls.client_certificate).read_bytes()
        )
        channels = [grpc.aio.secure_channel(address, credentials, options=CLIENT_OPTIONS) for _ in range(sites)]
    await asyncio.gather(*(channel.channel_ready() for channel in channels))

    def call(method: Any, request: Any) -> Any:
        # The stubs type a method without serialisers as one that cannot be called.
        return method(request)

    async def round_trip(number: int, channel: grpc.aio.Channel) -> None:
        path = folder / f"site-{number}" if durable else None
        await _drain(call(channel.unary_stream(READ), b""), path, pool)
        await call(channel.stream_unary(WRITE), _frames(path, payload_bytes, pool))

    wall, cpu = time.monotonic(), time.process_time()
    await asyncio.gather(*(round_trip(number, channel) for number, channel in enumerate(channels)))
    spent = time.monotonic() - wall, time.process_time() - cpu
    for channel in channels:
        await channel.close()
    return spent


def as_json(floor: Floor) -> dict[str, float]:
    return asdict(floor)
