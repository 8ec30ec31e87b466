"""A network that can be told to misbehave: one TCP relay for each site, between its agent and the coordinators.

Bytes that cannot pass wait, as they would in the sender's kernel when a cable is out: healing lets them go on, nothing
is told to either end. With several coordinators it is the load balancer as well: a new connection goes to one that
listens. All relays live on one event loop in a thread of its own; faults are set from any thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal

Direction = Literal["up", "down"]  # towards the coordinator, towards the agent
DIRECTIONS: tuple[Direction, Direction] = ("up", "down")
PIECE_BYTES = 1 << 16
CONNECT_SECONDS = 5.0


@dataclass
class Weather:
    """What one link does to what passes now."""

    cut: set[Direction] = field(default_factory=set)
    delay_seconds: float = 0.0
    bytes_a_second: float = 0.0  # 0: as fast as it goes
    refuse: bool = False
    # The next piece in this direction gets one wrong byte.
    corrupt: set[Direction] = field(default_factory=set)
    # Nothing more passes once so many bytes have, since the start of the link.
    limit_bytes: dict[Direction, int] = field(default_factory=dict)


class Link:
    """The relay of one site. `passed` counts its bytes by direction since the start."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, upstreams: Callable[[], list[str]]) -> None:
        self._loop = loop
        self._upstreams = upstreams
        self._turn = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._weather = Weather()
        self._changed = asyncio.Event()
        self.passed: dict[Direction, int] = dict.fromkeys(DIRECTIONS, 0)
        # Live ones, through to a coordinator.
        self.connections = 0
        self.address = ""

    # --- from any thread

    def set(self, weather: Weather) -> None:
        self._loop.call_soon_threadsafe(self._set, weather)

    def heal(self) -> None:
        self.set(Weather())

    def reset(self) -> None:
        """Every connection of the site ends with RST."""
        self._loop.call_soon_threadsafe(self._reset)

    # --- on the loop

    async def listen(self, host: str, port: int) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, host, port)
        self.address = "{}:{}".format(*server.sockets[0].getsockname()[:2])
        return server

    def _set(self, weather: Weather) -> None:
        self._weather = weather
        self._changed.set()
        self._changed = asyncio.Event()

    def _reset(self) -> None:
        for writer in self._writers:
            _abort(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await self._relay(reader, writer)
        except* (OSError, asyncio.CancelledError):
            pass  # One end is gone, and the other is told so below; or the network itself ends.
        finally:
            self._writers.discard(writer)
            _abort(writer)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._weather.refuse:
            return
        upstream = await self._connect()
        if upstream is None:
            return
        far_reader, far_writer = upstream
        self._writers.add(far_writer)
        self.connections += 1
        try:
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(reader, far_writer, "up"))
                pumps.create_task(self._pump(far_reader, writer, "down"))
            # Both ends have said that they are done: what is still on its way arrives.
            for one in (writer, far_writer):
                one.close()
                await one.wait_closed()
        finally:
            self.connections -= 1
            self._writers.discard(far_writer)
            _abort(far_writer)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """A connection to the next coordinator in turn that takes one."""
        upstreams = self._upstreams()
        self._turn += 1
        for place in range(len(upstreams)):
            host, _, port = upstreams[(self._turn + place) % len(upstreams)].rpartition(":")
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(CONNECT_SECONDS):
                    return await asyncio.open_connection(host, int(port))
        return None

    def _is_cut(self, direction: Direction) -> bool:
        weather = self._weather
        return direction in weather.cut or self.passed[direction] >= weather.limit_bytes.get(direction, math.inf)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction) -> None:
        while True:
            try:
                data = await reader.read(PIECE_BYTES)
            finally:
                # Neither bytes nor the end of the connection pass a cut.
                while self._is_cut(direction):
                    await self._changed.wait()
            if not data:
                break
            weather = self._weather
            if weather.delay_seconds:
                await asyncio.sleep(weather.delay_seconds)
            if weather.bytes_a_second:
                await asyncio.sleep(len(data) / weather.bytes_a_second)
            if direction in weather.corrupt:
                weather.corrupt.discard(direction)
                middle = len(data) // 2
                data = data[:middle] + bytes([data[middle] ^ 0x40]) + data[middle + 1 :]
            self.passed[direction] += len(data)
            writer.write(data)
            await writer.drain()
        writer.write_eof()


class Network:
    """The relays of a federation, by site. Use as a context manager."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self.links: dict[str, Link] = {}

    def __enter__(self) -> Network:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def add(self, site: str, *, port: int, upstreams: Callable[[], list[str]], host: str = "127.0.0.1") -> Link:
        async def make() -> Link:
            link = Link(self._loop, upstreams=upstreams)
            await link.listen(host, port)
            return link

        self.links[site] = self._call(make())
        return self.links[site]

    def heal(self) -> None:
        for link in self.links.values():
            link.heal()

    def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _end(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _abort(writer: asyncio.StreamWriter) -> None:
    """Ends a connection with RST: with a linger time of zero the kernel sends no FIN."""
    found = writer.get_extra_info("socket")
    if found is not None:
        with contextlib.suppress(OSError):
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    writer.transport.abort()
