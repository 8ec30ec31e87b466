"""Hours as an administrator writes them."""

from __future__ import annotations

from datetime import datetime

import pytest

from client_agent.hours import any_holds, next_change, parse

# 2024-01-05 is a Friday.
FRIDAY, SATURDAY, SUNDAY, MONDAY = (f"2024-01-0{day}" for day in (5, 6, 7, 8))


def holds(text: str, when: str) -> bool:
    return parse(text).holds(datetime.fromisoformat(when))


def test_hours_hold_from_their_first_minute_to_before_their_last() -> None:
    assert holds("08:00-18:00", f"{FRIDAY} 08:00")
    assert holds("08:00-18:00", f"{FRIDAY} 17:59")
    assert not holds("08:00-18:00", f"{FRIDAY} 18:00")
    assert not holds("08:00-18:00", f"{FRIDAY} 07:59")


def test_hours_may_pass_midnight() -> None:
    for when, expected in (("19:00", True), ("23:59", True), ("00:00", True), ("05:59", True), ("06:00", False)):
        assert holds("19:00-06:00", f"{FRIDAY} {when}") is expected
    assert not holds("19:00-06:00", f"{FRIDAY} 18:59")


def test_a_window_past_midnight_belongs_to_the_day_on_which_it_begins() -> None:
    assert holds("Mon-Fri 19:00-06:00", f"{SATURDAY} 05:00")
    assert not holds("Mon-Fri 19:00-06:00", f"{MONDAY} 05:00")
    assert not holds("Mon-Fri 19:00-06:00", f"{SATURDAY} 19:00")


def test_days_may_be_one_or_a_span_across_the_weeks_end() -> None:
    assert holds("sat-mon 00:00-24:00", f"{SUNDAY} 12:00")
    assert holds("sat-mon 00:00-24:00", f"{MONDAY} 23:59")
    assert not holds("sat-mon 00:00-24:00", f"{FRIDAY} 12:00")
    assert holds("Fri 10:00-11:00", f"{FRIDAY} 10:30")
    assert not holds("Fri 10:00-11:00", f"{SATURDAY} 10:30")


def test_one_of_several_windows_is_enough() -> None:
    windows = ("19:00-06:00", "Sat-Sun 00:00-24:00")
    assert any_holds(windows, datetime.fromisoformat(f"{SUNDAY} 12:00"))
    assert not any_holds(windows, datetime.fromisoformat(f"{MONDAY} 12:00"))
    assert not any_holds((), datetime.fromisoformat(f"{MONDAY} 12:00"))


@pytest.mark.parametrize(
    "text", ["", "8-18", "08:00-08:00", "08:00-25:00", "24:00-06:00", "08:60-09:00", "weekdays 08:00-09:00"]
)
def test_what_is_not_hours_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not"):
        parse(text)


def test_the_next_change_is_the_minute_in_which_a_window_opens_or_closes() -> None:
    def change(windows: tuple[str, ...], when: str) -> str:
        return f"{next_change(windows, datetime.fromisoformat(when))}"

    assert change(("19:00-06:00",), f"{FRIDAY} 12:00:30") == f"{FRIDAY} 19:00:00"
    assert change(("19:00-06:00",), f"{FRIDAY} 19:00") == f"{SATURDAY} 06:00:00"
    assert change(("Mon-Fri 19:00-06:00", "Sat-Sun 06:00-24:00"), f"{FRIDAY} 20:00") == f"{SUNDAY} 00:00:00"
    assert change(("Mon 08:00-09:00",), f"{MONDAY} 09:00") == "2024-01-15 08:00:00"
    assert change(("00:00-24:00",), f"{FRIDAY} 12:00") == "None"
