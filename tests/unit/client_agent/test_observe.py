from __future__ import annotations

from structlog.testing import capture_logs

from client_agent.observe import Disk


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
