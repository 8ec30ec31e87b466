"""Presence is judged by counts that change, with one's own clock."""

from __future__ import annotations

from coordinator.presence import LONGEST_TURN_SECONDS, ServiceClock, Watch


def test_what_passes_while_a_process_is_stopped_is_no_service() -> None:
    times = iter([100.0, 101.0, 4701.0, 4702.5])
    clock = ServiceClock(lambda: next(times))
    assert [clock.now() for _ in range(4)] == [0.0, 1.0, 1.0 + LONGEST_TURN_SECONDS, 2.5 + LONGEST_TURN_SECONDS]


def test_a_count_that_changes_was_there_a_moment_ago() -> None:
    watch = Watch()
    assert watch.unchanged_seconds("a", 1, now=10.0, at_first=7.0) == 7.0
    assert watch.unchanged_seconds("a", 1, now=15.0, at_first=7.0) == 12.0
    assert watch.unchanged_seconds("a", 2, now=16.0, at_first=7.0) == 0.0
    assert watch.unchanged_seconds("a", 2, now=18.0) == 2.0


def test_what_was_not_watched_for_a_while_is_looked_at_for_the_first_time_again() -> None:
    watch = Watch()
    watch.unchanged_seconds("a", 1, now=0.0)
    watch.keep([])
    assert watch.unchanged_seconds("a", 2, now=500.0, at_first=90.0) == 90.0
