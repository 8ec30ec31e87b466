"""Wakes long polls. A ring is only a hint: whoever waits also looks for himself every second."""

from __future__ import annotations

import asyncio


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
