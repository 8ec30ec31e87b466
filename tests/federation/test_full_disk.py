"""A coordinator whose disk fills up: what it says, that it loses nothing, and goes on by itself when there is room."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local import LocalFederation
from tests.federation.conftest import FAST, SITE_TOML, Jobs

DISK_MB, RESERVE_MB = 96, 16
ROUNDS, TASK = 6, "payload_mb = 2"
PATIENT = "quorum = 2\ngather_seconds = 60\nround_deadline_seconds = 3600\nstall_limit_seconds = 3600"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of DISK_MB where the coordinator's data directory will be."""
    path = tmp_path / "coordinator"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", path], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"NOT CHECKED: no small file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


@pytest.fixture
def two_sites(small_disk: Path) -> Iterator[Jobs]:
    settings = {**FAST, "storage": {"reserve_bytes": RESERVE_MB * 1_000_000}}
    with LocalFederation(small_disk.parent, settings=settings) as federation:
        federation.init()
        federation.start_coordinator()
        for name in ("alfa", "bravo"):
            federation.enroll(name, site_toml=SITE_TOML)
        for name in ("alfa", "bravo"):
            federation.start_agent(name, wait=False)
        yield Jobs(federation)


def fill(disk: Path, *, leave_mb: float) -> Path:
    """Takes all the room but `leave_mb`."""
    ballast = disk / "somebody-elses-file"
    with ballast.open("ab") as file:
        while room(disk) > leave_mb:
            try:
                file.write(bytes(min(1 << 20, max(4096, int((room(disk) - leave_mb) * 1_000_000)))))
                file.flush()
            except OSError:
                break
    return ballast


def room(disk: Path) -> float:
    return shutil.disk_usage(disk).free / 1e6


def gauge(text: str, name: str) -> float:
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name} "))


def test_a_full_disk_stops_what_is_new_loses_nothing_and_everything_goes_on_when_there_is_room(
    two_sites: Jobs, small_disk: Path
) -> None:
    federation = two_sites.federation
    coordinator = federation.nodes["coordinator"]

    # Room for some rounds: each keeps a version, and begins only when its updates have room above the reserve.
    ballast = fill(small_disk, leave_mb=RESERVE_MB + 16)
    rough = two_sites.submit(rounds=ROUNDS, task=TASK, cohort=PATIENT)

    def says(what: str) -> None:
        def why() -> str:
            return federation.run("silotune", "job", "why", rough, "--profile", str(federation.profile))

        federation.wait_for(lambda: what in why(), seconds=300, saying=f"{what!r} in the job's sentence")

    says("waits for room on the coordinator's disk")
    before = two_sites.show(rough)
    assert 0 < before["job"]["head_version"] < ROUNDS

    fill(small_disk, leave_mb=RESERVE_MB - 8)
    federation.wait_for(lambda: coordinator.get("/readyz")[0] == 503, seconds=300, saying="not ready")
    assert "reserve" in coordinator.get("/readyz")[1]
    fill(small_disk, leave_mb=0)
    says("the disk of the coordinator's database is full")
    federation.wait_for(
        lambda: "cannot be written" in coordinator.get("/readyz")[1], seconds=300, saying="not ready for the database"
    )
    metrics = coordinator.get("/metrics")[1]
    assert gauge(metrics, "silotune_ready") == 0
    assert gauge(metrics, "silotune_disk_spare_bytes") < 0
    assert gauge(metrics, "silotune_store_up") == 1, "what is on the disk can be read"
    log = coordinator.log.read_text()
    assert log.count("is full, or failing") <= 6, "it is said when it begins, not each second"
    assert "Traceback" not in log

    ballast.unlink()
    shown = two_sites.end(rough)
    assert shown["job"]["state"] == "COMPLETED"
    assert shown["rounds"][: before["job"]["head_version"] + 1] == before["rounds"][: before["job"]["head_version"] + 1]
    assert all(len(entry["updates"]) == 2 for entry in shown["rounds"][1:])
    calm = two_sites.submit(rounds=ROUNDS, task=TASK, cohort=PATIENT)
    assert two_sites.end(calm)["job"]["state"] == "COMPLETED"
    for version in (1, ROUNDS):
        assert two_sites.digest(rough, version) == two_sites.digest(calm, version)
    federation.wait_for(lambda: coordinator.get("/readyz")[0] == 200, seconds=300, saying="ready again")
    assert gauge(coordinator.get("/metrics")[1], "silotune_ready") == 1
    assert "Traceback" not in coordinator.log.read_text()
