"""Many seeds, one federation at a time: each is kept warm over some of them, and then made afresh."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from tests.chaos.arena import Arena
from tests.chaos.operating import Operator
from tests.chaos.report import Report
from tests.chaos.runner import Outcome, Runner
from tests.chaos.scenario import SITES, Scenario, generate, storm
from tests.chaos.storing import open_engine

SEEDS_A_FEDERATION = 25


@contextlib.contextmanager
def open_runner(
    directory: Path,
    *,
    engine: str = "sqlite",
    sites: Sequence[str] = SITES,
    as_root: bool = True,
    has_house: bool = True,
) -> Iterator[Runner]:
    """A fresh federation with everything that scenarios of this engine need."""
    with (
        open_engine(engine, directory) as storage,
        Arena(directory, storage, sites=tuple(sites), has_house=has_house, as_root=as_root) as arena,
        Operator(arena) as operator,
    ):
        yield Runner(arena, operator)


def run(
    seeds: Iterable[int],
    *,
    engine: str,
    keep: Path,
    keep_all: bool = False,
    undisturbed: bool = False,
    storms: bool = False,
    say: Callable[[str], None] = print,
) -> Report:
    """Runs the seeds in order. What failing ones left behind is kept in `keep`, or what all did."""
    report = Report(engine)
    draw = storm if storms else generate
    left = list(seeds)
    while left:
        directory = Path(tempfile.mkdtemp(prefix="silotune-chaos-"))
        try:
            with open_runner(directory, engine=engine) as runner:
                for _ in range(min(SEEDS_A_FEDERATION, len(left))):
                    seed = left.pop(0)
                    outcome = runner.run(draw(seed, engine=engine, undisturbed=undisturbed), token=f"seed-{seed}")
                    report.add(outcome)
                    say(line(outcome))
                    if outcome.violations or keep_all:
                        _keep(outcome, directory, keep / f"{engine}-{seed}")
                    if outcome.violations:
                        break  # A federation that broke a promise is evidence, and no place for the next seed.
                    if runner.arena.is_worn():
                        break
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    return report


def line(outcome: Outcome) -> str:
    """One seed in a line; what is wrong below it."""
    done = "; ".join(f"{done.fault}" for done in outcome.evidence.injected) or "no fault"
    verdict = "BROKEN" if outcome.violations else outcome.evidence.state
    versions = outcome.evidence.versions
    last = f"version {versions[-1].number} is {versions[-1].digest[:12]}" if versions else "no version"
    text = f"seed {outcome.scenario.seed:<5} {verdict} {outcome.seconds:5.1f} s  {outcome.scenario}, {last}: {done}"
    return "\n".join([text, *(f"    {violation}" for violation in outcome.violations)])


def _keep(outcome: Outcome, directory: Path, target: Path) -> None:
    """Histories, logs and the database of a failing seed, for whoever looks into it."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in ("histories", "logs"):
        shutil.copytree(directory / name, target / name)
    for file in (directory / "coordinator").glob("coordinator.db*"):
        shutil.copy2(file, target)
    scenario: Scenario = outcome.scenario
    events = "\n".join(f"  {sentence}" for sentence in outcome.evidence.events)
    (target / "what.txt").write_text(f"{line(outcome)}\n\n{scenario!r}\n\ndecisions\n{events}\n\n{outcome.logs}\n")
