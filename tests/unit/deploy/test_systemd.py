"""The units: systemd accepts every key, and what a unit may do is little."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
UNITS = sorted((ROOT / "deploy/systemd").glob("*.service"))
by_name = pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
needs_systemd = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="NOT CHECKED: systemd-analyze is not on this machine"
)


def settings(unit: Path) -> dict[str, dict[str, list[str]]]:
    """{section: {key: values}}; a key may be repeated."""
    found: dict[str, dict[str, list[str]]] = {}
    section = ""
    for line in unit.read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(section, {}).setdefault(key, []).append(value)
    return found


def test_there_is_a_unit_for_each_side() -> None:
    assert [unit.stem for unit in UNITS] == ["silotune-agent", "silotune-coordinator"]


@pytest.fixture
def runnable(unit: Path, tmp_path: Path) -> Path:
    """The unit with a program that exists on this machine; systemd-analyze looks for it."""
    text, count = re.subn(r"(?m)^ExecStart=\S+", f"ExecStart={sys.executable}", unit.read_text())
    assert count == 1
    path = tmp_path / unit.name
    path.write_text(text)
    return path


@needs_systemd
@by_name
def test_systemd_accepts_every_line(runnable: Path) -> None:
    done = subprocess.run(["systemd-analyze", "verify", runnable], capture_output=True, text=True)
    ours = [line for line in done.stderr.splitlines() if runnable.name in line]
    assert ours == [] and done.returncode == 0, done.stderr


@needs_systemd
@by_name
def test_a_unit_is_as_closed_as_it_can_be(runnable: Path) -> None:
    """systemd's own score: 10 is open, and below 2 is what it calls OK."""
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", runnable]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-400:]


@by_name
def test_a_unit_runs_an_installed_command_as_its_own_user(unit: Path) -> None:
    service = settings(unit)["Service"]
    assert service["User"] == service["Group"] == ["silotune"]
    assert service["ExecStart"][0].startswith(f"/usr/local/lib/silotune/bin/{unit.stem} ")
    assert service["UMask"] == ["0077"] and service["StateDirectoryMode"] == ["0700"]


@by_name
def test_a_unit_comes_back_after_a_crash_and_stops_in_peace(unit: Path) -> None:
    service = settings(unit)["Service"]
    assert service["Restart"] == ["on-failure"]
    assert service["TimeoutStopSec"] == ["60s"]
    assert settings(unit)["Install"]["WantedBy"] == ["multi-user.target"]


@by_name
def test_what_a_unit_writes_lies_in_its_state_directory(unit: Path) -> None:
    service = settings(unit)["Service"]
    paths = re.findall(r"(?:--data|--home) (\S+)", service["ExecStart"][0])
    assert len(paths) == 1 and paths[0].startswith(f"/var/lib/{service['StateDirectory'][0]}/")


def test_the_agent_may_use_a_gpu_and_the_coordinator_no_device() -> None:
    agent, coordinator = (settings(unit)["Service"] for unit in UNITS)
    assert agent["DeviceAllow"] == ["char-nvidia* rw"] and agent["DevicePolicy"] == ["closed"]
    assert coordinator["PrivateDevices"] == ["yes"]
