from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from client_agent import identity
from client_agent.home import Home
from tests.unit.client_agent.coordinator_in_memory import Coordinator


@pytest.fixture
async def coordinator() -> AsyncIterator[Coordinator]:
    async with Coordinator().serving() as running:
        yield running
    assert running.without_deadline == []


@pytest.fixture
async def home(tmp_path: Path, coordinator: Coordinator) -> Home:
    """The home of an agent that is enrolled as st-olav and whose policy allows synthetic tasks."""
    home = Home(tmp_path / "agent")
    home.create()
    home.site_file.write_text('[policy]\ntasks = ["*"]\n[http]\naddress = "127.0.0.1:0"\n')
    token = coordinator.authority.token("st-olav", address=coordinator.enrollment_address)
    await asyncio.to_thread(identity.enroll, home.identity, token=token, coordinator=coordinator.address)
    return home
