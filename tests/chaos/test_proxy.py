"""The network that can be told to misbehave does what it is told, and no more."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from deploy.local import free_ports
from tests.chaos.proxy import Link, Network, Weather


@pytest.fixture
def echo() -> Iterator[str]:
    """The address of a server that sends back what it gets."""
    with socket.create_server(("127.0.0.1", free_ports(1)[0])) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        def answer(connection: socket.socket) -> None:
            with connection:
                try:
                    while data := connection.recv(65536):
                        connection.sendall(data)
                except OSError:
                    pass

        threading.Thread(target=serve, daemon=True).start()
        yield "{}:{}".format(*server.getsockname())
        # Wakes the thread that waits in accept.
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def link(echo: str) -> Iterator[Link]:
    with Network() as network:
        yield network.add("alfa", port=free_ports(1)[0], upstreams=lambda: ["127.0.0.1:1", echo])


def dial(link: Link) -> socket.socket:
    host, port = link.address.split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def ask(connection: socket.socket, text: bytes) -> bytes:
    connection.sendall(text)
    return receive(connection, len(text))


def receive(connection: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count and (data := connection.recv(count - len(found))):
        found += data
    return found


def test_bytes_pass_both_ways_and_are_counted_and_a_server_that_is_down_is_passed_over(link: Link) -> None:
    with dial(link) as connection:
        assert ask(connection, b"hello") == b"hello"
        assert link.passed == {"up": 5, "down": 5}


def test_the_end_of_what_one_side_says_reaches_the_other_after_its_last_byte(link: Link) -> None:
    with dial(link) as connection:
        connection.sendall(b"x" * 300_000)
        connection.shutdown(socket.SHUT_WR)
        assert receive(connection, 300_001) == b"x" * 300_000


@pytest.mark.parametrize("direction", ["up", "down"])
def test_what_meets_a_cut_waits_and_passes_when_it_is_healed(link: Link, direction: str) -> None:
    with dial(link) as connection:
        assert ask(connection, b"before") == b"before"
        link.set(Weather(cut={direction}))  # type: ignore[arg-type]
        connection.sendall(b"during")
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(20)
        link.heal()
        assert receive(connection, 6) == b"during"


def test_a_reset_ends_every_connection_at_once(link: Link) -> None:
    with dial(link) as connection:
        assert ask(connection, b"hello") == b"hello"
        link.reset()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    with dial(link) as connection:
        assert ask(connection, b"again") == b"again"


def test_exactly_one_byte_of_one_piece_is_corrupted(link: Link) -> None:
    link.set(Weather(corrupt={"up"}))
    with dial(link) as connection:
        got = ask(connection, b"\0" * 100)
        assert sum(byte != 0 for byte in got) == 1
        assert ask(connection, b"\0" * 100) == b"\0" * 100


def test_who_dials_while_connections_are_refused_is_turned_away(link: Link) -> None:
    link.set(Weather(refuse=True))
    with pytest.raises(ConnectionResetError), dial(link) as connection:
        connection.recv(1)
    link.heal()
    with dial(link) as connection:
        assert ask(connection, b"again") == b"again"
