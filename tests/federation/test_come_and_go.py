"""Sites join in mid-job, break, are set aside, and come back; a job that failed is resumed."""

from __future__ import annotations

import shutil
from pathlib import Path

from deploy.local import LocalFederation
from tests.federation.conftest import SITE_TOML, Jobs, start

NOT_DIRECTORY = "The agent could not use its disk: Not a directory."


def break_site(federation: LocalFederation, name: str) -> Path:
    """Every training at the site fails from now on: a file lies where it keeps received models. Returns its path."""

    def is_there() -> bool:
        sites = federation.silotune("site", "list")["sites"]
        return any(site["name"] == name and site.get("connected") for site in sites)

    # Not before it has started: it makes its directories then.
    federation.wait_for(is_there, seconds=300, saying=f"{name} being connected")
    blobs = federation.home(name) / "blobs"
    shutil.rmtree(blobs, ignore_errors=True)
    blobs.write_text("")
    return blobs


def counted(shown: dict, site: str) -> bool:
    return any(
        update["site"] == site and update["fate"] == "ACCEPTED"
        for record in shown["rounds"]
        for update in record.get("updates", [])
    )


def test_a_job_that_failed_is_resumed_when_its_site_is_mended_and_repeats_no_training(tmp_path: Path) -> None:
    with start(tmp_path, "alfa", "bravo") as federation:
        jobs = Jobs(federation)
        blobs = break_site(federation, "bravo")
        cohort = "quorum = 2\ngather_seconds = 60\nround_deadline_seconds = 600\nretries = 0"
        job = jobs.submit(rounds=1, cohort=cohort)
        failed = jobs.end(job, seconds=300)["job"]
        assert failed["state"] == "FAILED"
        assert f"bravo failed: {NOT_DIRECTORY}" in failed["sentence"]
        assert f"`silotune job resume {job}` tries round 1 again and keeps the update" in failed["sentence"]
        blobs.unlink()
        federation.silotune("job", "resume", job)
        shown = jobs.end(job, seconds=300)
        assert shown["job"]["state"] == "COMPLETED"
        assert counted(shown, "alfa") and counted(shown, "bravo")
        lines = federation.nodes["alfa"].log.read_text().splitlines()
        assert sum("A task was granted." in line and "task=train" in line for line in lines) == 1


def test_a_site_that_fails_every_task_is_set_aside_and_comes_back_when_readmitted_and_a_new_one_joins(
    tmp_path: Path,
) -> None:
    with start(tmp_path, "alfa", "bravo") as federation:
        jobs = Jobs(federation)
        blobs = break_site(federation, "bravo")
        # So many rounds that it goes on whatever the operator does meanwhile.
        job = jobs.submit(rounds=100_000, cohort="quorum = 1\ngather_seconds = 600\nround_deadline_seconds = 3600")
        why = f"set aside: bravo ({NOT_DIRECTORY}"
        jobs.wait(
            job, lambda shown: why in shown["job"]["sentence"], saying="a sentence that sets bravo aside", seconds=300
        )
        assert not counted(jobs.show(job), "bravo")
        blobs.unlink()
        federation.silotune("job", "readmit", job, "bravo")
        jobs.wait(job, lambda shown: counted(shown, "bravo"), saying="an update of bravo", seconds=300)
        federation.enroll("newcomer", site_toml=SITE_TOML)
        federation.start_agent("newcomer", wait=False)
        jobs.wait(job, lambda shown: counted(shown, "newcomer"), saying="an update of the newcomer", seconds=300)
        federation.silotune("job", "cancel", job)
