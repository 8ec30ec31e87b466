"""Whole federations for tests: real processes, real sockets, real certificates, the synthetic trainer."""

from __future__ import annotations

import itertools
import json
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from coordinator.client import OperatorClient, facts, load_profile
from deploy.local import LocalFederation
from protos.v1 import operator_pb2

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
        """What `silotune job show` prints, without the seconds that a process takes on a busy machine."""
        with OperatorClient(load_profile(str(self.federation.profile))) as client:
            found = facts(client.ask("GetJob", operator_pb2.GetJobRequest(job=job, last_rounds=1000)))
        return {**found, "spec": json.loads(found["spec_json"])}

    def wait(self, job: str, what: Callable[[dict[str, Any]], Any], *, saying: str, seconds: float = 300) -> Any:
        return self.federation.wait_for(lambda: what(self.show(job)), seconds=seconds, saying=saying)

    def lines(self, site: str, job: str, what: str, *, task: str = "train") -> list[str]:
        """What the site's log says of its trainings for the job, in lines with the text `what`."""
        return [
            line
            for line in self.federation.nodes[site].log.read_text().splitlines()
            if what in line and _named(line, "job") == job and _named(line, "task") == task
        ]

    def trained(self, site: str, job: str, *, task: str = "train") -> list[int]:
        """The rounds that the site's trainer has begun, each as often as it has."""
        return [int(_named(line, "round")) for line in self.lines(site, job, "The trainer begins.", task=task)]

    def hold(self, site: str, *rounds: int) -> None:
        """From now on the site's trainings for these rounds begin and do not go on, until each is let go."""
        for number in rounds:
            self._hold(site, number).touch()

    def let_go(self, site: str, round_number: int) -> None:
        self._hold(site, round_number).unlink()

    def _hold(self, site: str, round_number: int) -> Path:
        return self.federation.home(site) / "tasks" / f"hold-{round_number}"

    def wait_for_training(self, site: str, job: str, *, round_number: int = 1) -> None:
        self.federation.wait_for(
            lambda: round_number in self.trained(site, job), seconds=300, saying=f"training at {site}"
        )

    def kill_in_training(self, site: str, job: str, *, round_number: int = 1, number: int = signal.SIGKILL) -> None:
        """Kills, or stops, the site's agent while its trainer works for the round, in which it is held so far.

        A whole cohort that is its own quorum cannot end that round then, however long the test takes for what it does.
        """
        self.wait_for_training(site, job, round_number=round_number)
        self.federation.nodes[site].kill(number)
        self.let_go(site, round_number)
        assert not self.lines(site, job, "The task succeeded.")[round_number - 1 :], "it was killed too late"
        assert self.show(job)["job"]["state"] == "RUNNING"

    def end(self, job: str, *, seconds: float = 300) -> dict[str, Any]:
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
    """The coordinator and an agent for each of `sites`."""
    federation = LocalFederation(directory, settings=settings or FAST)
    try:
        federation.init()
        federation.start_coordinator()
        begin(federation, *sites)
    except BaseException:
        federation.stop()
        raise
    return federation


def begin(federation: LocalFederation, *sites: str, coordinators: Callable[[str], str] = lambda _: "") -> None:
    """Enrolls and starts sites, several at a time; `coordinators` says what each of them dials."""

    def enroll(name: str) -> None:
        federation.enroll(name, site_toml=SITE_TOML, coordinator=coordinators(name))

    with ThreadPoolExecutor(max_workers=3) as pool:
        list(pool.map(enroll, sites))
    for name in sites:
        federation.start_agent(name, wait=False)


def _named(line: str, key: str) -> str:
    """A value of a log line, in text or in JSON."""
    found = re.search(rf'\b{key}(?:=|": "?)([^\s",]+)', line)
    return found[1] if found else ""


@pytest.fixture(scope="session")
def shared_sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """One federation for all tests that leave it as they found it."""
    with start(tmp_path_factory.mktemp("three-sites"), "alfa", "bravo", "charlie") as federation:
        yield Jobs(federation)


@pytest.fixture
def three_sites(shared_sites: Jobs) -> Iterator[Jobs]:
    """The same; what a test leaves behind, also when it fails, does not fail the next."""
    yield shared_sites
    federation = shared_sites.federation
    for held in federation.directory.glob("agents/*/tasks/hold-*"):
        held.unlink()
    for name, node in list(federation.nodes.items()):
        if node.process.poll() is None:
            node.kill(signal.SIGCONT)
        elif name == "coordinator":
            federation.start_coordinator()
        else:
            federation.start_agent(name, wait=False)
    with OperatorClient(load_profile(str(federation.profile))) as client:
        for job in client.ask("ListJobs", operator_pb2.ListJobsRequest()).jobs:
            if job.state in (operator_pb2.JOB_STATE_SUBMITTED, operator_pb2.JOB_STATE_RUNNING):
                action = operator_pb2.ControlJobRequest(job=job.id, action=operator_pb2.JOB_ACTION_CANCEL)
                client.ask("ControlJob", action)
