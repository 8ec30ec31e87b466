from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from client_agent.hold import Hold, Pause, PauseFile, duration_seconds, reason
from protos.errors import InvalidInput

NOON = datetime(2024, 1, 5, 12, 0)  # a Friday
EVENING = datetime(2024, 1, 5, 20, 0)
NIGHTS = ("19:00-06:00",)


def test_without_pause_and_hours_the_trainer_may_always_run() -> None:
    assert reason(None, (), now=NOON) == ""


def test_outside_the_hours_the_sentence_says_until_when() -> None:
    assert reason(None, NIGHTS, now=NOON) == "It is outside this site's hours (19:00-06:00) until Fri 19:00."
    assert reason(None, NIGHTS, now=EVENING) == ""


def test_a_pause_holds_for_its_time_or_until_it_is_ended() -> None:
    assert "until `silotune-agent resume`" in reason(Pause(None), NIGHTS, now=EVENING)
    until = Pause(datetime(2024, 1, 5, 14, 30).timestamp())
    assert reason(until, (), now=NOON) == "This site is paused by its administrator until Fri 14:30."
    assert reason(until, (), now=EVENING) == ""


def test_the_daemon_sees_what_the_command_wrote(tmp_path: Path) -> None:
    file = PauseFile(tmp_path / "pause.json")
    hold = Hold(file, windows=())
    assert not hold.look(now=NOON) and hold.over.is_set()
    file.write(Pause(None))
    assert hold.look(now=NOON) and hold.begun.is_set() and not hold.over.is_set()
    assert not hold.look(now=NOON)
    file.remove()
    file.remove()
    assert hold.look(now=NOON) and hold.over.is_set() and hold.sentence == ""


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"until_unix_seconds": "noon"}', '{"until_unix_seconds": 1e300}', "\0"]
)
def test_a_pause_file_that_cannot_be_understood_holds_until_it_is_ended(tmp_path: Path, text: str) -> None:
    file = PauseFile(tmp_path / "pause.json")
    (tmp_path / "pause.json").write_text(text)
    assert file.read() == Pause(None)
    file.remove()
    assert file.read() is None


def test_times_are_written_with_their_unit() -> None:
    assert [duration_seconds(text) for text in ("45s", "90m", "2h", "1d")] == [45, 5400, 7200, 86_400]
    for text in ("", "2", "h", "-1h", "0m", "2 hours"):
        with pytest.raises(InvalidInput, match="is not a time such as 90m"):
            duration_seconds(text)
    with pytest.raises(InvalidInput, match="99999d is longer than a year"):
        duration_seconds("99999d")
