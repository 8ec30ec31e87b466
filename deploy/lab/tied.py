"""Starts a command that cannot outlive the lab: `python -m deploy.lab.tied PARENT_PID COMMAND...`.

A lab that was killed is begun again in the same folder, and nothing of the earlier one may still hold it.
"""

from __future__ import annotations

import os
import sys

from client_agent.tether import tie


def argv(command: list[str]) -> list[str]:
    """What to start instead of `command`."""
    return [sys.executable, "-m", "deploy.lab.tied", str(os.getpid()), *command]


if __name__ == "__main__":
    tie(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
