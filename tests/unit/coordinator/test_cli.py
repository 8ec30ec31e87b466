from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from coordinator import cli
from protos.identity import JoinToken
from protos.v1 import agent_pb2, operator_pb2

RECIPE = 'name = "noise"\nrounds = 2\n[task]\ntype = "synthetic"\n[local]\nsteps = 1\n'


@pytest.fixture
def silotune(door: Any):
    """Runs one command against the door, with a profile of its own."""
    profile = door.profile()

    def run(group: click.Group, *arguments: str) -> Result:
        return CliRunner().invoke(group, [*arguments, "--profile", profile])

    return run


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def facts_of(result: Result) -> Any:
    envelope = json.loads(result.stdout)
    assert (envelope["status"], envelope["exit_code"]) == ("ok", 0), result.stdout
    return envelope["data"]


def add_job(door: Any, *, state: operator_pb2.JobState = operator_pb2.JOB_STATE_RUNNING) -> operator_pb2.GetJobResponse:
    door.jobs["j1"] = operator_pb2.GetJobResponse(
        job=operator_pb2.JobView(
            id="j1", name="noise", state=state, sentence="round 1 waits for gard", round=1, rounds=2
        ),
        rounds=[
            operator_pb2.RoundView(
                number=1,
                phase=operator_pb2.ROUND_PHASE_COLLECTING,
                updates=[operator_pb2.UpdateView(site="ninds", fate=agent_pb2.FATE_REJECTED, reason="It has NaN.")],
            )
        ],
        tasks=[
            operator_pb2.TaskView(
                site="gard", kind=agent_pb2.TASK_KIND_TRAIN, state=operator_pb2.TASK_STATE_QUEUED, round=1
            )
        ],
        spec_json='{"name":"noise"}',
    )
    return door.jobs["j1"]


def commands() -> Iterator[tuple[str, click.Command]]:
    for group in (cli.site, cli.job, cli.model):
        for name, command in group.commands.items():
            yield f"{group.name} {name}", command


@pytest.mark.parametrize(("name", "command"), list(commands()))
def test_every_command_teaches_by_an_example_and_speaks_json(name: str, command: click.Command):
    help_text = CliRunner().invoke(command, ["--help"]).stdout
    assert f"silotune {name}" in help_text
    assert "--format" in help_text
    assert "--profile" in help_text


def test_invite_prints_the_token_alone(silotune: Any):
    result = silotune(cli.site, "invite", "st-olav")
    token = JoinToken.decode(result.stdout)
    assert (token.name, result.stdout.count("\n")) == ("st-olav", 1)
    assert "silotune-agent enroll --coordinator localhost:" in result.stderr
    assert result.exit_code == 0


def test_invite_as_json_says_until_when(silotune: Any):
    found = facts_of(silotune(cli.site, "invite", "house", "--house", "--valid", "30m", "--format", "json"))
    assert JoinToken.decode(found["token"]).name == "house"
    assert 1700 < found["expires_unix_seconds"] - time.time() <= 1800


@pytest.mark.parametrize("valid", ["1", "h", "0m", "1w"])
def test_a_time_that_is_none_is_wrong_usage(silotune: Any, valid: str):
    result = silotune(cli.site, "invite", "gard", "--valid", valid)
    assert result.exit_code == 2
    assert "for example 90m" in result.stderr


def test_a_bad_site_name_is_refused(silotune: Any):
    result = silotune(cli.site, "invite", "St Olav")
    assert result.exit_code == 3
    assert result.stderr.startswith("error: 'St Olav' is not a site name.\nhint: ")


def test_sites_are_listed_with_what_they_have(door: Any, silotune: Any):
    assert "No site is invited yet" in silotune(cli.site, "list").stdout
    agent = agent_pb2.AgentInfo(device="cuda:0", data_sets=[agent_pb2.DataSetInfo(name="answers", rows=120)])
    door.sites.append(operator_pb2.SiteView(name="gard", state="ENROLLED", connected=True, agent=agent))
    text = silotune(cli.site, "list").stdout
    assert [word in text for word in ("gard", "connected", "cuda:0", "answers (120)")] == [True] * 4
    assert facts_of(silotune(cli.site, "list", "--format", "json"))["sites"][0]["agent"]["data_sets"] == [
        {"name": "answers", "rows": 120}
    ]


