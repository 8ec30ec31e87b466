"""One minor version apart works together; further apart is refused in a sentence."""

from __future__ import annotations

import pytest

from protos.errors import Conflict
from protos.versions import check_versions


@pytest.mark.parametrize("agent", ["0.1.0", "0.2.9", "0.0.1", "0.1.0.dev3", "0+unpackaged", ""])
def test_neighbours_work_together(agent: str) -> None:
    check_versions(agent=agent, coordinator="0.1.4")


@pytest.mark.parametrize("agent", ["0.3.0", "1.1.0"])
def test_versions_further_apart_are_refused(agent: str) -> None:
    with pytest.raises(Conflict, match=f"This agent is version {agent} and the coordinator 0.1.4"):
        check_versions(agent=agent, coordinator="0.1.4")
