from __future__ import annotations

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from client_agent.observe import Disk, StatusFile
from protos.errors import OutOfSpace


def test_a_failure_of_the_disk_is_logged_when_it_changes_and_names_no_path() -> None:
    disk = Disk()
    with capture_logs() as said:
        for reason in ("No space left on device", "No space left on device", "Read-only file system"):
            with disk.tried("Writing"):
                raise OSError(1, reason, "/srv/patients")
        assert disk.sentence == "Writing failed at this machine's disk: Read-only file system."
        with disk.tried("Writing"):
            pass
    assert disk.sentence == ""
    assert [line["event"] for line in said] == [
        "Writing failed at this machine's disk: No space left on device.",
        "Writing failed at this machine's disk: Read-only file system.",
        "Writing works again.",
    ]


def test_what_waits_for_room_is_remembered_until_it_has_it() -> None:
    disk = Disk()
    with pytest.raises(OutOfSpace), disk.noted("A transfer"):
        raise OutOfSpace("The agent's disk is full.")
    assert disk.sentence == "A transfer waits: The agent's disk is full."
    with disk.noted("A transfer"):
        pass
    assert disk.sentence == ""


def test_a_torn_status_file_is_as_good_as_none(tmp_path: Path) -> None:
    file = StatusFile(tmp_path / "status.json")
    for text in ("", '{"connected"', "[]"):
        (tmp_path / "status.json").write_text(text)
        assert file.read() == {}
