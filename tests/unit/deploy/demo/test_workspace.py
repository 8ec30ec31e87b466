from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deploy.demo.workspace import MARKER, Stopwatch, claimed
from protos.errors import AlreadyExists, Conflict


def test_a_second_run_replaces_what_the_first_left(tmp_path: Path):
    out = tmp_path / "demo"
    with claimed(out):
        (out / "logs").mkdir()
        (out / "logs" / "old").write_text("old")
        (out / "report.json").write_text("old")
    with claimed(out):
        assert [path.name for path in out.iterdir()] == [MARKER]


def test_a_folder_that_no_demo_made_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(AlreadyExists, match="no demo made"), claimed(tmp_path):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_link_in_the_folder_is_removed_and_not_followed(tmp_path: Path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("kept")
    with claimed(tmp_path / "demo"):
        (tmp_path / "demo" / "link").symlink_to(elsewhere)
    with claimed(tmp_path / "demo"):
        assert not (tmp_path / "demo" / "link").exists()
    assert (elsewhere / "kept").exists()


def test_a_run_is_refused_while_another_process_runs_one(tmp_path: Path):
    script = (
        "import sys\nfrom pathlib import Path\nfrom deploy.demo.workspace import claimed\n"
        "with claimed(Path(sys.argv[1])):\n    print('claimed', flush=True)\n    sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "demo")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdin is not None and other.stdout is not None
    with other:
        assert other.stdout.readline() == "claimed\n"
        with pytest.raises(Conflict, match="at this moment"), claimed(tmp_path / "demo"):
            pass
        other.stdin.close()
    with claimed(tmp_path / "demo"):
        pass


def test_the_clock_keeps_the_time_of_a_part_that_failed():
    watch = Stopwatch()
    with pytest.raises(ZeroDivisionError), watch.part("a"):
        _ = 1 / 0
    assert watch.seconds["a"] >= 0
