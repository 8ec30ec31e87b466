"""When and how fast this site sends and receives: one token bucket for each direction, for all transfers together.

A transfer says what has gone and learns how long to wait. Nothing is split and nothing is queued here, so without a
limit it costs one function call a frame.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from client_agent import hours
from client_agent.settings import Network
from protos.errors import Unavailable
from protos.frames import FRAME_BYTES

# Time that the network itself took is credited up to here, so that a limit near the line's own speed is reached.
CREDIT_SECONDS = 1.0
SMALLEST_FRAME_BYTES = 64 << 10


@dataclass(frozen=True)
class Rates:
    """Mbit/s of payload; 0 is without limit."""

    upload_mbit: float
    download_mbit: float

    def __str__(self) -> str:
        sending, receiving = (
            f"{mbit:g} Mbit/s" if mbit else "without limit" for mbit in (self.upload_mbit, self.download_mbit)
        )
        return f"sending {sending}, receiving {receiving}"


def rates_at(network: Network, now: datetime) -> Rates:
    """The rates in force at this time of the machine's own clock."""
    upload, download = network.upload_mbit, network.download_mbit
    for window in network.windows:
        if hours.parse(window.hours).holds(now):
            upload = upload if window.upload_mbit is None else window.upload_mbit
            download = download if window.download_mbit is None else window.download_mbit
            break
    return Rates(upload, download)


def closed_at(network: Network, now: datetime) -> str:
    """Why no transfer may run at this time of the machine's own clock, and until when; empty when one may."""
    outside = hours.outside(network.hours, now)
    return f"It is outside this site's hours for transfers {outside}." if outside else ""


def _never() -> str:
    return ""


class Pace:
    def __init__(
        self,
        mbit: Callable[[], float],
        *,
        closed: Callable[[], str] = _never,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mbit = mbit
        # Why nothing may go now; empty when it may.
        self.closed = closed
        self._monotonic = monotonic
        self._free_at = float("-inf")

    def check_open(self) -> None:
        """Unavailable outside the hours for transfers: it is tried again until they begin."""
        if sentence := self.closed():
            raise Unavailable(sentence)

    def take(self, count: int) -> float:
        """After `count` bytes have gone: the seconds until the next may go."""
        mbit = self._mbit()
        if not mbit:
            return 0.0
        now = self._monotonic()
        cost_seconds = count * 8 / (mbit * 1e6)
        self._free_at = max(self._free_at, now - max(CREDIT_SECONDS, cost_seconds)) + cost_seconds
        return max(0.0, self._free_at - now)

    def frame_bytes(self) -> int:
        """How much to send at once: about a second's worth, so that a slow upload flows and does not jerk."""
        mbit = self._mbit()
        second = int(mbit * 1e6 / 8) // SMALLEST_FRAME_BYTES * SMALLEST_FRAME_BYTES
        return min(FRAME_BYTES, max(SMALLEST_FRAME_BYTES, second)) if mbit else FRAME_BYTES


def _unlimited() -> float:
    return 0.0


UNLIMITED = Pace(_unlimited)


def paces(network: Network) -> tuple[Pace, Pace]:
    """For sending and for receiving."""

    def closed() -> str:
        return closed_at(network, datetime.now())

    return (
        Pace(lambda: rates_at(network, datetime.now()).upload_mbit, closed=closed),
        Pace(lambda: rates_at(network, datetime.now()).download_mbit, closed=closed),
    )
