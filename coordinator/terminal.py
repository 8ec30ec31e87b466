"""How the operator's commands answer: facts on stdout, errors on stderr, and an exit code that a script can use.

    0  done                              5  the state does not allow it, or the name is taken
    1  the work failed                   6  no valid certificate, or not permitted
    2  the command was written wrongly   7  the coordinator cannot be reached
    3  a recipe, name or file is wrong   8  no space, or damaged data
    4  it does not exist                 9  a defect of silotune        130  stopped by Ctrl-C

With `--format json` an answer is one object on one line: {"schema_version", "status": "ok" or "error", "exit_code",
"data"}; of an error, `data` holds its class, message and hint.
"""

from __future__ import annotations

import errno
import functools
import json
import re
import sys
import traceback
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import click
from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.table import Table

from protos.errors import EXIT_CODES, Internal, InvalidInput, OutOfSpace, SilotuneError

# Columns of a table that goes into a file or a pipe, where nobody's window cuts it off.
PIPE_WIDTH = 160


class Output:
    """Where one command's answer goes. `as_json`: facts for a program instead of text for a person."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        width = None if sys.stdout.isatty() else PIPE_WIDTH
        self.console = Console(highlight=False, markup=False, emoji=False, width=width)

    @property
    def is_live(self) -> bool:
        """Whether a person looks on, so that a picture may be drawn over the one before."""
        return self.console.is_terminal and not self.as_json

    def answer(self, data: dict[str, Any], *, text: RenderableType = "", exit_code: int = 0) -> None:
        """May be called more than once by a command that goes on; each JSON answer is a line of its own."""
        if self.as_json:
            self._envelope(data, status="error" if exit_code else "ok", exit_code=exit_code)
        elif isinstance(text, str):
            # Not through rich: it would break a token or a path where the window ends.
            click.echo(text)
        else:
            self.console.print(text)

    def note(self, text: str) -> None:
        """For the person beside the facts: what to do next, what is going on. On stderr, and not with JSON."""
        if not self.as_json:
            click.echo(text, err=True)

    def fail(self, error: SilotuneError) -> int:
        code = EXIT_CODES[error.code]
        if self.as_json:
            data = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
            self._envelope(data, status="error", exit_code=code)
        else:
            click.echo(f"error: {error.message}", err=True)
            if error.hint:
                click.echo(f"hint: {error.hint}", err=True)
        return code

    def _envelope(self, data: dict[str, Any], *, status: str, exit_code: int) -> None:
        envelope = {"schema_version": "1", "status": status, "exit_code": exit_code, "data": data}
        click.echo(json.dumps(envelope, ensure_ascii=False))


def with_output(function: Callable[..., int | None]) -> Callable[..., None]:
    """Gives a command `--format` and its `output`; its errors and what it returns become the exit code."""

    @click.option(
        "--format",
        "output_format",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="Text for a person, or JSON for a program.",
    )
    @functools.wraps(function)
    def command(*, output_format: str, **arguments: object) -> None:
        output = Output(as_json=output_format == "json")
        try:
            code = function(output=output, **arguments) or 0
        except SilotuneError as error:
            code = output.fail(error)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            code = output.fail(_from_os(error))
        except click.ClickException:
            raise
        except Exception as error:
            traceback.print_exc()
            code = output.fail(Internal(f"A defect of silotune: {type(error).__name__}: {error}."))
        sys.exit(code)

    return command


def _from_os(error: OSError) -> SilotuneError:
    text = f"{error.filename or 'The file system'}: {error.strerror or error}."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutOfSpace(text, hint="Make room and run the command again; it goes on where it stopped.")
    return InvalidInput(text)


def table(*columns: str, right: tuple[str, ...] = (), title: str | None = None) -> Table:
    """An empty table in the house's style; the columns named in `right` are numbers."""
    empty = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title=title, title_justify="left", title_style="bold")
    for column in columns:
        empty.add_column(column, justify="right" if column in right else "left", header_style="dim", overflow="fold")
    return empty


def duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def size(number_of_bytes: int) -> str:
    return decimal(number_of_bytes)


def moment(unix_seconds: float) -> str:
    """Local time; empty for never."""
    return datetime.fromtimestamp(unix_seconds).strftime("%Y-%m-%d %H:%M:%S") if unix_seconds else ""


class Duration(click.ParamType):
    """Text such as 30m as seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"(\d+)\s*([smhd])", str(value))
        if not match or not int(match[1]):
            self.fail(f"{value!r} is not a duration; write a number and s, m, h or d, for example 90m.", param, ctx)
        return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[match[2]]
