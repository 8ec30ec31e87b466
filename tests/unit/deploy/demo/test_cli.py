from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from deploy.demo.cli import REFUSED, demo


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The command takes the signals of its process over; the tests' process gets its own back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_folder_with_other_files_is_refused_in_a_sentence(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    done = CliRunner().invoke(demo, ["--out", str(tmp_path)])
    assert done.exit_code == REFUSED
    assert "holds files that no demo made" in done.output and "--out" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_recipe_that_is_not_there_is_wrong_usage(tmp_path: Path):
    assert CliRunner().invoke(demo, ["--out", str(tmp_path), "--recipe", str(tmp_path / "none.toml")]).exit_code == 2


def test_a_wrong_recipe_fails_with_its_line_before_anything_starts(tmp_path: Path):
    (tmp_path / "recipe.toml").write_text('name = "x"\nrunds = 3\n')
    done = CliRunner().invoke(demo, ["--out", str(tmp_path / "demo"), "--recipe", str(tmp_path / "recipe.toml")])
    assert done.exit_code == 1
    assert "recipe.toml" in done.output
    assert "set-up" not in done.output
