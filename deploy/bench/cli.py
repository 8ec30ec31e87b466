"""`silotune bench`: how fast and how large a round is on this machine, next to its floors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table


@click.group()
def bench() -> None:
    """Measure rounds on this machine: real processes, no training."""


@bench.command()
@click.option("--payload-mb", default=100.0, show_default=True, help="Size of the model that every site sends.")
@click.option("--sites", default=8, show_default=True, type=click.IntRange(1, 200))
@click.option("--rounds", default=4, show_default=True, type=click.IntRange(1, 1000))
@click.option("--insecure-loopback", is_flag=True, help="Without TLS, for comparison with systems that have none.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures here.")
def round(*, payload_mb: float, sites: int, rounds: int, insecure_loopback: bool, json_file: Path | None) -> None:
    """A round without training: every site gets the model, adds noise and sends it back.

    Prints seconds and CPU seconds by stage for coordinator and agents, peak memory, bytes on the wire, the error of
    the mean, and in the same run what bare and durable gRPC streams of the same bytes take.

    \b
    silotune bench round --payload-mb 100 --sites 8 --rounds 4 --json bench/round.json
    """
    # Only here: numpy and the coordinator load slowly.
    from deploy.bench.round import measure

    console = Console(stderr=True)
    figures = measure(
        payload_mb=payload_mb, sites=sites, rounds=rounds, insecure_loopback=insecure_loopback, say=console.log
    )
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(figures, indent=1))
    _show(Console(), figures)


@bench.command()
@click.option("--rounds", default=10_000, show_default=True, type=click.IntRange(1, 100_000))
@click.option("--sites", default=200, show_default=True, type=click.IntRange(1, 900))
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures here.")
def history(*, rounds: int, sites: int, json_file: Path | None) -> None:
    """A coordinator with a long history: seconds from its start until it is ready, and of each question.

    Writes the rows of so many rounds into a fresh database and starts the real coordinator on them. The default takes
    some minutes and 5 GB of disk below TMPDIR.
    """
    from deploy.bench.history import measure

    figures = measure(rounds=rounds, sites=sites, say=Console(stderr=True).log)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(figures, indent=1))
    console, what, start = Console(), figures["what"], figures["seconds_to_ready"]
    size, peak = what["database_bytes"] / 1e9, figures["coordinator_peak_rss_bytes"] / 1e6
    console.print(f"{what['rounds']} rounds x {what['sites']} sites: {size:.2f} GB of rows, coordinator {peak:.0f} MB")
    console.print(f"Ready after {start['with_history']:.2f} s; without a history after {start['empty']:.2f} s")
    for group in ("seconds_of_commands", "seconds_inside"):
        for name, seconds in figures[group].items():
            console.print(f"  {name:10} {seconds:8.3f} s")


@bench.command()
@click.option("--sites", default=32, show_default=True, type=click.IntRange(1, 900))
@click.option("--rounds", default=2, show_default=True, type=click.IntRange(1, 1000))
@click.option("--steps", default=25, show_default=True, type=click.IntRange(1), help="Of a site in a round.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(0), help="Of the trainer.")
@click.option("--repeats", default=2, show_default=True, type=click.IntRange(1), help="Of both, in turn.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures here.")
def lab(*, sites: int, rounds: int, steps: int, threads: int, repeats: int, json_file: Path | None) -> None:
    """Many sites on one machine, beside a plain loop that trains the same steps: the seconds and the memory of both.

    \b
    silotune bench lab --sites 32 --rounds 2 --json bench/lab.json
    """
    from deploy.bench.lab import measure

    say = Console(stderr=True).log
    figures = measure(sites=sites, rounds=rounds, steps=steps, threads=threads, repeats=repeats, say=say)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(figures, indent=1))
    console = Console()
    console.print(
        f"Plain loop {sum(figures['plain_seconds']):.1f} s ({figures['plain_seconds_a_task']:.2f} s a task), "
        f"lab {sum(figures['lab_seconds']):.1f} s: {100 * figures['overhead']:+.1f} %, "
        f"{1000 * figures['extra_seconds_a_task']:.0f} ms a task"
    )
    console.print(
        f"Largest process {figures['largest_process_rss_bytes'] / 1e6:.0f} MB, "
        f"all of the lab {figures['all_rss_bytes'] / 1e6:.0f} MB; plain loop {figures['plain_rss_bytes'] / 1e6:.0f} MB"
    )


def _show(console: Console, figures: dict[str, Any]) -> None:
    what, steady = figures["what"], figures["steady"]
    table = Table(title=f"{what['payload_bytes'] / 1e6:.0f} MB x {what['sites']} sites, TLS {what['tls']}")
    for column in ("round", "seconds", "collecting", "aggregating", "coordinator CPU s", "agents CPU s"):
        table.add_column(column, justify="right")
    for entry in figures["rounds"]:
        stages = entry["stages"]
        table.add_row(
            str(entry["number"]),
            *(
                f"{value:.2f}"
                for value in (
                    entry["seconds"],
                    stages.get("collecting", 0.0),
                    stages.get("aggregating", 0.0),
                    entry["coordinator_cpu_seconds"],
                    entry["agents_cpu_seconds"],
                )
            ),
        )
    console.print(table)
    sites = {stage: f"{seconds:.2f}" for stage, seconds in sorted(figures["rounds"][-1]["site_stages"].items())}
    console.print(f"At a site, last round, seconds: {sites}")
    memory = {name: f"{size / 1e6:.0f} MB" for name, size in figures["memory_bytes"].items()}
    console.print(f"Memory: {memory}")
    bytes_ = figures["bytes"]
    console.print(f"Loopback bytes / ideal (2 x sites x payload): {bytes_['loopback_over_ideal']:.2f}")
    console.print(f"Relative error of the mean: {figures['error_of_the_mean']:.1e}")
    for kind, floor in figures["floors"].items():
        console.print(
            f"{kind} floor: {floor['seconds']:.2f} s, "
            f"CPU {floor['server_cpu_seconds']:.2f} s (server) and {floor['client_cpu_seconds']:.2f} s (clients)"
        )
    console.print(
        f"A steady round takes {steady['seconds']:.2f} s: {figures['ratio_to_durable_floor']:.2f} x the durable floor, "
        f"{figures['ratio_to_bare_floor']:.2f} x the bare one."
    )
