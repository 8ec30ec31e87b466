"""A site that attacks a real federation: the mean would follow it, a robust rule leaves it out and says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from protos.update_figures import COEFFICIENT, COSINE, NORM, by_site

RECIPE = """\
name = "attacked"
rounds = 2
seed = 3
[task]
type = "synthetic"
payload_mb = 0.1
train_seconds = 0.01
[local]
steps = 1
[cohort]
quorum = 5
gather_seconds = 300
[aggregation]
robust = { type = "multi-krum" }
[evaluation]
where = ["house"]
metric = "loss"
"""
LAB = """\
sites = 5
attack = { sites = 1, kind = "scale", factor = 1000 }
"""


def test_one_site_of_five_does_not_carry_the_version_away(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "lab.toml").write_text(LAB)
    silotune, out = Path(sys.executable).parent / "silotune", tmp_path / "out"
    done = subprocess.run(
        [str(silotune), "lab", "run", str(tmp_path), "--out", str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads((out / "metrics.json").read_text())

    [one, two] = [entry["metrics"] for entry in found["rounds"]]
    norms = by_site(one, NORM)
    attacker = max(norms, key=lambda site: norms[site])
    others = [norm for site, norm in norms.items() if site != attacker]
    assert len(others) == 4 and norms[attacker] > 500 * max(others)
    # The mean would have moved by a fifth of that, less what the others could take back.
    assert norms[attacker] - sum(others) > 100 * 5 * max(others)
    for metrics in (one, two):
        left_out = {site for site, coefficient in by_site(metrics, COEFFICIENT).items() if not coefficient}
        assert left_out == {attacker}
        assert set(by_site(metrics, COSINE)) == set(norms)
    # What the synthetic trainer calls loss is the square of the weights; an honest round hardly changes it.
    losses = [entry["metrics"]["loss"] for entry in found["evaluations"]]
    assert len(losses) == 3 and max(losses) < 1.1 * losses[0]
    log = (out / "logs" / "coordinator.log").read_text()
    assert log.count(f"from 5 updates; multi-krum leaves out {attacker}") == 2
