"""Hours of the day as a site's administrator writes them: "19:00-06:00", "Sat-Sun 00:00-24:00", "Mon-Fri 08:00-18:00".

They are hours of the machine's own clock and time zone. A window that passes midnight belongs to the day on which it
begins.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated

from pydantic import AfterValidator

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
MINUTES = 24 * 60
_DAY = "|".join(DAYS)
_GRAMMAR = re.compile(rf"(?:({_DAY})(?:-({_DAY}))? )?(\d\d):(\d\d)-(\d\d):(\d\d)", re.IGNORECASE)


@dataclass(frozen=True)
class Window:
    days: frozenset[int]  # 0 is Monday
    begin_minute: int
    end_minute: int  # beyond 24 h where it passes midnight

    def holds(self, now: datetime) -> bool:
        minute = 60 * now.hour + now.minute
        today = now.weekday() in self.days and self.begin_minute <= minute < self.end_minute
        yesterday = (now - timedelta(days=1)).weekday() in self.days and minute + MINUTES < self.end_minute
        return today or yesterday


def parse(text: str) -> Window:
    """ValueError when `text` is not hours as this module's first line shows them."""
    match = _GRAMMAR.fullmatch(" ".join(text.split()))
    if match is None:
        raise ValueError(f'{text!r} is not hours such as "19:00-06:00" or "Mon-Fri 08:00-18:00"')
    first, last, *numbers = match.groups()
    begin_hour, begin_minute, end_hour, end_minute = map(int, numbers)
    begin, end = 60 * begin_hour + begin_minute, 60 * end_hour + end_minute
    if max(begin_minute, end_minute) > 59 or begin >= MINUTES or end > MINUTES or begin == end:
        raise ValueError(f"{text!r} is not a span of hours between 00:00 and 24:00")
    days = frozenset(range(7))
    if first:
        start = DAYS.index(first.lower())
        count = (DAYS.index((last or first).lower()) - start) % 7 + 1
        days = frozenset((start + number) % 7 for number in range(count))
    return Window(days, begin, end if end > begin else end + MINUTES)


def any_holds(windows: Iterable[str], now: datetime) -> bool:
    """Whether one of these hours is now. `windows` are texts that were checked before."""
    return any(parse(text).holds(now) for text in windows)


def outside(windows: Sequence[str], now: datetime) -> str:
    """Such as "(19:00-06:00) until Fri 19:00"; empty while one of these hours is now, and without any."""
    if not windows or any_holds(windows, now):
        return ""
    change = next_change(windows, now)
    return f"({', '.join(windows)})" + (f" until {change:%a %H:%M}" if change else "")


def next_change(windows: Iterable[str], now: datetime) -> datetime | None:
    """The first minute after `now` at which `any_holds` answers differently; None when it never does."""
    parsed = [parse(text) for text in windows]
    minute = now.replace(second=0, microsecond=0)
    before = any(window.holds(now) for window in parsed)
    for _ in range(7 * MINUTES):
        minute += timedelta(minutes=1)
        if any(window.holds(minute) for window in parsed) != before:
            return minute
    return None


def _checked(text: str) -> str:
    parse(text)
    return text


# A setting: the text stays as it was written, and what is not hours is refused when the file is read.
Hours = Annotated[str, AfterValidator(_checked)]
