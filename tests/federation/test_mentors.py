"""FedKD in a real federation: each site has a mentor of its own that never leaves it, and the mentee travels in few
directions."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local import LocalFederation
from tests.federation.conftest import FAST, Jobs
from tests.federation.test_training import SITE, rows, write_jsonl
from tests.unit.client_agent.training.conftest import LABELS, make_base_model

RECIPE = """\
name = "fedkd"
rounds = 3
seed = 11

[task]
type = "classification"
labels = ["drug", "lab", "symptom"]
max_length = 24

[data]
name = "notes"

[base_model]
name = "tiny-encoder"
layers = 1

[method]
type = "full"
freeze_embeddings = true

[local]
steps = 60
batch_size = 16
learning_rate = 1e-3

[local.mentor]
base_model = { name = "tiny-mentor" }
# Hidden states of random models are drawn together most easily where they say nothing.
hidden = false

[encoding]
up = "svd"
down = "svd"
svd_energy_start = 0.8
svd_energy_end = 0.9

[cohort]
sites = ["alfa", "bravo", "without-mentor"]
quorum = 2
gather_seconds = 600

[evaluation]
where = ["house"]
"""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """Two sites with a mentor, one that lacks it, and a house agent, which needs none."""
    directory = tmp_path_factory.mktemp("mentors")
    base = str(make_base_model(directory / "base", architecture="bert"))
    site = SITE.replace('["tiny-encoder"]', '["tiny-encoder", "tiny-mentor"]') + 'path = "notes.jsonl"\n'
    with LocalFederation(directory, settings=FAST) as federation:
        federation.init()
        federation.start_coordinator()
        for start, name in enumerate(("alfa", "bravo", "without-mentor", "house")):
            house = name == "house"
            held_out = 'validation = "validation.jsonl"\n' if house else "validation = 0.2\n"
            federation.enroll(
                name, site_toml=(SITE + 'path = "notes.jsonl"\n' if house else site) + held_out, house=house
            )
            home = federation.home(name)
            write_jsonl(home / "notes.jsonl", rows(LABELS, count=30, start=100 * start))
            write_jsonl(home / "validation.jsonl", rows(LABELS, count=20, start=700))
            # The same file of names for those that hold the same models.
            same = {"bravo": "alfa", "house": "without-mentor"}.get(name)
            if same:
                shutil.copyfile(federation.home(same) / "models.json", home / "models.json")
            for model in () if same else ("tiny-encoder", "tiny-mentor")[: 2 if name == "alfa" else 1]:
                federation.run("silotune-agent", "model", "add", model, "--path", base, "--home", str(home))
            federation.start_agent(name, wait=False)
        yield Jobs(federation)


def test_mentors_stay_mentees_learn_and_a_site_without_one_says_so(jobs: Jobs) -> None:
    federation = jobs.federation
    path = federation.directory / "fedkd.toml"
    path.write_text(RECIPE)
    job = federation.silotune("job", "submit", str(path))["job_id"]
    kept: dict[str, set[str]] = {}

    def ended(shown: dict) -> dict | None:
        for site in ("alfa", "bravo"):
            kept.setdefault(site, set()).update(found.name for found in states(federation.home(site), job))
        return shown if shown["job"]["state"] in ("COMPLETED", "FAILED") else None

    shown = jobs.wait(job, ended, saying="the end of the job")
    assert shown["job"]["state"] == "COMPLETED", shown["job"]["sentence"]
    trained = [entry for entry in shown["rounds"] if entry["number"]]
    assert len(trained) == 3
    for entry in trained:
        updates = {update["site"]: update for update in entry["updates"]}
        assert updates.keys() == {"alfa", "bravo"}
        for update in updates.values():
            assert update["metrics"]["mentor_loss"] > 0
            assert 0 <= update["metrics"]["mentor_accuracy"] <= 1
    assert "holds no base model named 'tiny-mentor'" in federation.nodes["without-mentor"].log.read_text()
    for name in ("loss", "mentor_loss"):
        first, last = (sum(update["metrics"][name] for update in trained[at]["updates"]) for at in (0, -1))
        assert last < first
    whole = federation.silotune("job", "plan", str(path))
    sent = sum(int(entry["bytes_up"]) for entry in trained)
    # Two of the three sites that the plan counts; and what it says of svd is the most that it can be.
    assert 0 < sent < whole["up_bytes"] * 2 / 3
    for site in ("alfa", "bravo"):
        assert "The whole version is fetched" not in federation.nodes[site].log.read_text()
        assert "The mentor begins anew" not in federation.nodes[site].log.read_text()
        # It is looked at while the job runs; when it has ended, what was kept of it goes.
        assert kept[site] <= {f"mentor-{number}.safetensors" for number in (1, 2, 3)}
        federation.wait_for(lambda site=site: not states(federation.home(site), job), seconds=300, saying="the end")


def states(home: Path, job: str) -> list[Path]:
    return list((home / "jobs" / job).glob("mentor-*.safetensors"))
