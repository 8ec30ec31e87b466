"""`silotune lab run`: many sites, one trainer; a lab that was killed goes on."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import yaml

from client_agent.taskdir import read_json
from client_agent.training import small_llama
from client_agent.training.small_llama import Pretraining, Sizes
from deploy.data.make_samples import ALPACA, ALPACA_COLUMNS, QUESTION_COLUMNS, QUESTION_ROWS, QUESTIONS, write
from deploy.lab.make_llama import lay_out_as_hub_cache, texts

RECIPE = """\
name = "small"
rounds = 3
[task]
type = "synthetic"
payload_mb = 0.1
train_seconds = 0.5
[local]
steps = 4
[cohort]
quorum = 4
[evaluation]
where = ["house"]
metric = "loss"
"""


@pytest.fixture
def experiment(tmp_path: Path) -> list[str]:
    """The command that runs it."""
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "lab.toml").write_text("sites = 4\n")
    return [str(Path(sys.executable).parent / "silotune"), "lab", "run", str(tmp_path), "--out", str(tmp_path / "out")]


def test_a_lab_that_was_killed_goes_on_with_the_same_job_and_all_sites_share_one_trainer(
    experiment: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = subprocess.Popen(experiment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    held = out / "agents" / "site-04" / "tasks" / "hold-3"
    while read_json(out / "metrics.json") is None or not held.exists():
        assert first.poll() is None, (out / "logs" / "coordinator.log").read_text()
        if held.parent.is_dir():
            held.touch()
        time.sleep(0.05)
    first.kill()
    first.wait()
    held.unlink()
    before = read_json(out / "metrics.json")["job"]
    assert before["state"] != "COMPLETED"

    # Nothing of the first may hold the folder: its processes end with it.
    done = subprocess.run(experiment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "metrics.json").read_text())
    assert (found["job"]["id"], found["job"]["state"]) == (before["id"], "COMPLETED")
    assert [entry["number"] for entry in found["rounds"]] == [1, 2, 3]
    sites = {f"site-{number:02}" for number in range(1, 5)}
    assert all({update["site"] for update in entry["updates"]} == sites for entry in found["rounds"])
    second_start = (out / "logs" / "sites.log").read_text().split("The sites run.")[-1]
    assert second_start.count("A trainer was started.") == 1

    again = subprocess.run([*experiment, "--rounds", "4"], capture_output=True, text=True)
    assert again.returncode == 5 and "another experiment" in again.stderr


def test_a_grid_that_was_killed_runs_only_what_is_left_and_more_seeds_are_more_cells(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("quorum = 4", "quorum = 2"))
    (tmp_path / "lab.toml").write_text("sites = 2\n")
    out = tmp_path / "out"
    command = [str(Path(sys.executable).parent / "silotune"), "lab", "run", str(tmp_path), "--out", str(out)]
    first = subprocess.Popen([*command, "--seeds", "1,2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    cells = [out / "cells" / f"seed-{number}" for number in (1, 2, 3)]
    while not (cells[1] / "ready.json").exists():
        assert first.poll() is None
        time.sleep(0.05)
    first.kill()
    first.wait()
    done = read_json(cells[0] / "metrics.json")

    again = subprocess.run([*command, "--seeds", "1-3", "--jobs", "2"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "3 cells, 1 of them done." in again.stderr
    assert "(1 of 2; " in again.stderr and " to go)" in again.stderr and "(2 of 2; the last one)" in again.stderr
    assert read_json(cells[0] / "metrics.json") == done
    jobs = [read_json(cell / "metrics.json")["job"] for cell in cells]
    assert [job["state"] for job in jobs] == ["COMPLETED"] * 3 and len({job["id"] for job in jobs}) == 3
    listed = read_json(out / "grid.json")["cells"]
    assert [cell["axes"] for cell in listed] == [{"seed": 1}, {"seed": 2}, {"seed": 3}]


SHIPPED = Path(__file__).parents[2] / "deploy"


@pytest.mark.timeout(1200)
def test_two_pods_of_the_shipped_job_fill_one_folder_side_by_side_and_it_is_one_report(tmp_path: Path) -> None:
    recipe = RECIPE.replace("quorum = 4", "quorum = 1").replace("rounds = 3", "rounds = 1").replace("0.5", "0.1")
    (tmp_path / "recipe.toml").write_text(recipe)
    (tmp_path / "lab.toml").write_text("sites = 1\n[grid]\nseeds = [1, 2, 3]\n")
    out = tmp_path / "out"
    job = yaml.safe_load((SHIPPED / "kubernetes" / "lab.yaml").read_text())["spec"]
    (container,) = job["template"]["spec"]["containers"]
    (typed,) = container["args"]
    own = {"/lab/recipes/hilmkil-2021": tmp_path, "/lab/runs/hilmkil-2021": out, f"/{job['completions']} ": "/2 "}
    for shipped, ours in own.items():
        assert typed.count(shipped) == 1
        typed = typed.replace(shipped, str(ours))
    scripts = Path(sys.executable).parent
    pods = [
        subprocess.Popen(
            [*container["command"], typed], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": str(index)},
        )
        for index in range(2)
    ]  # fmt: skip
    said = [pod.communicate()[1] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], said
    assert [re.findall(r"^(seed-\d): done", text, re.M) for text in said] == [["seed-1", "seed-3"], ["seed-2"]]
    assert [cell["name"] for cell in read_json(out / "grid.json")["cells"]] == ["seed-1", "seed-2", "seed-3"]
    done = subprocess.run([scripts / "silotune", "lab", "report", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with (out / "cells.csv").open() as file:
        assert [row["seed"] for row in csv.DictReader(file)] == ["1", "2", "3"]


HUB_NAME = "ContactDoctor/Bio-Medical-Llama-3-8B"


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama under the large one's name; the directory of its only revision."""
    made, cache = (tmp_path_factory.mktemp("hub") / name for name in ("made", "cache"))
    sizes = Sizes(vocabulary=400, hidden=32, layers=1)
    small_llama.make(made, texts=texts(rows=60), sizes=sizes, pretraining=Pretraining(), seed=1)
    revision = lay_out_as_hub_cache(made, cache=cache, repository=HUB_NAME)
    return cache / f"models--{HUB_NAME.replace('/', '--')}" / "snapshots" / revision


