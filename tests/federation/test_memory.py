"""The coordinator's memory keeps the formula that the README states, with more sites and with larger models."""

from __future__ import annotations

from pathlib import Path

from deploy.local import LocalFederation
from tests.federation.conftest import Jobs, start

MEGABYTE = 1_000_000
FORMULA_BYTES = 140 * MEGABYTE + (32 << 20) + 8 * 8 * MEGABYTE


def peak(federation: LocalFederation) -> int:
    return federation.nodes["coordinator"].peak_rss_bytes()


def test_the_coordinator_stays_within_its_formula_with_more_sites_and_a_larger_model(tmp_path: Path) -> None:
    names = ["alfa", "bravo", "charlie", "delta", "echo", "foxtrot"]
    with start(tmp_path, *names) as federation:
        jobs = Jobs(federation)
        for megabytes in (20, 120):
            cohort = f"quorum = {len(names)}\ngather_seconds = 60"
            job = jobs.submit(rounds=2, task=f"payload_mb = {megabytes}", cohort=cohort)
            assert jobs.end(job)["job"]["state"] == "COMPLETED"
            assert peak(federation) < FORMULA_BYTES, (
                f"{peak(federation) / MEGABYTE:.0f} MB after {megabytes} MB updates"
            )
