"""The gate does not pass where a part of it could not run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(("environment", "passes"), [({}, True), ({"CI": "true"}, False)])
def test_without_npm_the_contract_check_warns_a_person_and_fails_in_ci(
    environment: dict[str, str], passes: bool, tmp_path: Path
) -> None:
    make = shutil.which("make")
    assert make
    # Nothing but shell builtins is reached, so an empty PATH is a machine without npm; -o: the environment is not made.
    command = [make, "-o", ".venv/.ready", "buf", "BUF=no-buf"]
    environment = {"PATH": str(tmp_path), **environment}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "NOT CHECKED" in done.stdout
    assert (done.returncode == 0) is passes
