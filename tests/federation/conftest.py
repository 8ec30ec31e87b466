"""Whole federations for tests: real processes, real sockets, real certificates, the synthetic trainer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.local import LocalFederation

SITE_TOML = """\
[http]
address = "{http}"

[policy]
tasks = ["synthetic"]
methods = ["full"]
"""
FAST = {"tasks": {"lease_seconds": 3}, "storage": {"reserve_bytes": 1_000_000}}


class Jobs:
    """Submits recipes of the synthetic task and looks at what came of them."""

    def __init__(self, federation: LocalFederation) -> None:
        self.federation = federation
        self._numbers = itertools.count(1)

    def submit(self, *, rounds: int = 2, task: str = "payload_mb = 1", cohort: str = "", more: str = "") -> str:
        number = next(self._numbers)
        path = self.federation.directory / f"recipe-{number}.toml"
        path.write_text(
            f'name = "job-{number}"\nrounds = {rounds}\nseed = 5\n'
            f'[task]\ntype = "synthetic"\n{task}\n[local]\nsteps = 4\n[cohort]\n{cohort}\n{more}\n'
            + ("" if "[evaluation]" in more else "[evaluation]\nwhere = []\n")
        )
        return self.federation.silotune("job", "submit", str(path))["job_id"]

    def show(self, job: str) -> dict[str, Any]:
        return self.federation.job(job)

    def wait(self, job: str, what: Callable[[dict[str, Any]], Any], *, saying: str, seconds: float = 60) -> Any:
        return self.federation.wait_for(lambda: what(self.show(job)), seconds=seconds, saying=saying)

    def end(self, job: str, *, seconds: float = 90) -> dict[str, Any]:
        """The job's facts once it has ended."""

        def ended(shown: dict[str, Any]) -> dict[str, Any] | None:
            return shown if shown["job"]["state"] in ("COMPLETED", "FAILED", "CANCELLED") else None

        return self.wait(job, ended, saying=f"the end of {job}", seconds=seconds)

    def digest(self, job: str, version: int) -> str:
        """Digest of a committed version, from what an export holds."""
        from protos.digests import new_hasher

        out = self.federation.directory / f"export-{job}-{version}"
        self.federation.silotune("model", "export", job, "--round", str(version), "--out", str(out))
        hasher = new_hasher()
        hasher.update_mmap(out / "model.safetensors")
        return hasher.hexdigest()


def start(directory: Path, *sites: str, settings: dict[str, dict[str, Any]] | None = None) -> LocalFederation:
    federation = LocalFederation(directory, settings=settings or FAST)
    federation.init()
    federation.start_coordinator()
    for name in sites:
        federation.enroll(name, site_toml=SITE_TOML)
    for name in sites:
        federation.start_agent(name, wait=False)
    return federation


@pytest.fixture
def three_sites(tmp_path: Path) -> Iterator[Jobs]:
    with start(tmp_path, "alfa", "bravo", "charlie") as federation:
        yield Jobs(federation)
