"""Facts out of logs: what an agent says becomes what the judge reads."""

from __future__ import annotations

import json
from pathlib import Path

from tests.chaos.history import AGENT_EVENTS, AgentLog, History, fact_of

ROOT = Path(__file__).resolve().parents[2]


def line(event: str, **about: object) -> bytes:
    return json.dumps({"job": "j", **about, "event": event, "level": "info"}).encode() + b"\n"


def test_only_whole_lines_are_read_and_each_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "alfa.log"
    whole, half = line("A task was granted.", round=1), line("The result is sealed.", digest="d")
    path.write_bytes(b"Traceback of something\n" + whole + half[:20])
    log = AgentLog("alfa", path)
    assert [fact.kind for fact in log.read()] == ["granted"]
    with path.open("ab") as file:
        file.write(half[20:])
    assert [(fact.kind, fact["digest"]) for fact in log.read()] == [("sealed", "d")]
    assert list(log.read()) == []


def test_half_a_line_of_a_killed_process_does_not_hide_the_next_ones_first_line() -> None:
    joined = line("A task was granted.", round=1)[:15] + line("The task succeeded.", fate="accepted")
    fact = fact_of("alfa", joined)
    assert fact is not None and fact.kind == "acknowledged" and fact["fate"] == "accepted"


def test_the_agent_says_what_the_judge_listens_for() -> None:
    """A sentence that is changed in the agent must be changed here: a judge that hears nothing finds nothing."""
    source = "".join((ROOT / "client_agent" / name).read_text() for name in ("loop.py", "stages.py", "main.py"))
    composed = {"The task succeeded.", "The task failed.", "The task declined."}
    for sentence in AGENT_EVENTS.keys() - composed:
        assert f'"{sentence}"' in source, sentence
    assert 'f"The task {field}."' in source


def test_a_history_is_on_disk_line_by_line(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    history.add("operator", "submit", job="j")
    assert json.loads((tmp_path / "history.jsonl").read_text())["about"] == {"job": "j"}
