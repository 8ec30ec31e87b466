"""What each recipe folder says of itself: a claim, the command, what to expect, and dated results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "deploy" / "recipes"


@pytest.mark.parametrize("folder", sorted(path for path in RECIPES.iterdir() if path.is_dir() and path.name[0] != "_"))
def test_a_recipe_says_what_it_claims_how_it_is_run_what_to_expect_and_what_came(folder: Path) -> None:
    page = (folder / "README.md").read_text()
    parts = dict(re.findall(r"^## (\w+).*\n((?:(?!^## ).*\n?)*)", page, re.MULTILINE))
    assert {"Claims", "Commands", "Results"} <= parts.keys()
    assert f"silotune lab run deploy/recipes/{folder.name}" in parts["Commands"]
    assert re.search(r"expect|band", page, re.IGNORECASE)
    assert not re.search(r"^[A-Z]+$", page, re.MULTILINE), "A place that was to be filled."
    assert re.search(r"^### 20\d\d-\d\d-\d\d", parts["Results"], re.MULTILINE)
