from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import insert

from coordinator import observe
from coordinator.storage import schema
from coordinator.storage.store import Store
from protos import jobspec
from protos.identity import Role

NOW = time.time()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(f"sqlite:///{tmp_path}/c.db")
    yield opened
    opened.close()


def add_site(store: Store, name: str, *, seen: float) -> None:
    store.sites.invite(name, role=Role.SITE, secret_hash=name, expires_unix_seconds=NOW + 60, now_unix_seconds=NOW)
    store.sites.redeem(name, key_hash="k", serial="1", expires_unix_seconds=NOW + 5000, now_unix_seconds=NOW)
    store.sites.see(name, agent={}, now_unix_seconds=seen)


def add_job(store: Store, job_id: str) -> None:
    fields: dict[str, Any] = {"name": "j", "task": {"type": "synthetic"}, "local": {"steps": 1}, "rounds": 1}
    store.jobs.create(jobspec.parse(fields), job_id=job_id, submit_token="", now_unix_seconds=NOW)


def scrape(store: Store) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    metrics = observe.Metrics(version="1.2.3")
    collector = observe.StoreCollector(
        store, spare_bytes=lambda: 77, certificates={"coordinator": 123.0}, unix_seconds=lambda: NOW
    )
    metrics.registry.register(collector)
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_jobs_and_sites_are_shown_as_they_stand_in_the_store(store: Store):
    add_site(store, "here", seen=NOW)
    add_site(store, "away", seen=NOW - 3600)
    add_job(store, "j1")
    found = scrape(store)
    assert found["silotune_build_info", (("version", "1.2.3"),)] == 1
    assert found["silotune_site_up", (("site", "here"),)] == 1
    assert found["silotune_site_up", (("site", "away"),)] == 0
    assert found["silotune_site_last_seen_timestamp_seconds", (("site", "away"),)] == pytest.approx(NOW - 3600)
    assert found["silotune_job_state", (("job", "j1"), ("state", "submitted"))] == 1
    assert found["silotune_job_state", (("job", "j1"), ("state", "running"))] == 0
    assert found["silotune_round_current", (("job", "j1"),)] == 0
    assert found["silotune_round_waiting_sites", (("job", "j1"),)] == 0
    assert found["silotune_certificate_expiry_timestamp_seconds", (("holder", "coordinator"),)] == 123
    assert found["silotune_certificate_expiry_timestamp_seconds", (("holder", "site/here"),)] == pytest.approx(
        NOW + 5000
    )
    assert found["silotune_disk_spare_bytes", ()] == 77


def test_what_the_last_aggregation_measured_is_told_where_it_measured_something(store: Store):
    add_job(store, "j1")
    add_job(store, "j2")
    times = {"opened_at": 0.0, "deadline_at": 9.0, "ended_at": 5.0}
    with store.database.write() as connection:
        measured = {"aggregation_error": 0.25, "update_norm.here": 2.5, "update_norm_z.here": 1.5}
        for job, metrics in (("j1", measured), ("j2", None)):
            connection.execute(
                insert(schema.rounds).values(
                    job_id=job, number=1, attempt=1, phase="COMMITTED", cohort=["here"], **times
                )
            )
            connection.execute(
                insert(schema.commands).values(
                    job_id=job, round=1, generation=1, state="DONE", contributions=[], queued_at=1.0, metrics=metrics
                )
            )
    told = ("silotune_aggregation_error", "silotune_update_")
    found = {key: value for key, value in scrape(store).items() if key[0].startswith(told)}
    assert found == {
        ("silotune_aggregation_error", (("job", "j1"),)): 0.25,
        ("silotune_update_norm", (("job", "j1"), ("site", "here"))): 2.5,
        ("silotune_update_norm_z", (("job", "j1"), ("site", "here"))): 1.5,
    }