def test_a_site_that_is_not_there_cannot_be_revoked(door: Any, silotune: Any):
    assert silotune(cli.site, "revoke", "gard").exit_code == 4
    door.sites.append(operator_pb2.SiteView(name="gard"))
    assert silotune(cli.site, "revoke", "gard").stdout == "gard is revoked.\n"


def test_submit_prints_the_job_and_what_it_will_cost(silotune: Any, recipe_file: Path):
    result = silotune(cli.job, "submit", str(recipe_file))
    assert result.stdout.startswith("job-")
    assert "What it will cost:\n  Each round moves 2.0 MB." in result.stdout
    assert "Note:\n  No site is connected now." in result.stdout
    assert "Next: silotune job watch job-" in result.stderr


def test_a_dry_run_submits_nothing(door: Any, silotune: Any, recipe_file: Path):
    result = silotune(cli.job, "submit", str(recipe_file), "--dry-run")
    assert result.stdout.startswith("noise: the recipe is valid; nothing was submitted.")
    assert not door.submissions


def test_the_same_submit_token_gives_the_same_job(silotune: Any, recipe_file: Path):
    arguments = ("submit", str(recipe_file), "--submit-token", "nightly", "--format", "json")
    first, second = (facts_of(silotune(cli.job, *arguments))["job_id"] for _ in range(2))
    assert first == second


def test_a_wrong_recipe_is_refused_before_anything_is_sent(door: Any, silotune: Any, recipe_file: Path):
    recipe_file.write_text(RECIPE.replace("steps", "stepps"))
    door.stop()
    result = silotune(cli.job, "submit", str(recipe_file))
    assert result.exit_code == 3
    assert result.stderr == (
        f"error: {recipe_file}:6: local.stepps is not a known key.\nhint: Did you mean local.steps?\n"
    )


def test_what_the_coordinator_refuses_has_its_line_too(silotune: Any, recipe_file: Path):
    recipe_file.write_text(RECIPE.replace("noise", "refused"))
    result = silotune(cli.job, "submit", str(recipe_file))
    assert result.exit_code == 3
    assert result.stderr == f"error: {recipe_file}:2: rounds is too many for this disk.\n"


def test_why_is_one_sentence_and_a_line_for_each_who_is_waited_for(door: Any, silotune: Any):
    add_job(door)
    assert silotune(cli.job, "why", "j1").stdout == (
        "round 1 waits for gard\n  gard: trains round 1, has not taken it yet\n"
    )


def test_show_says_which_updates_did_not_count_and_why(door: Any, silotune: Any):
    add_job(door)
    result = silotune(cli.job, "show", "j1")
    assert "Updates that did not count" in result.stdout
    assert "It has NaN." in result.stdout
    assert facts_of(silotune(cli.job, "show", "j1", "--format", "json"))["spec"] == {"name": "noise"}


def test_jobs_are_listed(door: Any, silotune: Any):
    assert "There is no job yet" in silotune(cli.job, "list").stdout
    add_job(door)
    assert "noise" in silotune(cli.job, "list").stdout


def test_a_job_is_paused_resumed_and_cancelled(door: Any, silotune: Any):
    add_job(door)
    states = [facts_of(silotune(cli.job, action, "j1", "--format", "json"))["state"] for action in ("pause", "resume")]
    assert states == ["PAUSED", "RUNNING"]
    assert silotune(cli.job, "cancel", "j1").stdout.startswith("CANCELLED, round 1 of 2")


def test_sites_that_were_set_aside_are_readmitted(door: Any, silotune: Any):
    add_job(door)
    asked: list[int] = []
    door.on_control = asked.append
    result = silotune(cli.job, "readmit", "j1")
    assert (result.exit_code, asked) == (0, [operator_pb2.JOB_ACTION_READMIT])
    assert result.stdout == "RUNNING, round 1 of 2: round 1 waits for gard\n"


