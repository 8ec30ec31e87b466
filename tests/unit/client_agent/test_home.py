from __future__ import annotations

import stat
from pathlib import Path

import pytest

from client_agent.home import Home
from protos.errors import Conflict


def test_a_second_agent_in_the_same_home_is_refused_in_words(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with home.locked():
        assert home.is_locked()
        with pytest.raises(Conflict, match="Another agent already runs") as error, home.locked():
            pass
        assert "--home" in error.value.hint
    assert not home.is_locked()


def test_the_home_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    home = Home(tmp_path / "agent")
    home.create()
    for path in (home.path, home.identity, home.tasks):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_home_that_does_not_exist_is_not_locked(tmp_path: Path) -> None:
    assert not Home(tmp_path / "nowhere").is_locked()
