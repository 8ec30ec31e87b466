"""Wakes long polls, and looks once for all of them.

A ring is only a hint: whoever waits also looks every second. Each ring wakes every site that waits, and every site's
finished task rings; so that a round does not cost the square of its sites, they share one look at the database.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Doorbell:
    """For one event loop."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()
        self.closed = False

    def ring(self) -> None:
        """Ends every wait that is going on now."""
        rung, self._rung = self._rung, asyncio.Event()
        rung.set()

    def close(self) -> None:
        """Nobody waits any more: the coordinator is shutting down."""
        self.closed = True
        self.ring()

    async def wait(self, *, seconds: float) -> None:
        """Returns at the next ring, or after `seconds`."""
        try:
            await asyncio.wait_for(self._rung.wait(), seconds)
        except TimeoutError:
            return


class Board:
    """Names that something is true of, such as the sites that have work. `look` reads them, in a thread."""

    def __init__(self, look: Callable[[], frozenset[str]]) -> None:
        self._look = look
        self._turn = asyncio.Lock()
        self._next: asyncio.Task[frozenset[str]] | None = None

    async def has(self, name: str) -> bool:
        """From a look that began after this call did. What `look` raises is raised to all who share it."""
        if self._next is None:
            self._next = asyncio.create_task(self._look_in_turn())
        # One who is cancelled does not take the look away from the others.
        return name in await asyncio.shield(self._next)

    async def _look_in_turn(self) -> frozenset[str]:
        async with self._turn:
            # Whoever asks from here on needs a later look.
            self._next = None
            return await asyncio.to_thread(self._look)