def test_why_a_job_failed_is_said_with_the_reason_of_each_site(door: Any, silotune: Any):
    state = add_job(door, state=operator_pb2.JOB_STATE_FAILED)
    state.job.sentence = "round 1 cannot reach its quorum: set aside: gard (no column 'text')"
    state.tasks[0].state = operator_pb2.TASK_STATE_FAILED
    state.tasks[0].reason = "Data set 'answers' has no column 'text'."
    lines = [state.job.sentence, "  gard: trains round 1, failed: Data set 'answers' has no column 'text'."]
    assert silotune(cli.job, "why", "j1").stdout.splitlines() == lines
    told = facts_of(silotune(cli.job, "why", "j1", "--format", "json"))
    assert (told["state"], told["waiting"], len(told["failed"])) == ("FAILED", [], 1)


def test_what_a_site_says_of_itself_does_not_steer_the_terminal(door: Any, silotune: Any):
    agent = agent_pb2.AgentInfo(device="\x1b[2Jcpu", version="1\r\n2", data_sets=[{"name": "\x9b31mno\u202etes"}])
    door.sites.append(operator_pb2.SiteView(name="gard", state="ENROLLED", agent=agent))
    add_job(door).rounds[0].updates[0].reason = "\x1b]0;owned\x07 NaN"
    add_job(door).job.sentence = "gard\x1b[31m is\nred"
    for arguments in ([cli.site, "list"], [cli.job, "show", "j1"], [cli.job, "why", "j1"], [cli.job, "list"]):
        for output_format in ("text", "json"):
            text = silotune(*arguments, "--format", output_format).stdout
            assert all(line.isprintable() for line in text.split("\n")), arguments
    assert "[2Jcpu" in silotune(cli.site, "list").stdout


def test_what_the_jobs_state_does_not_allow_is_exit_code_5(door: Any, silotune: Any):
    add_job(door, state=operator_pb2.JOB_STATE_COMPLETED)
    assert silotune(cli.job, "pause", "j1").exit_code == 5


@pytest.mark.parametrize("command", ["watch", "why", "show", "pause", "events"])
def test_a_job_that_is_not_there_is_exit_code_4(silotune: Any, command: str):
    result = silotune(cli.job, command, "nope")
    assert result.exit_code == 4
    assert result.stderr == "error: There is no job 'nope'.\nhint: `silotune job list` shows them all.\n"


def test_events_come_page_by_page_until_the_job_ends(door: Any, silotune: Any):
    add_job(door, state=operator_pb2.JOB_STATE_COMPLETED)
    door.events += [operator_pb2.EventView(id=n, unix_seconds=n, round=1, sentence=f"step {n}") for n in range(1, 6)]
    for arguments in (["events", "j1"], ["events", "j1", "--follow"]):
        lines = silotune(cli.job, *arguments).stdout.splitlines()
        assert [line.rpartition("  ")[2] for line in lines] == [f"step {n}" for n in range(1, 6)]
    assert len(facts_of(silotune(cli.job, "events", "j1", "--format", "json"))["events"]) == 5


def test_watching_a_job_that_was_cancelled_is_exit_code_1(door: Any, silotune: Any):
    add_job(door, state=operator_pb2.JOB_STATE_CANCELLED)
    assert silotune(cli.job, "watch", "j1").exit_code == 1


def test_a_coordinator_that_is_down_is_exit_code_7(door: Any, silotune: Any):
    door.stop()
    result = silotune(cli.job, "list", "--format", "json")
    assert result.exit_code == 7
    assert json.loads(result.stdout)["data"]["error"] == "Unavailable"


def test_a_missing_profile_is_exit_code_6(tmp_path: Path):
    assert CliRunner().invoke(cli.job, ["list", "--profile", str(tmp_path / "no")]).exit_code == 6


def test_an_export_into_a_file_is_refused(silotune: Any, recipe_file: Path):
    result = silotune(cli.model, "export", "j1", "--out", str(recipe_file))
    assert result.exit_code == 2
