"""Starts a trainer that cannot outlive its daemon: `python -m client_agent.tether MODULE DAEMON_PID`.

A trainer whose daemon was killed would go on writing into the task directory that the restarted daemon has given to a
new trainer. The kernel ends it instead; end of input, which a trainer also obeys, comes too late in a long step.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1


def tie(parent_pid: int) -> None:
    """From now on this process ends with its parent, also when it becomes another program by exec."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        raise SystemExit("the process that wanted this one ended before it began")


def main(module: str, daemon_pid: int) -> None:
    tie(daemon_pid)
    sys.argv = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
