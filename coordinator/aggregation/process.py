"""The aggregation process as the controller sees it: started by exec, kept warm, replaced when it dies."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

# The longest order: a line for each of some thousands of updates.
LINE_LIMIT_BYTES = 64 << 20
LAST_LINES_BYTES = 4096


class AggregationProcess:
    """One `coordinator.aggregation.worker`; orders are carried out one after another."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._last_words = ""

    async def start(self) -> None:
        """Has the process ready before there is work for it; cheap when it is."""
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "coordinator.aggregation.worker",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                limit=LINE_LIMIT_BYTES,
            )

    async def carry_out(self, order: dict[str, Any]) -> dict[str, Any]:
        """The worker's answer. RuntimeError, with its last line, when it fails, or ends twice without one.

        OSError: it found no room, or could not read a file.
        """
        async with self._turn:
            # A worker that was killed left nothing behind, so a fresh one does the same work at once.
            line = await self._attempt(order) or await self._attempt(order)
            if not line:
                raise RuntimeError(f"the aggregation process ended: {self._last_words}")
            answer = json.loads(line)
            if "error" in answer:
                raise (OSError if answer["os_error"] else RuntimeError)(answer["error"])
            return answer

    async def _attempt(self, order: dict[str, Any]) -> bytes:
        """The worker's line; empty when it ended without one."""
        await self.start()
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(order).encode() + b"\n")
            await process.stdin.drain()
            line = await process.stdout.readline()
        except ConnectionError:
            line = b""
        except asyncio.CancelledError:
            await self.stop()
            raise
        if not line:
            self._last_words = await _last_words(process)
        return line

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()


async def _last_words(process: asyncio.subprocess.Process) -> str:
    assert process.stderr is not None
    text = (await process.stderr.read())[-LAST_LINES_BYTES:].decode(errors="replace").strip()
    status = await process.wait()
    return text.splitlines()[-1] if text else f"status {status}"
