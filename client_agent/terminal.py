"""What every `silotune-agent` command has in common: --home, --format, and errors as sentences with an exit code."""

from __future__ import annotations

import functools
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from client_agent import settings
from client_agent.home import Home
from protos.errors import EXIT_CODES, SilotuneError

console = Console(highlight=False)
home_option = click.option(
    "--home",
    "home",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="The agent's home directory [default: ~/.local/share/silotune-agent].",
)
format_option = click.option(
    "--format", "output", type=click.Choice(["text", "json"]), default="text", help="Text for people, or JSON."
)


def command(function: Callable[..., Any]) -> Callable[..., None]:
    """Turns --home into a Home, our errors into sentences and exit codes, and with --format json both into JSON.

    The function returns the facts that JSON prints, or (facts, exit code).
    """

    @functools.wraps(function)
    def wrapped(*, home: Path | None, output: str = "text", **options: Any) -> None:
        as_json = output == "json"
        try:
            answer = function(home=Home(home or settings.default_home()), text=not as_json, **options)
        except SilotuneError as error:
            code = EXIT_CODES[error.code]
            if as_json:
                fault = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
                _print_json("error", code, fault)
            else:
                click.echo(f"error: {error.message}", err=True)
                if error.hint:
                    click.echo(f"hint: {error.hint}", err=True)
            sys.exit(code)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception:
            traceback.print_exc()
            sys.exit(EXIT_CODES["INTERNAL"])
        data, code = answer if isinstance(answer, tuple) else (answer, 0)
        if as_json:
            _print_json("ok" if code == 0 else "error", code, data)
        sys.exit(code)

    return wrapped


def _print_json(status: str, code: int, data: Any) -> None:
    click.echo(json.dumps({"schema_version": "1", "status": status, "exit_code": code, "data": data}, indent=2))
