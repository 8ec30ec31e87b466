"""The chaos suite in a minute: the seeds of regressions.txt, some crashes at syncs. `make chaos` is the long one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos import crash
from tests.chaos.campaign import line, open_runner
from tests.chaos.checker import HANGING
from tests.chaos.report import Report
from tests.chaos.runner import Runner
from tests.chaos.scenario import COORDINATOR, Fault, When, generate

SITES = ("alfa", "bravo", "charlie")
REGRESSIONS = Path(__file__).with_name("regressions.txt")
# One in the start of the coordinator, one in a round.
SYNCS = (3, 12)


def seeds(engine: str) -> list[int]:
    lines = [line.split() for line in REGRESSIONS.read_text().splitlines() if line and not line.startswith("#")]
    return [int(words[0]) for words in lines if words[1] == engine]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with open_runner(tmp_path_factory.mktemp("chaos"), sites=SITES) as found:
        for means, why in found.arena.missing.items():
            warnings.warn(f"SKIPPED: faults that need a {means}: {why}", stacklevel=1)
        yield found


def hold(runner: Runner, seed: int, *, engine: str) -> None:
    outcome = runner.run(generate(seed, engine=engine), token=f"seed-{seed}")
    for why in outcome.skipped:
        warnings.warn(f"SKIPPED in seed {seed}: {why}", stacklevel=1)
    assert outcome.violations == [], f"{line(outcome)}\n{outcome.logs}"
    assert outcome.evidence.state == "COMPLETED"
    assert outcome.injected, "a seed without a fault proves nothing"


@pytest.mark.parametrize("seed", seeds("sqlite"))
def test_no_promise_is_broken_whatever_is_killed_stopped_cut_or_damaged(runner: Runner, seed: int) -> None:
    hold(runner, seed, engine="sqlite")


@pytest.mark.parametrize("seed", seeds("postgres"))
def test_no_promise_is_broken_with_replicas_on_postgres_and_s3(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    with open_runner(tmp_path_factory.mktemp("chaos"), engine="postgres") as runner:
        hold(runner, seed, engine="postgres")


@pytest.mark.parametrize("name", [COORDINATOR, SITES[0]])
def test_a_crash_at_a_sync_loses_nothing(runner: Runner, name: str) -> None:
    if why := crash.missing():
        pytest.skip(f"no crashes at syncs: {why}")
    report, said = Report("sqlite"), []
    crash.crash(runner, name, syncs=SYNCS, report=report, say=said.append)
    assert report.failing_seeds == [], "\n".join(said)
    assert report.injected, "no process was killed: strace does not do what it is told"


def test_a_seed_ends_when_a_process_ends_at_each_start(runner: Runner) -> None:
    """The last one here: it leaves a job that is not over."""
    settings = runner.arena.federation.home("alfa") / "site.toml"
    right = settings.read_text()
    fault = Fault("kill agent", "alfa", When(1, "training", "alfa"))
    scenario = replace(crash.scenario(9_000), train_seconds=5.0, faults=(fault,))
    settings.write_text("this is no TOML")
    try:
        outcome = runner.run(scenario, token="ends-at-each-start")
    finally:
        settings.write_text(right)
    assert {violation.rule for violation in outcome.violations} == {HANGING}
    assert any("alfa ended by itself" in violation.text for violation in outcome.violations)
