"""Three coordinators on one PostgreSQL and one S3 bucket: any answers, one drives, and a killed one costs nothing."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local import LocalFederation, Node
from tests.federation.conftest import Jobs, begin
from tests.servers.postgres import postgres
from tests.servers.s3 import s3

REPLICAS = ("coordinator", "second", "third")
SITES = ("alfa", "bravo", "charlie")
ALL = "quorum = 3\ngather_seconds = 600\nround_deadline_seconds = 3600\nstall_limit_seconds = 3600"
LARGE = "payload_mb = 12"


@pytest.fixture(scope="module")
def replicated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    tmp_path = tmp_path_factory.mktemp("replicated")
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
                federation.wait_for(lambda node=node: is_ready(node), seconds=300, saying=f"{node.name} being ready")
            profile = federation.profile / "profile.toml"
            profile.write_text(profile.read_text().replace(federation.address, ",".join(addresses)))

            def mine(name: str) -> str:
                """Each agent prefers another replica."""
                position = SITES.index(name)
                return ",".join(addresses[position:] + addresses[:position])

            begin(federation, *SITES, coordinators=mine)
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


def another_driver(federation: LocalFederation, job: str, *, than: str) -> None:
    federation.wait_for(lambda: drivers(federation, job)[-1] != than, seconds=300, saying="another driver")


def test_killing_the_driver_again_and_again_repeats_nothing_and_changes_no_bit(replicated: Jobs) -> None:
    federation = replicated.federation
    replicated.hold("charlie", 1, 2)
    rough = replicated.submit(rounds=3, task=LARGE, cohort=ALL)
    for number in (1, 2):
        replicated.kill_in_training("charlie", rough, round_number=number, number=signal.SIGSTOP)
        driver = drivers(federation, rough)[-1]
        federation.nodes[driver].kill(signal.SIGKILL)
        another_driver(federation, rough, than=driver)
        federation.nodes["charlie"].kill(signal.SIGCONT)
        federation.start_coordinator(driver, wait=False)
    twin = replicated.submit(rounds=3, task=LARGE, cohort=ALL)
    for job in (rough, twin):
        assert replicated.end(job)["job"]["state"] == "COMPLETED"
    assert replicated.digest(rough, 3) == replicated.digest(twin, 3)
    assert len(set(drivers(federation, rough))) >= 2
    for site in SITES:
        assert replicated.trained(site, rough) == [1, 2, 3]


def test_a_stopped_driver_that_goes_on_after_it_was_replaced_changes_nothing(replicated: Jobs) -> None:
    federation = replicated.federation
    replicated.hold("charlie", 1)
    job = replicated.submit(rounds=2, task=LARGE, cohort=ALL)
    replicated.kill_in_training("charlie", job, number=signal.SIGSTOP)
    driver = drivers(federation, job)[-1]
    federation.nodes[driver].kill(signal.SIGSTOP)
    another_driver(federation, job, than=driver)
    for name in (driver, "charlie"):
        federation.nodes[name].kill(signal.SIGCONT)
    shown = replicated.end(job)
    assert shown["job"]["state"] == "COMPLETED"
    assert [sorted(u["site"] for u in r["updates"]) for r in shown["rounds"] if r["number"]] == [list(SITES)] * 2


def test_a_coordinator_that_starts_before_its_database_waits_for_it(tmp_path: Path) -> None:
    with postgres(tmp_path) as database:
        settings = {"storage": {"database": database.create("silotune"), "reserve_bytes": 1_000_000}}
        database.stop_immediately()
        with LocalFederation(tmp_path, settings=settings) as federation:
            federation.init()
            node = federation.start_coordinator(wait=False)
            federation.wait_for(
                lambda: "waits for the database" in node.log.read_text(),
                seconds=300,
                saying="a word about the database",
            )
            database.start()
            federation.wait_for(lambda: is_ready(node), seconds=300, saying="the coordinator being ready")