def run_in_small(directory: Path, *words: str, recipe: str, model: Path, sites: int = 2) -> dict[str, Any]:
    """metrics.json of a shipped recipe with so many sites, a few held-out rows and four questions of each benchmark."""
    for name in QUESTION_ROWS:
        few = pyarrow.parquet.read_table(SHIPPED / "data" / QUESTIONS / f"{name}.parquet").slice(0, 4).to_pylist()
        write(directory / f"{name}.parquet", [{**row, "context": ""} for row in few], columns=QUESTION_COLUMNS)
    rows = pyarrow.parquet.read_table(SHIPPED / "data" / ALPACA / "validation.parquet").to_pylist()
    for name, part in (("rows", rows[:200]), ("held_out", rows[200:240])):
        write(directory / f"{name}.parquet", part, columns=ALPACA_COLUMNS)
    (directory / "lab.toml").write_text(f"""\
recipe = "{SHIPPED}/recipes/flowertune-medical/{recipe}"
sites = {sites}
[data]
rows = "rows.parquet"
validation = "held_out.parquet"
test = "held_out.parquet"
columns = {{ instruction = "instruction" }}
benchmarks = {{ pubmedqa = "pubmedqa.parquet", medqa = "medqa.parquet", medmcqa = "medmcqa.parquet" }}
[model]
path = "{model}"
""")
    command = [
        str(Path(sys.executable).parent / "silotune"), "lab", "run", str(directory), "--out", str(directory / "out"),
        "--threads", "1", *words,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((directory / "out" / "metrics.json").read_text())
    return found


def test_the_recipe_of_the_large_model_runs_a_round_on_a_small_one_that_lies_in_a_hub_cache(
    hub_cache: Path, tmp_path: Path
) -> None:
    few = ("--rounds", "1", "--set", "local.steps=2", "--set", "local.batch_size=2")
    found = run_in_small(tmp_path, *few, recipe="recipe.toml", model=hub_cache)
    assert [len(entry["updates"]) for entry in found["rounds"]] == [2]
    measured = {entry["version"]: entry["metrics"] for entry in found["evaluations"]}
    assert set(measured) == {0, 1}
    assert all(metrics[f"{name}_questions"] == 4 for metrics in measured.values() for name in QUESTION_ROWS)


def test_the_twin_learns(hub_cache: Path, tmp_path: Path) -> None:
    # Its few tokens are short, so that a prompt has more of them; and it has learnt nothing yet.
    words = ("--rounds", "3", "--set", "task.max_length=256", "--set", "local.learning_rate=2e-2")
    found = run_in_small(tmp_path, *words, recipe="twin.toml", model=hub_cache)
    assert {len(entry["updates"]) for entry in found["rounds"]} == {2}
    losses = [entry["metrics"]["loss"] for entry in found["evaluations"] if entry["split"] == "validation"]
    assert len(losses) == 4 and losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.timeout(1200)
def test_eight_sites_share_one_trainer_that_loads_the_base_model_once(hub_cache: Path, tmp_path: Path) -> None:
    words = ("--rounds", "2", "--set", "cohort.size=8", "--set", "cohort.quorum=8", "--set", "task.max_length=256")
    found = run_in_small(tmp_path, *words, recipe="twin.toml", model=hub_cache, sites=8)
    assert [len(entry["updates"]) for entry in found["rounds"]] == [8, 8]
    logs = tmp_path / "out" / "logs"
    assert (logs / "sites.log").read_text().count("A trainer was started.") == 1
    # Before each training it says how long its latest loading took; another loading would take another time.
    took = re.findall(r"ready to train .*; loading afresh took (\S+) s", (logs / "trainer.log").read_text())
    assert len(took) == 16 and len(set(took)) == 1
