"""One look at the database for all who wait."""

from __future__ import annotations

import asyncio
import threading

import pytest

from coordinator.services.doorbell import Board


async def test_those_who_ask_at_the_same_time_share_one_look() -> None:
    looks: list[int] = []

    def look() -> frozenset[str]:
        looks.append(1)
        return frozenset({"alfa"})

    board = Board(look)
    answers = await asyncio.gather(*(board.has(site) for site in ("alfa", "bravo", "alfa")))
    assert answers == [True, False, True] and len(looks) == 1
    assert await board.has("alfa") and len(looks) == 2


async def test_who_asks_while_a_look_is_under_way_gets_a_later_one() -> None:
    work: set[str] = set()
    seen, go_on = threading.Event(), threading.Event()

    def look() -> frozenset[str]:
        found = frozenset(work)
        seen.set()
        assert go_on.wait(60)
        return found

    board = Board(look)
    early = asyncio.create_task(board.has("alfa"))
    await asyncio.to_thread(seen.wait, 60)
    work.add("alfa")
    late = asyncio.create_task(board.has("alfa"))
    await asyncio.sleep(0)
    go_on.set()
    assert (await early, await late) == (False, True)


async def test_one_who_leaves_does_not_take_the_look_away_and_a_failed_look_is_everybodys() -> None:
    board = Board(lambda: frozenset({"alfa"}))
    leaves, stays = (asyncio.create_task(board.has("alfa")) for _ in range(2))
    await asyncio.sleep(0)
    leaves.cancel()
    assert await stays

    def fails() -> frozenset[str]:
        raise OSError("the database is away")

    broken = Board(fails)
    answers = await asyncio.gather(*(broken.has("alfa") for _ in range(2)), return_exceptions=True)
    assert all(isinstance(answer, OSError) for answer in answers)
    with pytest.raises(OSError, match="away"):
        await broken.has("alfa")
