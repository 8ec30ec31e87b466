"""Rounds through real processes: what is committed, what a kill costs, what one bad or silent site can do."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from deploy.local import CommandFailed
from tests.federation.conftest import SITE_TOML, Jobs, start

ALL = "quorum = 3\ngather_seconds = 600\nround_deadline_seconds = 3600\nstall_limit_seconds = 3600"


@pytest.fixture(scope="module")
def undisturbed(shared_sites: Jobs) -> str:
    """The digest after three rounds in which nothing happened; how long a training takes is in no bit."""
    job = shared_sites.submit(rounds=3, cohort=ALL)
    assert shared_sites.end(job)["job"]["state"] == "COMPLETED"
    return shared_sites.digest(job, 3)


def test_kills_of_every_process_change_no_bit_of_the_result(three_sites: Jobs, undisturbed: str) -> None:
    federation = three_sites.federation
    three_sites.hold("bravo", 1)
    three_sites.hold("charlie", 2)
    rough = three_sites.submit(rounds=3, cohort=ALL)
    three_sites.kill_in_training("bravo", rough)
    federation.start_agent("bravo", wait=False)
    three_sites.kill_in_training("charlie", rough, round_number=2, number=signal.SIGSTOP)
    federation.nodes["coordinator"].kill(signal.SIGKILL)
    federation.start_coordinator()
    federation.nodes["charlie"].kill(signal.SIGCONT)
    assert three_sites.end(rough)["job"]["state"] == "COMPLETED"
    assert three_sites.digest(rough, 3) == undisturbed


def test_a_coordinator_killed_between_updates_does_not_ask_for_accepted_ones_again(three_sites: Jobs) -> None:
    federation = three_sites.federation
    three_sites.hold("charlie", 1)
    job = three_sites.submit(rounds=1, cohort=ALL)
    three_sites.kill_in_training("charlie", job, number=signal.SIGSTOP)
    three_sites.wait(
        job, lambda shown: sum(u["fate"] == "ACCEPTED" for u in shown["rounds"][-1]["updates"]) == 2, saying="2 updates"
    )
    federation.nodes["coordinator"].kill(signal.SIGKILL)
    federation.start_coordinator()
    federation.nodes["charlie"].kill(signal.SIGCONT)
    assert three_sites.end(job)["job"]["state"] == "COMPLETED"
    for name in ("alfa", "bravo"):
        assert three_sites.trained(name, job) == [1]


def test_a_round_closes_without_a_silent_site_and_says_whom_it_waited_for(three_sites: Jobs) -> None:
    quick = "quorum = 2\ngather_seconds = 600\nround_deadline_seconds = 3600\nstall_limit_seconds = 10"
    three_sites.hold("charlie", 1)
    job = three_sites.submit(rounds=1, cohort=quick)
    three_sites.kill_in_training("charlie", job)

    def says(shown: dict) -> bool:
        said = shown["job"]["sentence"]
        return "waits for 1 of 3" in said and "charlie" in said and "closes without" in said

    three_sites.wait(job, says, saying="a sentence that names charlie")
    shown = three_sites.end(job)
    assert shown["job"]["state"] == "COMPLETED"
    assert sorted(update["site"] for update in shown["rounds"][-1]["updates"]) == ["alfa", "bravo"]


def test_a_job_without_its_quorum_fails_with_a_reason_and_does_not_hang(three_sites: Jobs) -> None:
    federation = three_sites.federation
    cohort = "quorum = 3\ngather_seconds = 600\nround_deadline_seconds = 2\nstall_limit_seconds = 1\nretries = 1"
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


def test_a_revoked_site_is_out_and_the_job_goes_on_without_it(tmp_path: Path) -> None:
    with start(tmp_path, "alfa", "bravo") as federation:
        jobs = Jobs(federation)
        cohort = "quorum = 1\ngather_seconds = 600\nround_deadline_seconds = 3600\nstall_limit_seconds = 3600"
        # So many rounds that it goes on whenever the operator's command takes effect.
        jobs.hold("bravo", 1)
        job = jobs.submit(rounds=100_000, cohort=cohort)
        # Stopped, so that its work in hand is ended by the revocation and by nothing else.
        jobs.kill_in_training("bravo", job, number=signal.SIGSTOP)
        federation.silotune("site", "revoke", "bravo")
        federation.nodes["bravo"].kill(signal.SIGCONT)

        def without_bravo(shown: dict) -> bool:
            return any(one["cohort"] == ["alfa"] and one["phase"] == "COMMITTED" for one in shown["rounds"])

        jobs.wait(job, without_bravo, saying="a round of alfa alone")
        federation.silotune("job", "cancel", job)


def test_pause_resume_and_cancel_repeat_no_training_and_free_the_sites(three_sites: Jobs) -> None:
    federation = three_sites.federation
    # So many rounds that it is under way whenever a command takes effect.
    job = three_sites.submit(rounds=100_000, cohort=ALL)

    def committed(shown: dict) -> int:
        return shown["job"]["head_version"] or 0

    three_sites.wait(job, committed, saying="a round")
    federation.silotune("job", "pause", job)
    paused = three_sites.show(job)
    assert paused["job"]["state"] == "PAUSED"
    federation.silotune("job", "resume", job)
    three_sites.wait(job, lambda shown: committed(shown) > committed(paused) + 1, saying="two more rounds")
    federation.silotune("job", "cancel", job)
    for name in ("alfa", "bravo", "charlie"):
        trained = three_sites.trained(name, job)
        assert len(trained) == len(set(trained)) > committed(paused)
    long = three_sites.submit(rounds=2, task="payload_mb = 1\ntrain_seconds = 3600", cohort=ALL)
    federation.wait_for(lambda: three_sites.trained("alfa", long), seconds=300, saying="training at alfa")
    federation.silotune("job", "cancel", long)
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


def test_the_server_optimizer_changes_the_result_and_survives_a_restart(three_sites: Jobs, undisturbed: str) -> None:
    federation = three_sites.federation
    momentum = '[aggregation.server_optimizer]\ntype = "fedavgm"\nmomentum = 0.5'
    calm = three_sites.submit(rounds=3, cohort=ALL, more=momentum)
    three_sites.end(calm)
    three_sites.hold("charlie", 2)
    rough = three_sites.submit(rounds=3, cohort=ALL, more=momentum)
    three_sites.kill_in_training("charlie", rough, round_number=2, number=signal.SIGSTOP)
    federation.nodes["coordinator"].kill(signal.SIGKILL)
    federation.start_coordinator()
    federation.nodes["charlie"].kill(signal.SIGCONT)
    three_sites.end(rough)
    assert three_sites.digest(rough, 3) == three_sites.digest(calm, 3) != undisturbed
