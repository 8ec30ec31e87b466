from __future__ import annotations

import errno
import json

import click
import pytest
from click.testing import CliRunner

from coordinator.terminal import Output, with_output
from protos.errors import EXIT_CODES, LeaseFenced, NotFound, RecipeInvalid, all_errors


def run(action, *arguments: str):
    @click.command()
    @with_output
    def command(*, output: Output) -> int | None:
        return action(output)

    return CliRunner().invoke(command, arguments)


def fails(error: Exception):
    def action(output: Output) -> int:
        raise error

    return action


def test_every_error_has_an_exit_code():
    assert {EXIT_CODES[cls.code] for cls in all_errors()} == set(EXIT_CODES.values())
    assert EXIT_CODES[LeaseFenced.code] == 5


def test_an_error_is_two_lines_on_stderr():
    result = run(fails(NotFound("There is no job 'x'.", hint="List them.")))
    assert (result.exit_code, result.stdout) == (4, "")
    assert result.stderr == "error: There is no job 'x'.\nhint: List them.\n"


def test_an_error_as_json_is_on_stdout():
    result = run(fails(RecipeInvalid("recipe.toml:3: rounds is missing.")), "--format", "json")
    assert result.exit_code == 3
    assert json.loads(result.stdout) == {
        "schema_version": "1",
        "status": "error",
        "exit_code": 3,
        "data": {"error": "RecipeInvalid", "message": "recipe.toml:3: rounds is missing.", "hint": ""},
    }


def test_an_answer_as_json_is_one_line():
    def action(output: Output) -> None:
        output.answer({"name": "st-olav"}, text="not this")
        output.note("nor this")

    result = run(action, "--format", "json")
    assert result.output == ('{"schema_version": "1", "status": "ok", "exit_code": 0, "data": {"name": "st-olav"}}\n')


def test_what_a_command_returns_is_the_exit_code():
    assert run(lambda output: 1).exit_code == 1


def test_a_full_disk_is_a_full_disk():
    result = run(fails(OSError(errno.ENOSPC, "No space left on device", "model/x")))
    assert result.exit_code == 8
    assert result.stderr.startswith("error: model/x: No space left on device.")


def test_a_defect_shows_its_trace():
    result = run(fails(KeyError("x")))
    assert result.exit_code == 9
    assert "Traceback" in result.stderr


@pytest.mark.parametrize("wrong", [["--format", "yaml"], ["extra"]])
def test_wrong_usage_is_exit_code_2(wrong: list[str]):
    assert run(lambda output: 0, *wrong).exit_code == 2