def test_without_its_database_a_scrape_still_answers_and_invents_nothing(tmp_path: Path):
    (tmp_path / "lost").mkdir()
    store = Store.open(f"sqlite:///{tmp_path}/lost/c.db")
    add_site(store, "here", seen=NOW)
    assert scrape(store)["silotune_store_up", ()] == 1
    store.close()
    shutil.rmtree(tmp_path / "lost")
    found = scrape(store)
    assert found["silotune_store_up", ()] == 0
    assert found["silotune_disk_spare_bytes", ()] == 77
    assert found["silotune_certificate_expiry_timestamp_seconds", (("holder", "coordinator"),)] == 123
    assert not [name for name, _ in found if name.startswith(("silotune_job", "silotune_site"))]


def test_revoked_sites_and_long_ended_jobs_leave_the_labels(store: Store):
    add_site(store, "gone", seen=NOW)
    store.sites.revoke("gone")
    for number in range(observe.ENDED_JOBS_SHOWN + 5):
        add_job(store, f"j{number}")
        store.jobs.control(f"j{number}", action="cancel", now_unix_seconds=NOW)
    found = scrape(store)
    assert not [labels for name, labels in found if name == "silotune_site_up"]
    assert len({labels for name, labels in found if name == "silotune_round_current"}) == observe.ENDED_JOBS_SHOWN


def test_every_name_has_the_prefix_and_a_base_unit(store: Store):
    add_site(store, "here", seen=NOW)
    add_job(store, "j1")
    names = {name.removesuffix("_created") for name, _ in scrape(store)}
    ours = {name for name in names if not name.startswith("process_")}
    assert all(name.startswith("silotune_") for name in ours)
    assert not [name for name in ours if name.endswith(("_ms", "_mb", "_percent", "_minutes"))]


async def test_readiness_follows_its_checks_and_goes_first_at_shutdown(store: Store):
    spare = [10]
    readiness = observe.Readiness((observe.store_check(store), observe.disk_check(lambda: spare[0])))
    app = observe.http_app(metrics=observe.Metrics(version="1"), readiness=readiness)
    async with TestClient(TestServer(app)) as client:

        async def ready() -> tuple[int, str]:
            response = await client.get("/readyz")
            return response.status, " ".join((await response.json())["reasons"])

        async def gauge() -> str:
            text = await (await client.get("/metrics")).text()
            return next(line for line in text.splitlines() if line.startswith("silotune_ready "))

        assert await ready() == (200, "")
        assert await gauge() == "silotune_ready 1.0"
        spare[0] = -5
        assert await ready() == (503, "the disk lacks 5 bytes of its reserve")
        assert await gauge() == "silotune_ready 0.0"
        spare[0] = 0
        assert await ready() == (200, "")
        readiness.draining = True
        assert await ready() == (503, "the coordinator is shutting down")
        assert (await client.get("/healthz")).status == 200
        assert "silotune_build_info" in await (await client.get("/metrics")).text()


def test_a_store_that_cannot_be_written_is_a_reason(tmp_path: Path):
    store = Store.open(f"sqlite:///{tmp_path}/c.db")
    check = observe.store_check(store)
    assert check() == ""
    store.close()
    for file in tmp_path.iterdir():
        file.unlink()
    tmp_path.rmdir()
    assert "cannot be written" in check()


@pytest.mark.parametrize("shape", ["text", "json"])
def test_a_logged_error_shows_no_local_variables(shape: str, capsys: pytest.CaptureFixture[str]):
    def fail(secret: str) -> None:
        raise ValueError("defect")

    token = "-".join(("silo1", "secret", "token"))
    before = structlog.get_config()
    try:
        observe.configure_logs(format=shape, level="info")
        log = structlog.get_logger()
        log.debug("not shown")
        log.info("a round opens", round=3)
        try:
            fail(token)
        except ValueError:
            log.exception("a step failed")
    finally:
        structlog.configure(**before)
    written = capsys.readouterr().err
    assert "defect" in written and "a step failed" in written
    assert token not in written
    assert "not shown" not in written
    if shape == "json":
        first = json.loads(written.splitlines()[0])
        assert (first["event"], first["round"], first["level"]) == ("a round opens", 3, "info")
