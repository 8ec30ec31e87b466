from __future__ import annotations

import asyncio
import itertools

import pytest

from client_agent import identity, rpc
from client_agent.home import Home
from client_agent.session import DEFECT_ATTEMPTS, Session, Waiting
from protos.errors import Internal, NotFound, Unauthenticated, Unavailable
from protos.v1 import agent_pb2
from tests.unit.client_agent.coordinator_in_memory import Authority, Coordinator
from tests.unit.client_agent.work_to_do import task


async def test_work_is_leased_over_mutual_tls(home: Home, coordinator: Coordinator) -> None:
    coordinator.add_task(task("init", round=0))
    session = Session(home, waiting=Waiting())
    answer = await session.lease(agent_pb2.AgentInfo(version="1"), holding=["a"], wait_seconds=0)
    assert answer.task.id == "init-0"
    assert answer.task.generation == 1
    assert list(coordinator.asked[0].holding) == ["a"]
    assert session.connected
    await session.close()


async def test_the_coordinators_own_error_arrives_as_the_same_class(home: Home, coordinator: Coordinator) -> None:
    session = Session(home, waiting=Waiting())
    with pytest.raises(NotFound, match="no such task"):
        await session.heartbeat(agent_pb2.HeartbeatRequest(task_id="nobody"))
    assert session.connected
    await session.close()


async def test_an_outage_is_waited_for_and_said_once(home: Home, coordinator: Coordinator) -> None:
    waiting = Waiting()
    session = Session(home, waiting=waiting)
    coordinator.down = True
    attempts = 0

    async def attempt() -> agent_pb2.LeaseTaskResponse:
        nonlocal attempts
        attempts += 1
        if attempts == 3:
            assert waiting.sentence == "The coordinator is being restarted. Trying again."
            assert not session.connected
            coordinator.down = False
        return await session.lease(agent_pb2.AgentInfo(), holding=[], wait_seconds=0)

    answer = await session.patiently(attempt)
    assert attempts == 3
    assert answer.sentence == "No job needs this site now."
    assert waiting.sentence == ""
    await session.close()


async def test_a_defect_of_the_coordinator_that_passes_costs_no_work(home: Home) -> None:
    waiting = Waiting()
    session = Session(home, waiting=waiting)
    attempts = 0

    async def attempt() -> str:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            raise Internal("The coordinator failed on this call.")
        assert waiting.sentence == "The coordinator failed on this call. Trying again."
        return "sealed"

    assert await session.patiently(attempt) == "sealed"
    await session.close()


async def test_a_defect_of_the_coordinator_that_stays_is_reported(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "LONGEST_DELAY_SECONDS", 0.01)
    session = Session(home, waiting=Waiting())
    attempts = 0

    async def attempt() -> None:
        nonlocal attempts
        attempts += 1
        raise Internal("The coordinator failed on this call.")

    with pytest.raises(Internal):
        await session.patiently(attempt)
    assert attempts == DEFECT_ATTEMPTS
    await session.close()


async def test_an_unreachable_coordinator_is_explained_without_library_jargon(
    home: Home, coordinator: Coordinator
) -> None:
    facts = (home.identity / "identity.json").read_text()
    (home.identity / "identity.json").write_text(facts.replace(coordinator.address, "127.0.0.1:1"))
    session = Session(home, waiting=Waiting())
    with pytest.raises(Unavailable) as error:
        await session.heartbeat(agent_pb2.HeartbeatRequest())
    assert error.value.message == "The coordinator cannot be reached: nothing listens at its address."
    assert "silotune-agent check" in error.value.hint
    await session.close()


async def test_renewal_swaps_key_and_certificate_and_the_next_call_uses_them(
    home: Home, coordinator: Coordinator
) -> None:
    session = Session(home, waiting=Waiting())
    before = session.identity
    await session.lease(agent_pb2.AgentInfo(), holding=[], wait_seconds=0)
    after = await session.renew()
    assert after.key != before.key
    assert identity.load(home.identity) == after
    await session.lease(agent_pb2.AgentInfo(), holding=[], wait_seconds=0)
    await session.close()


async def test_with_an_expired_certificate_nothing_is_dialled(home: Home, coordinator: Coordinator) -> None:
    key = (home.identity / identity.KEY).read_bytes()
    csr = identity.make_csr(key, name="st-olav")
    expired = coordinator.authority.sign(csr, name="st-olav", days=1, age_days=3)
    (home.identity / identity.CERTIFICATE).write_bytes(expired)
    session = Session(home, waiting=Waiting())
    with pytest.raises(Unauthenticated, match="expired"):
        await session.lease(agent_pb2.AgentInfo(), holding=[], wait_seconds=0)
    assert not coordinator.asked


def test_pauses_grow_to_a_bound_and_are_never_zero() -> None:
    pauses = list(itertools.islice(rpc.delays(), 20))
    assert all(0 < pause <= rpc.LONGEST_DELAY_SECONDS for pause in pauses)
    assert pauses[0] <= rpc.FIRST_DELAY_SECONDS < rpc.LONGEST_DELAY_SECONDS / 2 <= pauses[-1]


async def test_a_proxy_that_inspects_tls_is_named_while_it_is_waited_for(home: Home, coordinator: Coordinator) -> None:
    (home.identity / identity.CA).write_bytes(Authority("ours").pem)
    waiting = Waiting()
    session = Session(home, waiting=waiting)
    trying = asyncio.create_task(
        session.patiently(lambda: session.lease(agent_pb2.AgentInfo(), holding=[], wait_seconds=0))
    )
    await coordinator.until(lambda: waiting.sentence)
    trying.cancel()
    assert "was issued by 'test federation', not by this federation; a proxy that inspects TLS" in waiting.sentence
    await session.close()


async def test_a_certificate_that_is_not_taken_is_told_while_it_is_waited_for(
    home: Home, coordinator: Coordinator
) -> None:
    """gRPC itself says "socket closed": TLS 1.3 refuses a client's certificate only after the handshake."""
    key = (home.identity / identity.KEY).read_bytes()
    stranger = Authority().sign(identity.make_csr(key, name="st-olav"), name="st-olav")
    (home.identity / identity.CERTIFICATE).write_bytes(stranger)
    waiting = Waiting()
    session = Session(home, waiting=waiting)
    trying = asyncio.create_task(
        session.patiently(lambda: session.lease(agent_pb2.AgentInfo(), holding=[], wait_seconds=0))
    )
    await coordinator.until(lambda: waiting.sentence)
    trying.cancel()
    assert "does not take this agent's certificate; it may have expired" in waiting.sentence
    await session.close()
