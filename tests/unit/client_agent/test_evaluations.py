"""What an agent lets a trainer read to evaluate a job that asks questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from client_agent import runner as runner_module
from client_agent.home import Home
from client_agent.models import Models
from protos import jobspec
from protos.v1 import agent_pb2
from tests.unit.client_agent.coordinator_in_memory import Coordinator
from tests.unit.client_agent.test_loop import MODEL, finish_of, running
from tests.unit.client_agent.test_stages import use_trainer
from tests.unit.client_agent.work_to_do import model_bytes, task

SITE = """
[data.notes]
path = "notes.jsonl"
instruction = "instruction"

[data.medqa]
path = "medqa.jsonl"
question = "question"

[data.pubmedqa]
path = "pubmedqa.jsonl"
question = "question"

[policy]
tasks = ["causal-lm"]
base_models = ["llama"]
methods = ["full"]
data_sets = ["notes", "medqa"]
"""
JOB = jobspec.parse(
    {
        "name": "teaching",
        "task": {"type": "causal-lm"},
        "data": {"name": "notes"},
        "base_model": {"name": "llama"},
        "local": {"steps": 1, "batch_size": 1},
        "evaluation": {"metric": "loss", "benchmarks": ["medqa", "pubmedqa", "medmcqa"]},
        "rounds": 2,
    }
)
# Says what it was told to read, and where it may keep something.
TRAINER = """
    import json, pathlib, sys
    from client_agent.taskdir import TaskResult, read_spec, write_result
    directory = pathlib.Path(json.loads(sys.stdin.readline())["run"])
    spec = read_spec(directory)
    metrics = {f"{name}_questions": 1.0 for name in spec.benchmarks}
    metrics |= {"loss": 0.5} if spec.data_set else {}
    assert all(pathlib.Path(one["path"]).is_absolute() for one in spec.benchmarks.values())
    assert pathlib.Path(spec.state_directory).name == spec.job_id
    write_result(directory, TaskResult(examples=1, metrics=metrics))
    print(json.dumps({"event": "done"}), flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def site(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    home.site_file.write_text(f'{SITE}\n[http]\naddress = "127.0.0.1:0"\n')
    row = {"instruction": "What?", "output": "That.", "question": "What?", "options": ["a", "b"], "answer": 0}
    for name in ("notes", "medqa", "pubmedqa"):
        (home.path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    directory = home.path / "llama"
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(model_bytes())
    (directory / "config.json").write_text("{}")
    Models(home.models_file).add("llama", directory)
    use_trainer(monkeypatch, tmp_path, TRAINER)
    monkeypatch.setitem(runner_module.MODULES, "training", "trainer_of_the_test")
    return home


async def measured(home: Home, coordinator: Coordinator, *, kind: str = "evaluate") -> agent_pb2.FinishTaskRequest:
    coordinator.add_task(task(kind, round=1, version=1, split="validation", job=JOB), model=MODEL)
    async with running(home):
        return await finish_of(coordinator)


async def test_an_evaluation_reads_the_questions_that_the_policy_names(site: Home, coordinator: Coordinator) -> None:
    finish = await measured(site, coordinator)
    assert dict(finish.succeeded.metrics) == {"loss": 0.5, "medqa_questions": 1.0}


async def test_an_agent_without_the_jobs_rows_may_still_ask(site: Home, coordinator: Coordinator) -> None:
    text = site.site_file.read_text()
    site.site_file.write_text(text.replace("[data.notes]", "[data.other]"))
    finish = await measured(site, coordinator)
    assert dict(finish.succeeded.metrics) == {"medqa_questions": 1.0}


async def test_an_agent_with_neither_declines(site: Home, coordinator: Coordinator) -> None:
    text = site.site_file.read_text()
    site.site_file.write_text(text.replace("[data.notes]", "[data.other]").replace('"notes", "medqa"', '"notes"'))
    finish = await measured(site, coordinator)
    assert "describes no data set named 'notes'" in finish.declined.reason
