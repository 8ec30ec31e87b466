"""An agent whose coordinator has several replicas, each of which may be killed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from client_agent import identity, transfers
from client_agent.checks import all_findings
from client_agent.home import Home
from client_agent.session import Session, Waiting
from protos.digests import digest_of
from protos.errors import Unavailable
from protos.v1 import agent_pb2
from protos.v1.manifest_pb2 import BlobRef
from tests.unit.client_agent.coordinator_in_memory import Coordinator
from tests.unit.client_agent.work_to_do import task

MIB = 1 << 20
DATA = os.urandom(6 * MIB)
BLOB = BlobRef(digest=digest_of(DATA), size=len(DATA))


class Replicas:
    def __init__(self) -> None:
        self.first = Coordinator()
        self.second = self.first.replica()
        self._first = AsyncExitStack()

    async def start(self) -> None:
        await self._first.enter_async_context(self.first.serving())

    async def kill_first(self) -> None:
        await self._first.aclose()

    @property
    def addresses(self) -> str:
        return f"{self.first.address},{self.second.address}"


@pytest.fixture
async def replicas() -> AsyncIterator[Replicas]:
    two = Replicas()
    async with two.second.serving():
        await two.start()
        yield two
        await two.kill_first()


@pytest.fixture
async def session(tmp_path: Path, replicas: Replicas) -> AsyncIterator[Session]:
    home = Home(tmp_path)
    home.create()
    home.site_file.write_text('[policy]\ntasks = ["*"]\n')
    await enroll(home, replicas)
    opened = Session(home, waiting=Waiting())
    yield opened
    await opened.close()


async def enroll(home: Home, replicas: Replicas) -> None:
    both = f"{replicas.first.enrollment_address},{replicas.second.enrollment_address}"
    token = replicas.first.authority.token("st-olav", address=both)
    await asyncio.to_thread(identity.enroll, home.identity, token=token, coordinator=replicas.addresses, replace=True)


async def lease(session: Session) -> agent_pb2.LeaseTaskResponse:
    return await session.patiently(lambda: session.lease(agent_pb2.AgentInfo(), holding=[], wait_seconds=0))


async def test_when_one_replica_dies_the_calls_go_to_the_next_and_stay_there(
    session: Session, replicas: Replicas
) -> None:
    await lease(session)
    assert (len(replicas.first.asked), len(replicas.second.asked)) == (1, 0)
    await replicas.kill_first()
    await lease(session)
    await lease(session)
    assert (len(replicas.first.asked), len(replicas.second.asked)) == (1, 2)


async def test_a_replica_that_says_it_cannot_now_is_left_too(session: Session, replicas: Replicas) -> None:
    replicas.first.down = True
    await lease(session)
    assert len(replicas.second.asked) == 1


async def test_a_refusal_is_no_reason_to_ask_another(session: Session, replicas: Replicas) -> None:
    with pytest.raises(Exception, match="no such task"):
        await session.heartbeat(agent_pb2.HeartbeatRequest(task_id="nobody"))
    await lease(session)
    assert len(replicas.first.asked) == 1


async def test_enrollment_takes_the_replica_that_answers(session: Session, tmp_path: Path, replicas: Replicas) -> None:
    await replicas.kill_first()
    await enroll(Home(tmp_path), replicas)
    assert replicas.second.enrolled_keys


async def test_an_upload_goes_on_at_another_replica_where_it_stopped(
    session: Session, tmp_path: Path, replicas: Replicas
) -> None:
    replicas.first.tasks.append(task())
    replicas.first.leased["train-1"] = 1
    replicas.first.cut_write_at = 3 * MIB
    # An agent that has not heard why it was cut asks again, and must not get through meanwhile.
    replicas.first.cuts_for_good = True
    (tmp_path / "update").write_bytes(DATA)

    def attempt():
        return transfers.upload(
            tmp_path / "update",
            BLOB,
            task_id="train-1",
            generation=1,
            open_channel=session.open_channel,
            progress=lambda done, total: None,
            sent=lambda count: None,
        )

    with pytest.raises(Unavailable):
        await attempt()
    await replicas.kill_first()
    await session.patiently(attempt)
    assert replicas.second.sealed[BLOB.digest] == DATA
    # Not a byte was written twice, and each replica has had a part.
    assert replicas.first.bytes_written + replicas.second.bytes_written == len(DATA)
    assert replicas.first.bytes_written > 0


async def test_a_download_goes_on_at_another_replica_where_it_stopped(
    session: Session, tmp_path: Path, replicas: Replicas
) -> None:
    replicas.first.blobs[BLOB.digest] = DATA
    replicas.first.cut_read_at = 3 * MIB
    cache = transfers.BlobCache(tmp_path / "blobs")

    def attempt():
        return transfers.download(
            BLOB,
            cache=cache,
            open_channel=session.open_channel,
            progress=lambda done, total: None,
            received=lambda count: None,
        )

    path = await session.patiently(attempt)
    assert path.read_bytes() == DATA
    assert (replicas.first.reads, replicas.second.reads) == ([0], [3 * MIB])


async def test_check_says_of_each_replica_whether_it_answers(
    session: Session, tmp_path: Path, replicas: Replicas
) -> None:
    await replicas.kill_first()
    found = await asyncio.to_thread(lambda: {one.subject: one for one in all_findings(Home(tmp_path))})
    first, second = (found[f"network, {one.address}"] for one in (replicas.first, replicas.second))
    assert "nothing listens" in first.sentence
    assert "is reachable" in second.sentence
    # One that answers is enough to work.
    assert first.ok
    assert second.ok
