"""Real fine-tuning through a real federation: other people's data, exports, and equality with local training."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from client_agent.models import Models
from client_agent.settings import DataSet
from client_agent.taskdir import TaskSpec, checkpoint_step, read_result, write_spec
from client_agent.training.kinds import kind_of
from client_agent.training.train import batches
from deploy.local import LocalFederation
from protos.jobspec import parse, task_seed
from tests.federation.conftest import FAST, Jobs
from tests.unit.client_agent.training.conftest import LABELS, make_base_model, make_texts

RECIPE = """\
name = "{name}"
rounds = {rounds}
seed = 11

[task]
type = "classification"
labels = ["drug", "lab", "symptom"]
max_length = 24

[data]
name = "notes"

[base_model]
name = "tiny-encoder"

[method]
{method}

[local]
steps = {steps}
batch_size = 16
learning_rate = {rate}
{checkpoints}

[cohort]
sites = {sites}
quorum = {quorum}
gather_seconds = 600

[evaluation]
where = ["house"]
test = true
"""

SITE = """\
[http]
address = "{http}"

[device]
name = "cpu"
threads = 1

[policy]
base_models = ["tiny-encoder"]
fetch_base_models = true
data_sets = ["notes"]
methods = ["full", "lora"]
max_epochs = 1000

[data.notes]
"""

# Run where silotune cannot be imported: what a user of the exported directory does.
USE = """\
import json, sys
sys.path = [p for p in sys.path if p]
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
directory, base, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(directory)
if base:
    from peft import PeftModel
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model = PeftModel.from_pretrained(model, directory)
else:
    model = AutoModelForSequenceClassification.from_pretrained(directory)
model.eval()
inputs = tokenizer(texts, padding=True, truncation=True, max_length=24, return_tensors="pt")
inputs.pop("token_type_ids", None)
with torch.no_grad():
    print(json.dumps(model(**inputs).logits.argmax(-1).tolist()))
