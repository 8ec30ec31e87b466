"""`silotune demo`, and what `make demo` runs."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

FAILED, REFUSED, INTERRUPTED = 1, 5, 130


@click.command()
@click.option(
    "--out", default="demo", show_default=True, type=click.Path(file_okay=False, path_type=Path), help="Where to."
)
@click.option(
    "--recipe", "recipe_file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Another recipe than the demo's own.",
)  # fmt: skip
def demo(*, out: Path, recipe_file: Path | None) -> None:
    """A real medical federation on this machine: nine NIH institutes, six minutes, one report.

    Starts a coordinator and ten agents as processes with mutual TLS on loopback, enrolls them, fine-tunes a small
    encoder across them, compares with each institute alone and with pooled rows, and writes a report. Ctrl-C stops
    everything. Nothing outside the folder is touched.

    Exit codes: 0 done, 1 it failed, 5 the folder is in use or holds something else, 130 stopped.

    \b
    silotune demo
    silotune demo --out second-try --recipe my-recipe.toml
    """
    # Only here, so that help is quick.
    from deploy.demo.run import RECIPE, Run
    from deploy.demo.workspace import claimed
    from deploy.local import CommandFailed
    from protos.errors import AlreadyExists, Conflict, SilotuneError

    console = Console()
    for number in (signal.SIGTERM, signal.SIGINT):
        # SIGINT too: a shell that starts a command in the background has it ignored.
        signal.signal(number, _interrupt)
    try:
        with claimed(out):
            made = Run(out, console, recipe_file=recipe_file or RECIPE).whole()
            _show(console, made, out=out)
    except KeyboardInterrupt:
        # The live view was cut off before it could bring the cursor back.
        console.show_cursor()
        console.print("\nStopped; every process of the demo has ended.")
        sys.exit(INTERRUPTED)
    except (AlreadyExists, Conflict) as error:
        console.print(str(error), markup=False, soft_wrap=True)
        sys.exit(REFUSED)
    except (CommandFailed, TimeoutError, SilotuneError) as error:
        console.print("\n[red bold]The demo failed.[/]")
        console.print(str(error), markup=False, soft_wrap=True)
        if (out / "logs").exists():
            console.print(f"The logs of all processes are in {out / 'logs'}.")
        sys.exit(FAILED)


def _interrupt(*_: Any) -> None:
    # Once is enough: a second Ctrl-C must not cut off the stopping of the processes.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _show(console: Console, made: dict[str, Any], *, out: Path) -> None:
    table = Table(title="Accuracy on test passages about conditions that no institute has seen")
    table.add_column("who trained")
    table.add_column("rows", justify="right")
    table.add_column("accuracy", justify="right")
    rows = {name: sum(counts.values()) for name, counts in made["who_holds_what"].items()}
    for name, value in sorted(made["alone_accuracy"].items(), key=lambda entry: entry[1]):
        table.add_row(f"{name} alone", f"{rows[name]}", f"{value:.3f}")
    total = sum(rows[name] for name in made["alone_accuracy"])
    table.add_row("federated", f"{total}", f"{made['federated_accuracy']:.3f}", style="bold green")
    table.add_row("all rows in one place", f"{total}", f"{made['pooled_accuracy']:.3f}")
    console.print(table)
    best = made["alone_accuracy"][made["best_alone"]]
    console.print(
        f"Federated: {100 * (made['federated_accuracy'] - best):+.1f} points against the best institute alone, "
        f"{100 * (made['federated_accuracy'] - made['pooled_accuracy']):+.1f} against pooled rows. "
        f"The whole took {made['seconds']['total'] / 60:.1f} minutes."
    )
    console.print(f"\nReport: {out / 'report.html'}, {out / 'report.json'}, {out / 'plots'}\nModel:  {out / 'model'}\n")
    console.print(made["usage"], markup=False, soft_wrap=True)
