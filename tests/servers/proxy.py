"""What stands between a hospital and a coordinator, for tests: CONNECT proxy, TLS inspection, forgetful NAT."""

from __future__ import annotations

import asyncio
import base64
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from typing import TypeVar

Server = TypeVar("Server")
Accept = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def _listening(accept: Accept, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """The port; every connection ends with the block."""
    tasks: set[asyncio.Task[None]] = set()

    async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A side that goes away in the middle is what these servers are for.
        with suppress(OSError, asyncio.IncompleteReadError):
            await accept(reader, writer)
        writer.close()

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(guarded(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(begin, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def in_background(serving: AbstractAsyncContextManager[Server]) -> Iterator[Server]:
    """The same server in a thread of its own, for tests that are not coroutines."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        server = asyncio.run_coroutine_threadsafe(serving.__aenter__(), loop).result()
        yield server
        asyncio.run_coroutine_threadsafe(serving.__aexit__(None, None, None), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class ConnectProxy:
    """`async with ConnectProxy().serving() as proxy`; what it does may be changed while it serves."""

    def __init__(self) -> None:
        self.port = 0
        # The host:port of each CONNECT, and how many tunnels were opened.
        self.asked: list[str] = []
        self.tunnels = 0
        # The answer to every CONNECT, such as "403 Forbidden"; empty: the tunnel.
        self.refusal = ""
        # "user:password" that must be given; empty: none.
        self.login = ""
        # What the proxy knows of names: host:port asked for -> host:port dialled. A name that it lacks is unknown.
        self.names: dict[str, str] = {}
        # With it the proxy ends TLS, shows this certificate, and goes on to the coordinator with TLS of its own.
        self.inspecting: ssl.SSLContext | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.login}@{self.address}" if self.login else f"http://{self.address}"

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[ConnectProxy]:
        async with _listening(self._serve) as self.port:
            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        asked = head.split()[1]
        self.asked.append(asked)
        if problem := self._problem(head, asked):
            writer.write(f"HTTP/1.1 {problem}\r\nContent-Length: 0\r\n\r\n".encode())
            await writer.drain()
            return
        self.tunnels += 1
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await writer.drain()
        if self.inspecting is not None:
            await writer.start_tls(self.inspecting)
        await _join(reader, writer, to=self.names[asked], tls=self.inspecting is not None)

    def _problem(self, head: str, asked: str) -> str:
        given = f"Proxy-Authorization: Basic {base64.b64encode(self.login.encode()).decode()}\r\n"
        if self.login and given.lower() not in head.lower():
            return "407 Proxy Authentication Required"
        return self.refusal or ("" if asked in self.names else "502 Bad Gateway")


@asynccontextmanager
async def inspecting_tls(context: ssl.SSLContext, *, before: str) -> AsyncIterator[str]:
    """The address of a middlebox that shows the certificate of `context` and goes on to the address `before`."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _join(reader, writer, to=before, tls=True)

    async with _listening(accept, tls=context) as port:
        yield f"127.0.0.1:{port}"


class ForgetfulNat:
    """Passes TCP on to one address. `forget()`: what comes on flows that exist is swallowed, and nobody is told."""

    def __init__(self, to: str) -> None:
        self.address = ""
        self.flows = 0
        # Flows that the agent's side closed by itself.
        self.given_up = 0
        self._to = to
        self._forgotten = asyncio.Event()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[ForgetfulNat]:
        async with _listening(self._serve) as port:
            self.address = f"127.0.0.1:{port}"
            yield self

    def forget(self) -> None:
        self._forgotten.set()
        self._forgotten = asyncio.Event()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.flows += 1
        forgotten = self._forgotten
        host, _, port = self._to.rpartition(":")
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        outward = asyncio.ensure_future(_copy(reader, far_writer, unless=forgotten))
        inward = asyncio.ensure_future(_copy(far_reader, writer, unless=forgotten))
        try:
            await outward
            self.given_up += 1
        finally:
            inward.cancel()
            far_writer.close()


async def _join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, to: str, tls: bool) -> None:
    host, _, port = to.rpartition(":")
    context = None
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
    far_reader, far_writer = await asyncio.open_connection(host, int(port), ssl=context)
    try:
        await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))
    finally:
        far_writer.close()


async def _copy(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, unless: asyncio.Event | None = None
) -> None:
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            if unless is None or not unless.is_set():
                writer.write(data)
                await writer.drain()
        if unless is None or not unless.is_set():
            writer.close()
