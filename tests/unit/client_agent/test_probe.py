from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from client_agent.home import Home
from client_agent.identity import CERTIFICATE, KEY, make_csr
from client_agent.probe import Probe, probe
from client_agent.route import Route
from tests.unit.client_agent.coordinator_in_memory import Authority, Coordinator


async def look(address: str, authority: Authority, own: tuple[Path, Path] | None = None) -> Probe:
    return await asyncio.to_thread(probe, address, route=Route(authority.pem), own=own)


async def test_a_reachable_coordinator_is_told_with_its_tls_version(home: Home, coordinator: Coordinator) -> None:
    own = (home.identity / CERTIFICATE, home.identity / KEY)
    found = await look(coordinator.address, coordinator.authority, own)
    assert found.reachable
    assert "TLSv1.3" in found.sentence


async def test_a_certificate_that_the_coordinator_does_not_take_is_told(home: Home, coordinator: Coordinator) -> None:
    stranger = Authority().sign(make_csr((home.identity / KEY).read_bytes(), name="st-olav"), name="st-olav")
    (home.identity / CERTIFICATE).write_bytes(stranger)
    found = await look(coordinator.address, coordinator.authority, (home.identity / CERTIFICATE, home.identity / KEY))
    assert not found.reachable
    assert "does not take this agent's certificate" in found.sentence


async def test_a_proxy_that_inspects_tls_is_named_by_its_issuer(coordinator: Coordinator) -> None:
    found = await look(coordinator.enrollment_address, Authority("ours"))
    assert not found.reachable
    assert "was issued by 'test federation'" in found.sentence
    assert "network team" in found.sentence


async def test_each_other_reason_has_words_of_its_own(coordinator: Coordinator) -> None:
    authority = coordinator.authority
    assert "nothing listens at 127.0.0.1:1" in (await look("127.0.0.1:1", authority)).sentence
    port = coordinator.address.rpartition(":")[2]
    assert "not for the name 127.1" in (await look(f"127.1:{port}", authority)).sentence
    assert "nowhere.invalid is not known" in (await look("nowhere.invalid:9443", authority)).sentence


async def test_a_port_that_speaks_something_else_is_told(coordinator: Coordinator) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH\r\n")
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0, family=socket.AF_INET)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    assert "not with TLS" in (await look(address, coordinator.authority)).sentence
    server.close()
