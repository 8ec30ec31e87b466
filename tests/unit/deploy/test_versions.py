from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

from deploy.versions import versions

ROOT = Path(__file__).resolve().parents[3]


def test_figures_name_the_code_that_they_were_made_with() -> None:
    found = versions()
    assert (found["numpy"], found["torch"]) == (version("numpy"), version("torch"))
    assert ("commit" in found) == (ROOT / ".git").exists()
    assert re.fullmatch(r"[0-9a-f]{12}\+?", found.get("commit", "0" * 12))