assert "protos" not in sys.modules and "client_agent" not in sys.modules
"""


def rows(labels: tuple[str, ...], *, count: int, start: int) -> list[tuple[str, str]]:
    made = {label: make_texts(label, rows=count, start=start) for label in labels}
    return [(made[label][number], label) for number in range(count) for label in labels]


def write_jsonl(path: Path, pairs: list[tuple[str, str]]) -> None:
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs))


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """Three sites that keep their notes as differently as hospitals do, and a house agent."""
    directory = tmp_path_factory.mktemp("hospital")
    base = make_base_model(directory / "base", architecture="bert")
    with LocalFederation(directory, settings=FAST) as federation:
        federation.init()
        federation.start_coordinator()
        data = {
            "parquet": 'path = "notes.parquet"\ntext = "note"\nlabel = "code"\nvalidation = 0.0\n'
            '[data.notes.labels]\n"0" = "drug"\n"1" = "lab"\n"2" = "symptom"\n',
            "latin": 'path = "notes.csv"\nencoding = "latin-1"\ndelimiter = ";"\ntext = "TEXT"\nlabel = "ART"\n',
            "partial": 'path = "notes.jsonl"\n',
        }
        for name, table in data.items():
            federation.enroll(name, site_toml=SITE + table)
        house = 'path = "notes.jsonl"\nvalidation = "validation.jsonl"\ntest = "test.jsonl"\n'
        federation.enroll("house", site_toml=SITE + house, house=True)

        home = federation.home("parquet")
        pairs = rows(LABELS, count=60, start=0)
        table = pa.table({"note": [t for t, _ in pairs], "code": [LABELS.index(label) for _, label in pairs]})
        pq.write_table(table, home / "notes.parquet")

        home = federation.home("latin")
        with (home / "notes.csv").open("w", encoding="latin-1", newline="") as file:
            writer = csv.writer(file, delimiter=";")
            writer.writerow(["TEXT", "ART"])
            writer.writerows([(f"fi\u00e8vre {text}", label) for text, label in rows(LABELS, count=40, start=100)])
            writer.writerow(["", "drug"])
            writer.writerow(["cough " * 10_000, "symptom"])

        write_jsonl(federation.home("partial") / "notes.jsonl", rows(("drug", "lab"), count=40, start=200))
        home = federation.home("house")
        write_jsonl(home / "notes.jsonl", rows(LABELS, count=5, start=300))
        write_jsonl(home / "validation.jsonl", rows(LABELS, count=30, start=400))
        write_jsonl(home / "test.jsonl", rows(LABELS, count=30, start=500))

        federation.silotune("model", "add", "tiny-encoder", str(base))
        for name in (*data, "house"):
            # One site has no base model and gets it from the coordinator.
            if name != "latin":
                home = str(federation.home(name))
                federation.run("silotune-agent", "model", "add", "tiny-encoder", "--path", str(base), "--home", home)
            federation.start_agent(name, wait=False)
        yield Jobs(federation)


def submit(
    jobs: Jobs, name: str, *, method: str, sites: list[str], rounds: int, steps: int, rate: float, checkpoints: str = ""
) -> str:
    path = jobs.federation.directory / f"{name}.toml"
    fields = {
        "name": name, "method": method, "rounds": rounds, "steps": steps, "rate": rate, "checkpoints": checkpoints,
    }  # fmt: skip
    path.write_text(RECIPE.format(sites=json.dumps(sites), quorum=len(sites), **fields))
    return jobs.federation.silotune("job", "submit", str(path))["job_id"]


@pytest.mark.parametrize(
    ("method", "rate"),
    [('type = "full"\nfreeze_embeddings = true', 1e-3), ('type = "lora"\nrank = 4\nalpha = 8', 2e-2)],
    ids=["full", "lora"],
)
def test_it_learns_and_the_export_gives_the_reported_accuracy_without_silotune(
    hospital: Jobs, method: str, rate: float, tmp_path: Path
) -> None:
    name = "full" if "full" in method else "lora"
    job = submit(hospital, name, method=method, sites=["parquet", "latin", "partial"], rounds=6, steps=40, rate=rate)
    shown = hospital.end(job)
    assert shown["job"]["state"] == "COMPLETED", shown["job"]["sentence"]
    accuracy = {(entry["version"], entry["split"]): entry["metrics"]["accuracy"] for entry in shown["evaluations"]}
    best = shown["job"]["best_version"]
    assert accuracy[best, "validation"] == max(v for (_, split), v in accuracy.items() if split == "validation")
    assert accuracy[best, "test"] > 0.6 > accuracy[0, "validation"]
    check_plan(hospital.federation, name, shown)
    homes = [hospital.federation.home(site) for site in ("latin", "house")]
    fetched, added = (Models(home / "models.json").current("tiny-encoder") for home in homes)
    assert fetched.digest == added.digest
    assert Path(fetched.directory).is_relative_to(homes[0])

    directory = hospital.federation.directory
    out = directory / f"export-{name}"
    hospital.federation.silotune("model", "export", job, "--out", str(out))
    test = [json.loads(line) for line in (hospital.federation.home("house") / "test.jsonl").read_text().splitlines()]
    base = str(directory / "base") if name == "lora" else ""
    script = tmp_path / "use.py"
    script.write_text(USE)
    done = subprocess.run(
        [sys.executable, str(script), str(out), base, json.dumps([row["text"] for row in test])],
        capture_output=True, text=True, cwd=tmp_path, env={"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    predicted = json.loads(done.stdout)
    correct = sum(LABELS[guess] == row["label"] for guess, row in zip(predicted, test, strict=True))
    assert correct / len(test) == pytest.approx(accuracy[best, "test"], abs=1e-9)


def test_every_trainer_rebuilds_the_versions_of_an_encoded_job_alike(hospital: Jobs) -> None:
    method = 'type = "lora"\nrank = 4\nalpha = 8\n[encoding]\nup = "int4"\ndown = "int8"'
    job = submit(hospital, "encoded", method=method, sites=["parquet", "latin"], rounds=2, steps=60, rate=2e-2)
    shown = hospital.end(job)
    assert shown["job"]["state"] == "COMPLETED", shown["job"]["sentence"]
    for site in ("parquet", "latin", "house"):
        assert "The whole version is fetched" not in hospital.federation.nodes[site].log.read_text()
    loss = [e["metrics"]["loss"] for e in shown["evaluations"] if e["split"] == "validation"]
    assert loss[-1] < loss[0]


def check_plan(federation: LocalFederation, name: str, shown: dict[str, Any]) -> None:
    """What `silotune job plan` says now is what the job took, but for names in the header, and for what an upload that
    was interrupted on a busy machine sent again. (tests/contract/test_planned_bytes.py holds it to the byte.)"""
    plan = federation.silotune("job", "plan", str(federation.directory / f"{name}.toml"))
    trained = [entry for entry in shown["rounds"] if entry["number"]]
    updates = sum(len(entry["updates"]) for entry in trained)
    taken = sum(entry["bytes_up"] for entry in trained)
    assert 0.99 * plan["up_bytes"] <= taken <= 1.01 * plan["up_bytes"] + 2 * taken / updates
    assert plan["unmeasured"] == []
    assert plan["seconds"] > 0
    assert all(site["needs"]["disk"] > 0 for site in plan["sites"])


def kill_trainer_in_mid_training(jobs: Jobs, site: str, directory: Path) -> int:
    """The step of the checkpoint that the killed trainer leaves in `directory`, its task's."""
    agent = jobs.federation.nodes[site]

    def trainers() -> list[psutil.Process]:
        return [child for child in psutil.Process(agent.pid).children() if "client_agent.tether" in child.cmdline()]

    (trainer,) = jobs.federation.wait_for(trainers, seconds=300, saying="a trainer", poll_seconds=0.01)

    def step_after_a_short_turn() -> int:
        """So that it cannot have finished before it is looked at."""
        trainer.resume()
        time.sleep(0.05)
        trainer.suspend()
        return checkpoint_step(directory)

    jobs.federation.wait_for(step_after_a_short_turn, seconds=300, saying="a checkpoint", poll_seconds=0)
    assert read_result(directory) is None
    trainer.kill()
    return checkpoint_step(directory)


