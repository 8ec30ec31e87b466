"""Which versions of agent and coordinator work together: the same or one minor version apart."""

from __future__ import annotations

import re

from protos.errors import Conflict

_VERSION = re.compile(r"(\d+)\.(\d+)")


def check_versions(*, agent: str, coordinator: str) -> None:
    """Conflict when the two are further apart. A version without numbers (a build of one's own) is let through."""
    theirs, ours = _VERSION.match(agent), _VERSION.match(coordinator)
    if not theirs or not ours:
        return
    if theirs[1] != ours[1] or abs(int(theirs[2]) - int(ours[2])) > 1:
        raise Conflict(
            f"This agent is version {agent} and the coordinator {coordinator}: they are too far apart.",
            hint="Upgrade the older of the two; one minor version apart is fine.",
        )
