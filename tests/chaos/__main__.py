"""`python -m tests.chaos --seeds 200`: the chaos suite. Ends with status 1 when a promise was broken."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

# In the runner's process children are started while gRPC has threads.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# unshare itself heeds no signal but SIGKILL, which it passes on.
OWN_WORLD = (
    "setpriv", "--pdeathsig", "KILL", "--",
    "unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc",
)  # fmt: skip
INSIDE = "--inside"


def main() -> int:
    from tests.chaos import campaign
    from tests.chaos.scenario import ENGINES

    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.chaos")
    parser.add_argument("--seeds", type=int, default=20, help="how many")
    parser.add_argument("--seed0", type=int, default=1, help="the first")
    parser.add_argument("--only", type=int, nargs="*", help="these seeds instead")
    parser.add_argument("--engine", choices=ENGINES, default="sqlite")
    parser.add_argument("--undisturbed", action="store_true", help="the same jobs without faults")
    parser.add_argument("--storm", action="store_true", help="jobs of 20 rounds, and a kill or two in each round")
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    parser.add_argument("--keep", type=Path, default=Path("chaos"), help="where failing seeds leave what they were")
    parser.add_argument("--keep-all", action="store_true", help="what sound seeds left too")
    parser.add_argument(INSIDE, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside and _has_own_world():
        # Processes, mounts and ports of their own: nothing outlives this, however it ends, and nothing interferes.
        return subprocess.run([*OWN_WORLD, sys.executable, "-m", "tests.chaos", *sys.argv[1:], INSIDE]).returncode
    if options.inside:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    seeds = options.only or range(options.seed0, options.seed0 + options.seeds)
    report = campaign.run(
        seeds,
        engine=options.engine,
        keep=options.keep,
        keep_all=options.keep_all,
        undisturbed=options.undisturbed,
        storms=options.storm,
    )
    print(f"\n{report}")
    if options.out:
        report.write(options.out)
    return 1 if report.failing_seeds else 0


def _has_own_world() -> bool:
    if os.geteuid() != 0 or not all(map(shutil.which, ("setpriv", "unshare", "ip"))):
        return False
    return subprocess.run([*OWN_WORLD, "true"], capture_output=True).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
