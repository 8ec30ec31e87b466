"""Which sites are there, and whose job it is to drive: judged by watching rows change, never by comparing clocks.

A site's row counts its calls, a job's row counts its driver's beats. Whoever watches a count change knows that somebody
was there a moment ago by his own clock; no two machines' clocks meet, and a stepped clock changes no outcome.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

# A turn that took longer was no service: the process was stopped, the machine slept, or the database was away.
LONGEST_TURN_SECONDS = 2.0


@dataclass
class ServiceClock:
    """Seconds in which this process really turned, monotonic; what passes while it is stopped does not count."""

    monotonic: Callable[[], float] = time.monotonic
    _last: float | None = None
    _seconds: float = 0.0

    def now(self) -> float:
        at = self.monotonic()
        if self._last is not None:
            self._seconds += min(max(0.0, at - self._last), LONGEST_TURN_SECONDS)
        self._last = at
        return self._seconds


@dataclass
class Watch:
    """When each thing was last seen to change."""

    _seen: dict[Hashable, tuple[Hashable, float]] = field(default_factory=dict)

    def unchanged_seconds(self, key: Hashable, value: Hashable, *, now: float, at_first: float = 0.0) -> float:
        """How long `value` has stood still under `key`; `at_first` when it is looked at for the first time."""
        before = self._seen.get(key)
        if before is None or before[0] != value:
            since = now if before is not None else now - at_first
            self._seen[key] = (value, since)
        return now - self._seen[key][1]

    def keep(self, keys: Iterable[Hashable]) -> None:
        """Forgets all others: what nobody looked at for a while is looked at for the first time again."""
        kept = set(keys)
        self._seen = {key: seen for key, seen in self._seen.items() if key in kept}
