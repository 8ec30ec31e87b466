"""Rounds through real processes: what is committed, what a kill costs, what one bad or silent site can do."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from deploy.local import CommandFailed
from tests.federation.conftest import SITE_TOML, Jobs, start

ALL = "quorum = 3\ngather_seconds = 60\nround_deadline_seconds = 120\nstall_limit_seconds = 60"
SLOW = "payload_mb = 2\ntrain_seconds = 1.5"
# Long enough that an operator's command, itself a process, comes before the end on a busy machine.
LONG = "payload_mb = 1\ntrain_seconds = 8"


def training(site: str):  # type: ignore[no-untyped-def]
    def is_training(shown: dict) -> bool:
        return any(
            task["site"] == site and task["state"] == "RUNNING" and task["progress"]["stage"] == "TRAINING"
            for task in shown["tasks"]
        )

    return is_training


def test_kills_of_every_process_change_no_bit_of_the_result(three_sites: Jobs) -> None:
    federation = three_sites.federation
    calm = three_sites.submit(rounds=3, task=SLOW, cohort=ALL)
    assert three_sites.end(calm)["job"]["state"] == "COMPLETED"

    rough = three_sites.submit(rounds=3, task=SLOW, cohort=ALL)
    three_sites.wait(rough, training("bravo"), saying="training at bravo")
    federation.nodes["bravo"].kill(signal.SIGKILL)
    federation.start_agent("bravo", wait=False)
    three_sites.wait(rough, lambda shown: shown["job"]["round"] >= 2, saying="round 2")
    federation.nodes["coordinator"].kill(signal.SIGKILL)
    federation.start_coordinator()
    assert three_sites.end(rough)["job"]["state"] == "COMPLETED"
    assert three_sites.digest(rough, 3) == three_sites.digest(calm, 3)


def test_a_coordinator_killed_between_updates_does_not_ask_for_accepted_ones_again(three_sites: Jobs) -> None:
    federation = three_sites.federation
    job = three_sites.submit(rounds=1, task=LONG, cohort=ALL)
    three_sites.wait(job, training("charlie"), saying="training at charlie")
    federation.nodes["charlie"].kill(signal.SIGSTOP)
    three_sites.wait(
        job, lambda shown: sum(u["fate"] == "ACCEPTED" for u in shown["rounds"][-1]["updates"]) >= 2, saying="2 updates"
    )
    federation.nodes["coordinator"].kill(signal.SIGKILL)
    federation.start_coordinator()
    federation.nodes["charlie"].kill(signal.SIGCONT)
    assert three_sites.end(job)["job"]["state"] == "COMPLETED"
    for name in ("alfa", "bravo"):
        assert federation.nodes[name].log.read_text().count("The trainer begins.") == 1


def test_a_round_closes_without_a_silent_site_and_says_whom_it_waited_for(tmp_path: Path) -> None:
    with start(tmp_path, "alfa", "bravo", "charlie") as federation:
        jobs = Jobs(federation)
        quick = "quorum = 2\ngather_seconds = 60\nround_deadline_seconds = 100\nstall_limit_seconds = 15"
        job = jobs.submit(rounds=1, task=LONG, cohort=quick)
        jobs.wait(job, training("charlie"), saying="training at charlie")
        federation.nodes["charlie"].kill(signal.SIGKILL)
        why = jobs.wait(
            job, lambda _: "charlie" in (said := federation.run("silotune", "job", "why", job, "--profile",
            str(federation.profile))) and "waits for 1 of 3" in said and said, saying="a sentence that names charlie",
        )  # fmt: skip
        assert "closes without" in why
        shown = jobs.end(job)
        assert shown["job"]["state"] == "COMPLETED"
        assert sorted(update["site"] for update in shown["rounds"][-1]["updates"]) == ["alfa", "bravo"]


def test_a_job_without_its_quorum_fails_with_a_reason_and_does_not_hang(three_sites: Jobs) -> None:
    federation = three_sites.federation
    cohort = "quorum = 3\ngather_seconds = 60\nround_deadline_seconds = 4\nstall_limit_seconds = 2\nretries = 1"
    job = three_sites.submit(rounds=1, task="payload_mb = 1\ntrain_seconds = 3600", cohort=cohort)
    shown = three_sites.end(job)
    assert shown["job"]["state"] == "FAILED"
    assert "0 of the 3 updates it needs: the deadline passed" in shown["job"]["sentence"]
    watch = ["silotune", "job", "watch", job, "--profile", str(federation.profile)]
    with pytest.raises(CommandFailed) as failed:
        federation.run(*watch)
    assert failed.value.status == 1


def test_a_site_without_policy_runs_nothing_and_the_operator_reads_why(tmp_path: Path) -> None:
    with start(tmp_path, "alfa") as federation:
        federation.enroll("closed", site_toml=SITE_TOML.split("[policy]")[0])
        federation.start_agent("closed", wait=False)
        jobs = Jobs(federation)
        shown = jobs.end(jobs.submit(rounds=1, cohort="quorum = 1\ngather_seconds = 60"))
        assert shown["job"]["state"] == "COMPLETED"
        assert [update["site"] for update in shown["rounds"][-1]["updates"]] == ["alfa"]
        reasons = [task["reason"] for task in shown["tasks"] if task["site"] == "closed"]
        assert any("policy" in reason for reason in reasons)


def test_a_revoked_site_is_out_and_the_job_goes_on_without_it(three_sites: Jobs) -> None:
    federation = three_sites.federation
    cohort = "quorum = 2\ngather_seconds = 5\nround_deadline_seconds = 600\nstall_limit_seconds = 600"
    # So many rounds that it goes on whenever the operator's command takes effect.
    job = three_sites.submit(rounds=100_000, task=SLOW, cohort=cohort)
    three_sites.wait(job, training("charlie"), saying="training at charlie")
    # Stopped, so that its work in hand is ended by the revocation and by nothing else.
    federation.nodes["charlie"].kill(signal.SIGSTOP)
    federation.silotune("site", "revoke", "charlie")
    federation.nodes["charlie"].kill(signal.SIGCONT)

    def without_charlie(shown: dict) -> bool:
        return any(one["phase"] == "COMMITTED" and one["cohort"] == ["alfa", "bravo"] for one in shown["rounds"])

    three_sites.wait(job, without_charlie, saying="a round of alfa and bravo", seconds=300)
    federation.silotune("job", "cancel", job)


def test_pause_and_resume_lose_nothing(three_sites: Jobs) -> None:
    federation = three_sites.federation
    job = three_sites.submit(rounds=1, task=LONG, cohort=ALL)
    three_sites.wait(job, training("alfa"), saying="training at alfa")
    federation.silotune("job", "pause", job)
    assert three_sites.show(job)["job"]["state"] == "PAUSED"
    federation.silotune("job", "resume", job)
    assert three_sites.end(job)["job"]["state"] == "COMPLETED"
    cancelled = three_sites.submit(rounds=2, task="payload_mb = 1\ntrain_seconds = 3600", cohort=ALL)
    three_sites.wait(cancelled, training("alfa"), saying="training at alfa")
    federation.silotune("job", "cancel", cancelled)
    after = three_sites.submit(rounds=1, cohort=ALL)
    assert three_sites.end(after)["job"]["state"] == "COMPLETED", "cancelled work must free the sites"


def test_a_second_process_on_the_same_directory_is_refused_in_a_sentence(three_sites: Jobs) -> None:
    federation = three_sites.federation
    with pytest.raises(CommandFailed) as coordinator:
        federation.run("silotune-coordinator", "serve", "--data", str(federation.data))
    with pytest.raises(CommandFailed) as agent:
        federation.run("silotune-agent", "run", "--home", str(federation.home("alfa")))
    for failed in (coordinator.value, agent.value):
        assert failed.status == 5
        assert "Traceback" not in failed.output and "error:" in failed.output.lower()


def test_every_node_serves_metrics_and_health(three_sites: Jobs) -> None:
    federation = three_sites.federation
    three_sites.end(three_sites.submit(rounds=1, cohort=ALL))
    for name in ("coordinator", "alfa"):
        node = federation.nodes[name]
        assert node.get("/healthz")[0] == 200 and node.get("/readyz")[0] == 200
        text = node.get("/metrics")[1]
        assert "silotune_build_info" in text and "silotune_transfer_bytes_total" in text


def test_the_server_optimizer_changes_the_result_and_survives_a_restart(three_sites: Jobs) -> None:
    federation = three_sites.federation
    momentum = '[aggregation.server_optimizer]\ntype = "fedavgm"\nmomentum = 0.5'
    plain = three_sites.submit(rounds=3, cohort=ALL)
    three_sites.end(plain)
    calm = three_sites.submit(rounds=3, cohort=ALL, more=momentum)
    three_sites.end(calm)
    rough = three_sites.submit(rounds=3, task="payload_mb = 1\ntrain_seconds = 0.5", cohort=ALL, more=momentum)
    three_sites.wait(rough, lambda shown: shown["job"]["round"] >= 2, saying="round 2")
    federation.nodes["coordinator"].kill(signal.SIGKILL)
    federation.start_coordinator()
    three_sites.end(rough)
    assert three_sites.digest(rough, 3) == three_sites.digest(calm, 3) != three_sites.digest(plain, 3)
