"""Three coordinators on one PostgreSQL and one S3 bucket: any answers, one drives, and a killed one costs nothing."""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local import LocalFederation, Node
from tests.federation.conftest import SITE_TOML, Jobs
from tests.servers.postgres import postgres
from tests.servers.s3 import s3

REPLICAS = ("coordinator", "second", "third")
SITES = ("alfa", "bravo", "charlie")
ALL = "quorum = 3\ngather_seconds = 60\nround_deadline_seconds = 300\nstall_limit_seconds = 300"


@pytest.fixture
def replicated(tmp_path: Path) -> Iterator[Jobs]:
    with postgres(tmp_path) as database, s3(tmp_path) as bucket:
        storage = {
            "database": database.create("silotune"),
            "blobs": f"s3://{bucket.bucket('silotune')}/fl",
            "s3_endpoint_url": bucket.url,
            "reserve_bytes": 1_000_000,
        }
        settings = {"tasks": {"lease_seconds": 3}, "storage": storage}
        with LocalFederation(tmp_path, settings=settings, environment=bucket.environment, json_logs=True) as federation:
            federation.init()
            addresses = [federation.address, *(federation.add_replica(name) for name in REPLICAS[1:])]
            for name in REPLICAS:
                # All of them migrate the empty database at once.
                federation.start_coordinator(name, wait=False)
            for node in federation.nodes.values():
                federation.wait_for(lambda node=node: is_ready(node), seconds=60, saying=f"{node.name} being ready")
            profile = federation.profile / "profile.toml"
            profile.write_text(profile.read_text().replace(federation.address, ",".join(addresses)))
            for position, name in enumerate(SITES):
                # Each agent prefers another replica.
                mine = ",".join(addresses[position:] + addresses[:position])
                federation.enroll(name, site_toml=SITE_TOML, coordinator=mine)
                federation.start_agent(name, wait=False)
            yield Jobs(federation)


def is_ready(node: Node) -> bool:
    try:
        return node.get("/readyz")[0] == 200
    except OSError:
        return False


def drivers(federation: LocalFederation, job: str) -> list[str]:
    """The replicas that drove the job, in the order of their generations."""
    found = []
    for name in REPLICAS:
        for line in federation.nodes[name].log.read_text().splitlines():
            if '"drives the job"' in line and f'"{job}"' in line:
                generation = re.search(r'"generation": (\d+)', line)
                assert generation
                found.append((int(generation[1]), name))
    return [name for _, name in sorted(found)]


def trainings(federation: LocalFederation, job: str) -> Counter[tuple[str, str]]:
    """How often each (site, round) of the job was trained, by the sites' own logs."""
    count: Counter[tuple[str, str]] = Counter()
    for name in SITES:
        for line in federation.nodes[name].log.read_text().splitlines():
            if '"The trainer begins."' in line and f'"{job}"' in line and '"train"' in line:
                round_number = re.search(r'"round": (\d+)', line)
                assert round_number
                count[name, round_number[1]] += 1
    return count


def test_killing_the_driver_again_and_again_repeats_nothing_and_changes_no_bit(replicated: Jobs) -> None:
    federation = replicated.federation
    calm = replicated.submit(rounds=3, task="payload_mb = 1", cohort=ALL)
    assert replicated.end(calm)["job"]["state"] == "COMPLETED"

    rough = replicated.submit(rounds=3, task="payload_mb = 12\ntrain_seconds = 4", cohort=ALL)
    twin = replicated.submit(rounds=3, task="payload_mb = 12", cohort=ALL)
    for number in (1, 2):
        replicated.wait(rough, lambda shown, number=number: shown["job"]["round"] >= number, saying=f"round {number}")
        driver = drivers(federation, rough)[-1]
        federation.nodes[driver].kill(signal.SIGKILL)
        federation.wait_for(
            lambda before=driver: drivers(federation, rough)[-1] != before, seconds=60, saying="another driver"
        )
        federation.start_coordinator(driver)
    for job in (rough, twin):
        assert replicated.end(job, seconds=180)["job"]["state"] == "COMPLETED"
    assert replicated.digest(rough, 3) == replicated.digest(twin, 3)
    assert len(set(drivers(federation, rough))) >= 2
    assert trainings(federation, rough) == Counter({(site, str(n)): 1 for site in SITES for n in (1, 2, 3)})


def test_a_stopped_driver_that_goes_on_after_it_was_replaced_changes_nothing(replicated: Jobs) -> None:
    federation = replicated.federation
    job = replicated.submit(rounds=2, task="payload_mb = 1\ntrain_seconds = 4", cohort=ALL)
    replicated.wait(job, lambda shown: shown["job"]["round"] >= 1, saying="round 1")
    driver = drivers(federation, job)[-1]
    federation.nodes[driver].kill(signal.SIGSTOP)
    federation.wait_for(
        lambda: drivers(federation, job)[-1] != driver, seconds=90, saying="another driver"
    )  # fmt: skip
    federation.nodes[driver].kill(signal.SIGCONT)
    shown = replicated.end(job, seconds=180)
    assert shown["job"]["state"] == "COMPLETED"
    assert [sorted(u["site"] for u in r["updates"]) for r in shown["rounds"] if r["number"]] == [list(SITES)] * 2
