"""The aggregation process as the controller sees it, with the real worker."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from coordinator.aggregation.process import AggregationProcess
from protos.digests import digest_of
from protos.tensors import make_header


def order(directory: Path) -> dict[str, Any]:
    header, _ = make_header([("w", "F32", (4,))])
    update = directory / "update"
    update.write_bytes(header + bytes(16))
    part = {"site": "alfa", "path": str(update), "digest": digest_of(update.read_bytes()), "weight": 1.0}
    return {"contributions": [part], "optimizer": {"type": "none"}, "output": str(directory / "version")}


async def killed_while_it_works(process: AggregationProcess, work: dict[str, Any]) -> asyncio.Task[dict[str, Any]]:
    await process.start()
    worker = process._process
    assert worker is not None
    # Stopped, so that it cannot answer before it is killed.
    os.kill(worker.pid, signal.SIGSTOP)
    answer = asyncio.create_task(process.carry_out(work))
    await asyncio.sleep(0.05)
    os.kill(worker.pid, signal.SIGKILL)
    return answer


async def test_what_a_killed_worker_was_doing_is_done_by_the_next_one_at_once(tmp_path: Path) -> None:
    process = AggregationProcess()
    try:
        answer = await (await killed_while_it_works(process, order(tmp_path)))
        assert answer["digest"] == digest_of((tmp_path / "version").read_bytes())
    finally:
        await process.stop()


async def test_a_worker_that_dies_between_orders_is_replaced(tmp_path: Path) -> None:
    process = AggregationProcess()
    try:
        await process.start()
        assert process._process is not None
        os.kill(process._process.pid, signal.SIGKILL)
        assert "digest" in await process.carry_out(order(tmp_path))
    finally:
        await process.stop()


async def test_an_order_that_cannot_be_carried_out_fails_with_its_reason(tmp_path: Path) -> None:
    process = AggregationProcess()
    try:
        with pytest.raises(RuntimeError, match="ValidationError"):
            await process.carry_out({**order(tmp_path), "optimizer": {"type": "magic"}})
    finally:
        await process.stop()


async def test_a_worker_without_room_or_its_file_is_told_apart_from_a_defect(tmp_path: Path) -> None:
    """The one is waited for, the other has a traceback in the log."""
    process = AggregationProcess()
    try:
        work = order(tmp_path)
        with pytest.raises(OSError, match="No such file"):
            await process.carry_out({**work, "output": str(tmp_path / "nowhere" / "version")})
        with pytest.raises(RuntimeError, match="KeyError"):
            await process.carry_out({key: value for key, value in work.items() if key != "output"})
        assert (await process.carry_out(work))["size"] > 0
    finally:
        await process.stop()
