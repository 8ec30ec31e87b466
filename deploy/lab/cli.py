"""`silotune lab`: studies of federated training, and what comes out of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from coordinator.terminal import Output, with_output
from protos.errors import Internal, InvalidInput
from protos.metrics import BENCHMARKS

FAILED, INTERRUPTED = 1, 130
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
benchmark_option = click.option("--benchmark", type=click.Choice(BENCHMARKS), required=True, help="Whose questions.")


@click.group()
def lab() -> None:
    """Study federated training: run experiments, draw what came of them, score answers, compare models."""


def _list(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[str, ...]:
    """The parts of "a,b,c", and 1, 2, 3 for "1-3"."""
    found: list[str] = []
    for word in text.split(",") if text else ():
        first, dash, last = word.partition("-")
        if dash and first.isdigit() and last.isdigit():
            if int(first) > int(last):
                raise click.BadParameter(f"{word.strip()!r} begins after its end.")
            found += map(str, range(int(first), int(last) + 1))
        else:
            found.append(word.strip())
    # A cell is run once, however often it is asked for.
    return tuple(dict.fromkeys(found))


def _part(context: click.Context, parameter: click.Parameter, text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise click.BadParameter(f"{text!r} is not I/N with I from 1 to N, such as 3/8.")
    return int(number), int(of)


def _axis(*names: str, **described: Any) -> Any:
    return click.option(*names, callback=_list, metavar="A,B,...", **described)


@lab.command("run")
@click.argument("recipe_directory", metavar="RECIPE_DIR", type=_FOLDER)
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Where everything goes.")
@click.option("--recipe", "recipe_name", help="Another recipe of the folder than its lab.toml names.")
@click.option("--lab", "lab_file", default="lab.toml", show_default=True, help="Another file of the folder.")
@_axis("--sites", help="How many sites: 1,4,16.")
@_axis("--seeds", "--seed", "seeds", help="Of the partition, of version 0 and of every shuffling: 1-5.")
@_axis("--partitions", "--partition", "partitions", help="uniform, quantity[:ALPHA], dirichlet:COLUMN[:ALPHA], "
       "shards:COLUMN[:N] or groups:COLUMN.")  # fmt: skip
@_axis("--models", help="Names of [models.NAME] in lab.toml.")
@_axis("--data", help="Names of [tables.NAME].")
@_axis("--variants", help="Names of [variants.NAME].")
@click.option("--rounds", type=click.IntRange(1, 1_000_000), help="How many rounds; default: as the recipe says.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change a key of the recipe; repeatable.")
@click.option("--model", type=_FOLDER, help="Take this base model instead of the one in lab.toml.")
@click.option("--threads", default=0, type=click.IntRange(0), help="Of a trainer; 0: as many as there are cores.")
@click.option("--jobs", default=1, type=click.IntRange(1), help="Cells of a grid that run at once.")
@click.option("--part", default="1/1", callback=_part, metavar="I/N", help="Every N-th cell from the I-th on.")
@with_output
def run_experiment(
    *, output: Output, recipe_directory: Path, out: Path, jobs: int, part: tuple[int, int], **options: Any
) -> int:
    """Run the federation that RECIPE_DIR describes, on this machine: one coordinator, many sites, one trainer.

    Where lab.toml has a [grid], or an option several values, each combination is run. Typed again with the same options
    after it was killed, it goes on. Figures are in OUT/metrics.json from the first round on, those of a grid below
    OUT/cells. What a classifier said of each held-out row, version by version, is in agents/house/predictions beside
    them.

    \b
    silotune lab run deploy/recipes/flowertune-medical --out runs/twin
    silotune lab run deploy/recipes/flowertune-medical --set local.data_order=same --out runs/same
    silotune lab run deploy/recipes/flowertune-medical --sites 4,16,32 --seeds 1-3 --jobs 2 --out runs/sites
    """
    from deploy.lab.plan import AXES, Typed, cells
    from deploy.local import CommandFailed

    axes = {name: options.pop(name) for name in AXES}
    wanted = cells(recipe_directory, Typed(axes=axes, **options))
    try:
        if wanted[0].name:
            return _run_grid(wanted, out=out.resolve(), jobs=jobs, part=part, output=output)
        return _run_one(wanted[0], out=out.resolve(), output=output)
    except KeyboardInterrupt:
        output.note("\nStopped; the same command goes on with it.")
        return INTERRUPTED
    except CommandFailed as error:
        raise Internal(str(error), hint=f"The logs are in {out / 'logs'}.") from error


def _run_one(cell: Any, *, out: Path, output: Output) -> int:
    from deploy.lab.run import run

    made = run(cell.plan, out=out, say=output.note)
    if made["job"]["state"] != "COMPLETED":
        hint = f"Mend the cause and type the same command again; the logs are in {out / 'logs'}."
        text = f"{made['job']['sentence']}\n{hint}"
        output.answer(made, text=text, exit_code=FAILED)
        return FAILED
    output.answer(made, text=f"Done: {out / 'metrics.json'}. Next: silotune lab report {out}")
    return 0


def _run_grid(wanted: Any, *, out: Path, jobs: int, part: tuple[int, int], output: Output) -> int:
    from deploy.lab.grid import each_in_turn, run_grid

    failed = run_grid(wanted, out=out, jobs=jobs, part=part, say=each_in_turn(output.note))
    data = {"cells": len(wanted), "failed": [{"name": one.name, "sentence": one.sentence} for one in failed]}
    if failed:
        lines = [f"{one.name}: {one.sentence}" for one in failed]
        hint = f"Mend the cause and type the same command again; the logs are in {out / 'cells'}."
        output.answer(data, text="\n".join([*lines, hint]), exit_code=FAILED)
        return FAILED
    output.answer(data, text=f"Done: {out / 'cells'}. Next: silotune lab report {out}")
    return 0


@lab.command()
@click.argument("runs", metavar="DIR...", type=_FOLDER, nargs=-1, required=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Default: the first DIR.")
@click.option("--title", default="", help="What the page is about.")
@click.option("--metric", help="Of a grid: what its page is about; default: accuracy, where it was measured.")
@click.option("--rounds", type=click.IntRange(1), help="Of a grid: compare cells after this round, too.")
@with_output
def report(
    *, output: Output, runs: tuple[Path, ...], out: Path | None, title: str, metric: str | None, rounds: int | None
) -> None:
    """Draw what came of one run, of several together, or of a grid: report.html and PNG files.

    Of a grid, which may still run: accuracy against sites, rounds to 90 % of what one site with all rows reaches,
    learning curves, means over seeds with their intervals, variants against each other, bytes and seconds; besides the
    page as cells.csv and report.json. Folders of one grid that several machines filled are one report.

    \b
    silotune lab report runs/twin
    silotune lab report runs/new runs/same --out runs/compared
    silotune lab report runs/hilmkil --rounds 100
    """
    # Only here: plots load slowly.
    from deploy.lab.grid import read_grid
    from deploy.lab.grid_report import write_grid_report
    from deploy.lab.report import write_report

    folders, place = [run.resolve() for run in runs], (out or runs[0]).resolve()
    if any(read_grid(folder) is not None for folder in folders):
        page = write_grid_report(folders, out=place, title=title, metric=metric, budget=rounds)
    elif metric or rounds:
        raise InvalidInput("--metric and --rounds are for grids, and there is none.")
    else:
        page = write_report(folders, out=place, title=title)
    output.answer({"report": str(page)}, text=str(page))


@lab.command()
@benchmark_option
@click.argument("answers", metavar="FILE", type=_FILE)
@with_output
def score(*, output: Output, benchmark: str, answers: Path) -> None:
    """How many answers in FILE are right, by the rule of the FlowerTune study.

    Each line of FILE, which may be gzipped, is a JSON object with "gold", the right answer, and "output", what the
    model wrote. An agent keeps such files of what it evaluates.

    \b
    silotune lab score --benchmark medqa answers.jsonl
    silotune lab score --benchmark medqa answers.jsonl.gz --format json
    """
    # The file's reading needs more than help does.
    from deploy.lab.score import score as score_file

    found = score_file(answers, benchmark=benchmark)
    low, high = found.interval
    unparseable = found.questions - found.parseable
    lines = [
        f"accuracy               {100 * found.accuracy:6.2f} %  ({found.correct} of {found.questions})",
        f"95 % interval          {100 * low:6.2f} to {100 * high:.2f} %  (Wilson)",
        f"unparseable            {100 * found.unparseable:6.2f} %  ({unparseable} answers are none of the options)",
        f"accuracy on parseable  {100 * found.parseable_accuracy:6.2f} %  ({found.correct} of {found.parseable})",
        f"exact format           {100 * found.exact_format:6.2f} %  ({found.exact} answers are nothing but an option)",
    ]
    data = {
        "benchmark": benchmark,
        **_figures(found),
        "confidence_interval": [low, high],
        "correct": found.correct,
        "parseable": found.parseable,
        "questions": found.questions,
    }
    output.answer(data, text="\n".join(lines))


@lab.command()
@benchmark_option
@click.argument("first", metavar="FIRST", type=_FILE)
@click.argument("second", metavar="SECOND", type=_FILE)
@with_output
def compare(*, output: Output, benchmark: str, first: Path, second: Path) -> None:
    """What changed from the answers in FIRST to those in SECOND, to the same questions.

    Tells whether it can be chance (McNemar's exact test), and how much of it is format, where the answer could be read
    only once, and how much is knowledge.

    \b
    silotune lab compare --benchmark medqa round-10.jsonl round-100.jsonl
    """
    from deploy.lab.score import compare as compare_files

    before, after, change = compare_files(first, second, benchmark=benchmark)
    both = change.both_parseable
    both_before, both_after = (correct / both if both else 0.0 for correct in change.both_correct)
    lines = [
        f"accuracy    {100 * before.accuracy:.2f} % to {100 * after.accuracy:.2f} %: {_points(change.total)}",
        f"  format    {_points(change.format)}: unparseable {100 * before.unparseable:.2f} % to "
        f"{100 * after.unparseable:.2f} %",
        f"  knowledge {_points(change.knowledge)}: of the {both} questions whose answers can be read both times, "
        f"{100 * both_before:.2f} % to {100 * both_after:.2f} % are right",
        f"gained {change.gained} and lost {change.lost} of {change.questions} questions: "
        f"p = {change.p_value:.2g} (McNemar, exact)",
    ]
    data = {
        "benchmark": benchmark,
        "questions": change.questions,
        "first": _figures(before),
        "second": _figures(after),
        "change": change.total,
        "change_by_format": change.format,
        "change_by_knowledge": change.knowledge,
        "both_parseable": both,
        "both_parseable_accuracy": [both_before, both_after],
        "gained": change.gained,
        "lost": change.lost,
        "mcnemar_p": change.p_value,
    }
    output.answer(data, text="\n".join(lines))


def _points(share: float) -> str:
    return f"{100 * share:+.2f} points"


def _figures(found: Any) -> dict[str, float]:
    names = ("accuracy", "unparseable", "parseable_accuracy", "exact_format")
    return {name: getattr(found, name) for name in names}
