from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner

from deploy import cli


def test_help_imports_neither_grpc_nor_torch_nor_a_group():
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from deploy.cli import main\n"
        "assert 'job' in CliRunner().invoke(main, ['--help']).output\n"
        "assert not {'grpc', 'torch', 'rich', 'pydantic', 'coordinator.cli'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("group", ["site", "job", "model"])
def test_the_operators_groups_are_reached_through_the_one_command(group: str):
    result = CliRunner().invoke(cli.main, [group, "--help"])
    assert result.exit_code == 0
    assert f"silotune {group}" in result.output


def test_every_command_names_a_module_that_exists():
    assert set(cli.main.list_commands(None)) == set(cli._COMMANDS)


def test_every_command_that_is_listed_can_be_called():
    listed = cli.main.list_commands(None)
    assert {"site", "job", "model"} <= set(listed)
    for name in listed:
        assert CliRunner().invoke(cli.main, [name, "--help"]).exit_code == 0


def test_an_unknown_command_is_wrong_usage():
    assert CliRunner().invoke(cli.main, ["fly"]).exit_code == 2


def test_the_exit_codes_stand_in_the_help():
    text = CliRunner().invoke(cli.main, ["--help"]).output
    assert "7 the coordinator cannot be reached" in text