def test_one_site_and_one_round_equal_local_training_bit_for_bit_although_the_trainer_was_killed(
    hospital: Jobs, tmp_path: Path
) -> None:
    federation = hospital.federation
    # A trainer that is warm since an earlier job is gone after this; the new one begins when the test looks for it.
    federation.nodes["parquet"].kill(signal.SIGKILL)
    log = federation.nodes["parquet"].log
    before = log.read_text().count("The trainer begins.")
    job = submit(
        hospital, "alone", method='type = "full"', sites=["parquet"], rounds=1, steps=120, rate=1e-3,
        checkpoints="checkpoint_seconds = 0.000001",
    )  # fmt: skip
    federation.start_agent("parquet", wait=False)
    saved = kill_trainer_in_mid_training(hospital, "parquet", federation.home("parquet") / "tasks" / f"{job}-1-train")
    shown = hospital.end(job)
    assert shown["job"]["state"] == "COMPLETED", shown["job"]["sentence"]
    begun = [line for line in log.read_text().splitlines() if "The trainer begins." in line][before:]
    assert len(begun) == 2 and f"resumed_step={saved}" in begun[1], "no step before the checkpoint is repeated"
    spec = parse(shown["spec"])
    home = federation.home("parquet")
    fields = {
        "task_id": "local", "job_id": "local", "spec": spec.model_dump(mode="json"), "split": "", "device": "cpu",
        "base_model_path": str(federation.directory / "base"), "base_digest": "0" * 64, "threads": 1,
    }  # fmt: skip
    data = DataSet(
        path=str(home / "notes.parquet"), text="note", label="code", validation=0.0,
        labels={"0": "drug", "1": "lab", "2": "symptom"},
    )  # fmt: skip
    init = TaskSpec(**fields, round=0, kind="init", seed=0, model_path=None, data_set=None)
    train = TaskSpec(
        **fields, round=1, kind="train", seed=task_seed(spec.seed, round_number=1, site="parquet"),
        model_path=str(tmp_path / "init" / "update.safetensors"), data_set=data.model_dump(mode="json"),
    )  # fmt: skip
    write_spec(tmp_path / "init", init)
    write_spec(tmp_path / "train", train)
    orders = "".join(json.dumps({"run": str(tmp_path / part)}) + "\n" for part in ("init", "train"))
    worker = subprocess.Popen(
        [sys.executable, "-m", "client_agent.training.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(orders)
    worker.stdin.flush()
    done = 0
    while done < 2:
        event = json.loads(worker.stdout.readline())
        assert event["event"] in ("progress", "done"), event
        done += event["event"] == "done"
    worker.stdin.close()
    worker.wait(30)
    out = federation.directory / "export-alone"
    federation.silotune("model", "export", job, "--round", "1", "--out", str(out))
    exported = (out / "model.safetensors").read_bytes()
    assert exported == (tmp_path / "train" / "update.safetensors").read_bytes()


def test_scaffold_is_plain_torch_with_control_variates_although_a_trainer_was_killed(hospital: Jobs) -> None:
    """Three rounds of two sites; in the second one a trainer dies, so that it begins twice from the same c_k."""
    federation, steps, rate = hospital.federation, 40, 0.05
    job = submit(
        hospital, "scaffold", method='type = "full"\n[aggregation]\nrule = "scaffold"\nweights = "equal"',
        sites=["parquet", "partial"], rounds=3, steps=steps, rate=rate,
        checkpoints='optimizer = "sgd"\ncheckpoint_seconds = 0.000001',
    )  # fmt: skip
    home = federation.home("parquet")
    kill_trainer_in_mid_training(hospital, "parquet", home / "tasks" / f"{job}-2-train")
    shown = hospital.end(job)
    assert shown["job"]["state"] == "COMPLETED", shown["job"]["sentence"]
    spec, exported = parse(shown["spec"]), {n: federation.directory / f"export-scaffold-{n}" for n in (0, 3)}
    for number, directory in exported.items():
        federation.silotune("model", "export", job, "--round", str(number), "--out", str(directory))
    codes = {"0": "drug", "1": "lab", "2": "symptom"}
    data = {
        "parquet": DataSet(path=str(home / "notes.parquet"), text="note", label="code", validation=0.0, labels=codes),
        "partial": DataSet(path=str(federation.home("partial") / "notes.jsonl")),
    }
    kind, tokenizer = kind_of(spec), AutoTokenizer.from_pretrained(exported[0])
    tokens = {
        site: kind.encode(
            kind.read(table, name="notes", split="train"), tokenizer=tokenizer, on_rows=lambda done, total: None
        )
        for site, table in data.items()
    }
    network = AutoModelForSequenceClassification.from_pretrained(exported[0]).train()
    parameters = dict(network.named_parameters())
    first = version = {name: p.detach().clone() for name, p in parameters.items()}
    common = {name: torch.zeros_like(p) for name, p in parameters.items()}
    own = dict.fromkeys(data, common)
    for number in (1, 2, 3):
        ends, new = {}, {}
        for site, rows in tokens.items():
            seed = task_seed(spec.seed, round_number=number, site=site)
            for name, p in parameters.items():
                p.data.copy_(version[name])
            torch.manual_seed(seed)
            for batch in islice(batches(len(rows), batch_size=spec.local.batch_size, seed=seed), steps):
                inputs, labels = rows.batch(batch, device="cpu")
                network.zero_grad()
                torch.nn.functional.cross_entropy(network(**inputs).logits, labels).backward()
                for name, p in parameters.items():
                    p.data -= rate * (p.grad - own[site][name] + common[name])
            ends[site] = {name: p.detach().clone() for name, p in parameters.items()}
            new[site] = {
                name: own[site][name] - common[name] + (version[name] - end) / (steps * rate)
                for name, end in ends[site].items()
            }
        common = {name: c + sum(new[site][name] - own[site][name] for site in new) / 2 for name, c in common.items()}
        own, version = new, {name: sum(end[name] for end in ends.values()) / 2 for name in version}
    theirs = load_file(exported[3] / "model.safetensors")
    assert theirs.keys() == version.keys()
    for name, values in version.items():
        torch.testing.assert_close(theirs[name], values, rtol=1e-4, atol=1e-5)
    assert max(float((version[name] - first[name]).abs().max()) for name in version) > 0.01


def test_a_wrong_row_fails_in_one_sentence_that_names_it(hospital: Jobs) -> None:
    federation = hospital.federation
    path = federation.home("partial") / "notes.jsonl"
    good = path.read_text()
    path.write_text(good + '{"text": "a new kind", "label": "imaging"}\n')
    try:
        job = submit(hospital, "wrong", method='type = "full"', sites=["partial"], rounds=1, steps=1, rate=1e-3)
        shown = hospital.end(job)
        assert shown["job"]["state"] == "FAILED"
        assert "Data set 'notes', row 81: the label (kept at the site)" in shown["job"]["sentence"]
        assert "imaging" not in shown["job"]["sentence"], "what a cell holds stays at the site"
        assert str(federation.home("partial")) not in shown["job"]["sentence"]
    finally:
        path.write_text(good)
