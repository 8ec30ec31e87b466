"""A federation whose aggregates a house agent distils: nothing is lost, and nothing is distilled twice, by any kill."""

from __future__ import annotations

from pathlib import Path

import psutil

from tests.federation.conftest import SITE_TOML, Jobs, start

ROUNDS = 3
HOUSE_TOML = SITE_TOML.replace('["synthetic"]', '["synthetic", "distill"]')
# The house agent is waited for however slow the machine is.
COHORT = "quorum = 2\ngather_seconds = 600"
DISTILLED = "[distillation]\nlabels = false\n"


def test_every_round_is_distilled_once_whatever_is_killed_and_never_lost(tmp_path: Path) -> None:
    with start(tmp_path, "alfa", "bravo") as federation:
        federation.enroll("hq", site_toml=HOUSE_TOML, house=True)
        federation.start_agent("hq", wait=False)
        jobs = Jobs(federation)
        coordinator = federation.nodes["coordinator"]

        def distilled(job: str) -> list[int]:
            return jobs.trained("hq", job, task="distill")

        def begun(job: str, number: int) -> None:
            federation.wait_for(lambda: number in distilled(job), seconds=300, saying=f"distilling round {number}")

        plain = jobs.submit(rounds=ROUNDS, cohort=COHORT, more=DISTILLED)
        undisturbed = jobs.end(plain)
        assert undisturbed["job"]["state"] == "COMPLETED", undisturbed["job"]["sentence"]
        assert distilled(plain) == [1, 2, 3]

        # Round 1: the coordinator is killed while the house agent is at it.
        jobs.hold("hq", 1, 2, 3)
        job = jobs.submit(rounds=ROUNDS, cohort=COHORT, more=DISTILLED)
        begun(job, 1)
        coordinator.kill()
        federation.start_coordinator()
        jobs.let_go("hq", 1)
        # Round 2: the house agent and its trainer are killed; it had nothing to go on from.
        begun(job, 2)
        federation.nodes["hq"].kill()
        jobs.let_go("hq", 2)
        federation.start_agent("hq", wait=False)
        # Round 3: both are killed when the result is sealed and nobody has heard of it.
        begun(job, 3)
        federation.nodes["coordinator"].kill()
        jobs.let_go("hq", 3)
        federation.wait_for(
            lambda: len(jobs.lines("hq", job, "The result is sealed.", task="distill")) == ROUNDS,
            seconds=300, saying="a result",
        )  # fmt: skip
        federation.nodes["hq"].kill()
        federation.start_coordinator()
        federation.start_agent("hq", wait=False)

        ended = jobs.end(job)
        assert ended["job"]["state"] == "COMPLETED", ended["job"]["sentence"]
        assert distilled(job) == [1, 2, 2, 3]
        assert jobs.lines("hq", job, "offered again", task="distill")
        # A teacher that was killed went on from the round that was committed: it has had one lesson a round.
        for shown in (undisturbed, ended):
            rounds = {int(found["number"]): found for found in shown["rounds"]}
            assert [rounds[number]["metrics"]["teacher_loss"] for number in (1, 2, 3)] == [1, 1 / 2, 1 / 3]
            assert not any(found.get("undistilled") for found in rounds.values())
        assert jobs.digest(job, ROUNDS) == jobs.digest(plain, ROUNDS)

        # A trainer that dies alone is a failure of the task, and the agent is given it once more.
        jobs.hold("hq", 1)
        alone = jobs.submit(rounds=1, cohort=COHORT, more=DISTILLED)
        federation.wait_for(lambda: distilled(alone) == [1], seconds=300, saying="distilling round 1")
        agent = psutil.Process(federation.nodes["hq"].pid)
        (trainer,) = [child for child in agent.children() if "client_agent.tether" in child.cmdline()]
        trainer.kill()
        federation.wait_for(lambda: distilled(alone) == [1, 1], seconds=300, saying="distilling it again")
        jobs.let_go("hq", 1)
        _version_0, one = jobs.end(alone)["rounds"]
        assert (one["metrics"]["teacher_loss"], one["undistilled"]) == (1.0, "")

        # An agent whose policy does not name it declines, and no round waits for long.
        (federation.home("hq") / "site.toml").write_text(SITE_TOML.replace("{http}", "127.0.0.1:0"))
        federation.nodes["hq"].kill()
        federation.start_agent("hq", wait=False)
        shown = jobs.end(jobs.submit(rounds=1, cohort=COHORT, more=DISTILLED))
        assert shown["job"]["state"] == "COMPLETED", shown["job"]["sentence"]
        why = "hq declined: The policy of this site does not allow it: tasks does not name 'distill'."
        assert shown["rounds"][-1]["undistilled"] == why
