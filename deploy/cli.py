"""`silotune`: the operator's command. A group is imported when it is called, so that help is quick."""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec

import click

# Command -> (module, attribute, one line of help).
_COMMANDS = {
    "site": ("coordinator.cli", "site", "Invite sites, see who is there, revoke them."),
    "job": ("coordinator.job_cli", "job", "Submit jobs, watch them, steer them."),
    "model": ("coordinator.cli", "model", "Take a finished model home."),
    "bench": ("deploy.bench.cli", "bench", "Measure rounds on this machine."),
    "lab": ("deploy.lab.cli", "lab", "Run experiments, score answers, compare models."),
    "demo": ("deploy.demo.cli", "demo", "A real medical federation on this machine."),
}


def _is_installed(module: str) -> bool:
    return find_spec(module.rpartition(".")[0]) is not None and find_spec(module) is not None


class LazyGroup(click.Group):
    """Knows its commands by name; a command that is not installed here is not listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, (module, _, _) in _COMMANDS.items() if _is_installed(module)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        # gRPC's own log lines would stand between an error and its hint.
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
        module, attribute, _ = _COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _COMMANDS[name][2]) for name in self.list_commands(ctx)])


@click.command(cls=LazyGroup)
@click.version_option(package_name="silotune")
def main() -> None:
    """Run federated fine-tuning: the operator's side of a silotune coordinator.

    \b
    silotune site invite st-olav
    silotune job submit recipe.toml
    silotune job watch JOB
    silotune model export JOB --out model

    Every command explains itself with --help, prints facts as JSON with --format json, and ends with an exit code:

    \b
    0 done                               5 not in this state, or the name is taken
    1 the work failed                    6 no valid certificate, or not permitted
    2 the command was written wrongly    7 the coordinator cannot be reached
    3 a recipe, name or file is wrong    8 no space, or damaged data
    4 it does not exist                  9 a defect of silotune
                                     130 stopped by Ctrl-C
    """
