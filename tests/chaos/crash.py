"""A crash at every durability boundary: SIGKILL when a process comes to its N-th sync, for N = 1 to the end.

`python -m tests.chaos.crash` runs the same small job again and again, each time with the coordinator, and then with an
agent, under strace, which kills it as one of its threads enters fsync or fdatasync for the N-th time (strace counts for
each thread, so the busiest one decides). What was killed is started again without strace; the job must complete and
the judge must find nothing. A pass ends when the job does so without having come to its N-th sync.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.chaos import campaign
from tests.chaos.report import Report
from tests.chaos.runner import Runner
from tests.chaos.scenario import COORDINATOR, Scenario

SITES = ("alfa", "bravo")
# How many jobs in a row must end without a crash before a pass is over: which thread does what is not always the same.
CALM_JOBS = 3
MOST_SYNCS = 1000


def missing() -> str:
    """Why this machine cannot do it; empty when it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    words = ["strace", "-f", "-D", "-qq", "-e", "trace=fsync", "-o", "/dev/null", "true"]
    done = subprocess.run(words, capture_output=True, text=True)
    return f"strace does not work here: {done.stderr.strip()}" if done.returncode else ""


def scenario(number: int) -> Scenario:
    return Scenario(
        seed=number,
        engine="sqlite",
        sites=SITES,
        rounds=2,
        payload_mb=0.3,
        train_seconds=0.0,
        steps=2,
        quorum=len(SITES),
        deadline_seconds=600.0,
        retries=5,
        checkpoint_seconds=None,
        optimizer={"type": "fedavgm", "momentum": 0.5},
        evaluate=False,
        faults=(),
    )


def crash(runner: Runner, name: str, *, syncs: Iterable[int], report: Report, say: Callable[[str], None]) -> None:
    """One pass over `name`: a job for each N, until the job ends without a crash."""
    calm = 0
    for number in syncs:
        runner.arena.trace(name, sync=number)
        outcome = runner.run(scenario(number), token=f"{name}-{number}")
        killed = name not in runner.arena.traced
        runner.arena.trace(name, sync=0)
        report.add(outcome)
        when = f"killed at sync {number}" if killed else f"ended before sync {number}"
        say(f"{name} {when}: {outcome.evidence.state} {outcome.seconds:.1f} s")
        for violation in outcome.violations:
            say(f"    {violation}")
        if outcome.violations:
            say(outcome.logs)
            return
        calm = 0 if killed else calm + 1
        if calm == CALM_JOBS:
            return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.chaos.crash")
    parser.add_argument("--only", choices=(COORDINATOR, *SITES))
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    options = parser.parse_args()
    if why := missing():
        print(f"SKIPPED: {why}")
        return 0
    # Children are started while gRPC has threads.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    report = Report("sqlite, crashes at syncs")
    directory = Path(tempfile.mkdtemp(prefix="silotune-crash-"))
    try:
        with campaign.open_runner(directory, sites=SITES, as_root=False, has_house=False) as runner:
            for name in (options.only,) if options.only else (COORDINATOR, SITES[0]):
                crash(runner, name, syncs=range(1, MOST_SYNCS), report=report, say=print)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(f"\n{report}")
    if options.out:
        report.write(options.out)
    return 1 if report.failing_seeds else 0


if __name__ == "__main__":
    sys.exit(main())
