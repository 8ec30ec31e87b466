from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from coordinator import cli, job_cli
from protos.identity import JoinToken
from protos.v1 import agent_pb2, operator_pb2
from tests.unit.coordinator.conftest import add_job, facts_of


def commands() -> Iterator[tuple[str, click.Command]]:
    for group in (cli.site, job_cli.job, cli.model):
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


def test_a_silent_site_and_a_paused_one_are_told_apart(door: Any, silotune: Any):
    an_hour_ago = time.time() - 3600
    door.sites += [
        operator_pb2.SiteView(name="gard", state="ENROLLED", last_seen_unix_seconds=an_hour_ago),
        operator_pb2.SiteView(
            name="ninds", state="ENROLLED", connected=True, paused=True, last_seen_unix_seconds=time.time()
        ),
        operator_pb2.SiteView(name="new", state="ENROLLED"),
    ]
    lines = silotune(cli.site, "list").stdout.splitlines()
    assert ["silent for 1:0" in lines[1], "connected, paused" in lines[2], "enrolled" in lines[3]] == [True] * 3


def test_a_site_that_is_not_there_cannot_be_revoked(door: Any, silotune: Any):
    assert silotune(cli.site, "revoke", "gard").exit_code == 4
    door.sites.append(operator_pb2.SiteView(name="gard"))
    assert silotune(cli.site, "revoke", "gard").stdout == "gard is revoked.\n"


def test_what_a_site_says_of_itself_does_not_steer_the_terminal(door: Any, silotune: Any):
    agent = agent_pb2.AgentInfo(device="\x1b[2Jcpu", version="1\r\n2", data_sets=[{"name": "\x9b31mno\u202etes"}])
    door.sites.append(operator_pb2.SiteView(name="gard", state="ENROLLED", agent=agent))
    add_job(door).rounds[0].updates[0].reason = "\x1b]0;owned\x07 NaN"
    add_job(door).job.sentence = "gard\x1b[31m is\nred"
    for arguments in (
        [cli.site, "list"],
        [job_cli.job, "show", "j1"],
        [job_cli.job, "why", "j1"],
        [job_cli.job, "list"],
    ):
        for output_format in ("text", "json"):
            text = silotune(*arguments, "--format", output_format).stdout
            assert all(line.isprintable() for line in text.split("\n")), arguments
    assert "[2Jcpu" in silotune(cli.site, "list").stdout


def test_a_coordinator_that_is_down_is_exit_code_7(door: Any, silotune: Any):
    door.stop()
    result = silotune(job_cli.job, "list", "--format", "json")
    assert result.exit_code == 7
    assert json.loads(result.stdout)["data"]["error"] == "Unavailable"


def test_a_missing_profile_is_exit_code_6(tmp_path: Path):
    assert CliRunner().invoke(job_cli.job, ["list", "--profile", str(tmp_path / "no")]).exit_code == 6


def test_an_export_into_a_file_is_refused(silotune: Any, tmp_path: Path):
    file = tmp_path / "model"
    file.write_text("")
    result = silotune(cli.model, "export", "j1", "--out", str(file))
    assert result.exit_code == 2
