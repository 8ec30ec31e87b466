"""The chaos suite in a minute: the seeds of regressions.txt, some crashes at syncs. `make chaos` is the long one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos import crash
from tests.chaos.campaign import line, open_runner
from tests.chaos.report import Report
from tests.chaos.runner import Runner
from tests.chaos.scenario import COORDINATOR, generate

SITES = ("alfa", "bravo", "charlie")
REGRESSIONS = Path(__file__).with_name("regressions.txt")
# One in the start of the coordinator, one in a round.
SYNCS = (3, 12)


def seeds(engine: str) -> list[int]:
    lines = [line.split() for line in REGRESSIONS.read_text().splitlines() if line and not line.startswith("#")]
    return [int(words[0]) for words in lines if words[1] == engine]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with open_runner(tmp_path_factory.mktemp("chaos"), sites=SITES, as_root=False) as found:
        yield found


@pytest.mark.parametrize("seed", seeds("sqlite"))
def test_no_promise_is_broken_whatever_is_killed_stopped_cut_or_damaged(runner: Runner, seed: int) -> None:
    outcome = runner.run(generate(seed), token=f"seed-{seed}")
    assert outcome.violations == [], f"{line(outcome)}\n{outcome.logs}"
    assert outcome.evidence.state == "COMPLETED"
    assert outcome.injected, "a seed without a fault proves nothing"


@pytest.mark.parametrize("name", [COORDINATOR, SITES[0]])
def test_a_crash_at_a_sync_loses_nothing(runner: Runner, name: str) -> None:
    if why := crash.missing():
        pytest.skip(f"no crashes at syncs: {why}")
    report, said = Report("sqlite"), []
    crash.crash(runner, name, syncs=SYNCS, report=report, say=said.append)
    assert report.failing_seeds == [], "\n".join(said)
    assert report.injected, "no process was killed: strace does not do what it is told"
