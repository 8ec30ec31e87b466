"""What a house agent lets its trainer read to distil an aggregate, and what it hands in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client_agent import runner as runner_module
from client_agent.home import Home
from client_agent.models import Models
from protos import jobspec
from protos.digests import digest_of
from protos.tensors import header_length
from protos.v1 import agent_pb2
from protos.v1.manifest_pb2 import ENCODING_RAW, FORM_VALUES, BlobRef
from tests.unit.client_agent.coordinator_in_memory import Coordinator
from tests.unit.client_agent.test_loop import MODEL, finish_of, running
from tests.unit.client_agent.test_stages import use_trainer
from tests.unit.client_agent.work_to_do import model_bytes, spec, task

SITE = """
[data.notes]
path = "notes.csv"

[data.public]
path = "public.csv"

[policy]
tasks = ["classification", "synthetic", "distill"]
base_models = ["small", "large"]
methods = ["full"]
data_sets = ["public"]

[http]
address = "127.0.0.1:0"
"""
JOB = jobspec.parse(
    {
        "name": "teaching",
        "task": {"type": "classification", "labels": ["a", "b"]},
        "data": {"name": "notes"},
        "base_model": {"name": "small"},
        "local": {"epochs": 100},
        "distillation": {"teacher": {"name": "large"}, "data": "public"},
        "rounds": 5,
    }
)
# Leaves beside the agent's home what it was told, and hands in what it got.
TRAINER = """
    import json, pathlib, shutil, sys
    from client_agent.taskdir import SPEC, UPDATE, TaskResult, read_spec, write_result
    directory = pathlib.Path(json.loads(sys.stdin.readline())["run"])
    spec = read_spec(directory)
    shutil.copy(directory / SPEC, pathlib.Path(spec.state_directory).parent.parent / "seen.json")
    shutil.copy(spec.model_path, directory / UPDATE)
    write_result(directory, TaskResult(examples=2, steps=3, metrics={"distillation_kept": 0.0}))
    print(json.dumps({"event": "done"}), flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def house(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    home.site_file.write_text(SITE)
    for name in ("notes", "public"):
        (home.path / f"{name}.csv").write_text("text,label\nyes,a\nno,b\n")
    for name in ("small", "large"):
        directory = home.path / name
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(model_bytes())
        (directory / "config.json").write_text(json.dumps({"name": name}))
        Models(home.models_file).add(name, directory)
    synthetic = runner_module.MODULES["synthetic"]
    use_trainer(monkeypatch, tmp_path, TRAINER)
    monkeypatch.setitem(runner_module.MODULES, "synthetic", synthetic)
    monkeypatch.setitem(runner_module.MODULES, "training", "trainer_of_the_test")
    return home


async def distilled(
    home: Home, coordinator: Coordinator, job: jobspec.JobSpec = JOB, **changes: Any
) -> agent_pb2.FinishTaskRequest:
    coordinator.add_task(task("distill", round=4, job=job, **changes), model=MODEL)
    async with running(home):
        return await finish_of(coordinator)


async def test_the_trainer_gets_the_aggregate_the_teacher_and_the_rows_to_learn_from(
    house: Home, coordinator: Coordinator
) -> None:
    finish = await distilled(house, coordinator, counted_round=3)
    seen = json.loads((house.path / "seen.json").read_text())
    large = Models(house.models_file).current("large")
    assert (seen["teacher_model_path"], seen["teacher_digest"]) == (large.directory, large.digest)
    assert seen["proxy_data_set"]["path"] == str(house.path / "public.csv")
    assert seen["data_set"] is None, "the policy does not name the job's own"
    assert (seen["counted_round"], seen["members"], seen["model_digest"]) == (3, [], digest_of(MODEL))
    handed_in = finish.succeeded
    assert handed_in.manifest.blob.digest == digest_of(MODEL)
    assert (handed_in.manifest.encoding, handed_in.manifest.form) == (ENCODING_RAW, FORM_VALUES)
    assert handed_in.metrics["distillation_kept"] == 0.0 and not handed_in.files


async def test_where_the_policy_names_the_jobs_rows_too_they_are_there_to_measure_on(
    house: Home, coordinator: Coordinator
) -> None:
    house.site_file.write_text(SITE.replace('["public"]', '["public", "notes"]'))
    await distilled(house, coordinator)
    assert json.loads((house.path / "seen.json").read_text())["data_set"]["path"] == str(house.path / "notes.csv")


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ('"synthetic", "distill"', '"synthetic"', "tasks does not name 'distill'"),
        ("[data.public]", "[data.private]", "This site describes no data set named 'public'."),
    ],
)
async def test_what_the_site_does_not_allow_or_have_is_declined(
    house: Home, coordinator: Coordinator, before: str, after: str, reason: str
) -> None:
    house.site_file.write_text(SITE.replace(before, after))
    assert reason in (await distilled(house, coordinator)).declined.reason


async def test_a_teacher_that_is_not_here_or_not_the_pinned_one_is_declined(
    house: Home, coordinator: Coordinator
) -> None:
    fields = json.loads(JOB.canonical_json)
    fields["distillation"]["teacher"] = {"name": "larger"}
    finish = await distilled(house, coordinator, jobspec.parse(fields))
    assert "This site holds no base model named 'larger'." in finish.declined.reason
    fields["distillation"]["teacher"] = {"name": "large", "digest": "0" * 64}
    coordinator.add_task(task("distill", round=4, job=jobspec.parse(fields), id="pinned"), model=MODEL)
    async with running(house):
        await coordinator.until(
            lambda: any("the recipe pins 0000" in one.declined.reason for one in coordinator.finished)
        )


async def test_without_labels_the_sites_updates_come_too(house: Home, coordinator: Coordinator) -> None:
    """The synthetic trainer checks that the aggregate, all 0.5, is the mean of its members."""
    start = header_length(MODEL[:8])
    members = []
    for fill, weight in ((0.25, 0.75), (1.25, 0.25)):
        content = MODEL[:start] + np.full((len(MODEL) - start) // 4, fill, dtype="<f4").tobytes()
        coordinator.blobs[digest_of(content)] = content
        members.append(agent_pb2.Member(blob=BlobRef(digest=digest_of(content), size=len(content)), weight=weight))
    job = spec(distillation={"labels": False})
    finish = await distilled(house, coordinator, job, members=members)
    assert finish.succeeded.metrics["teacher_loss"] == 1.0, finish
    assert finish.succeeded.manifest.blob.digest != digest_of(MODEL)

    members[0].weight, members[1].weight = 0.5, 0.5
    coordinator.add_task(task("distill", round=5, job=job, members=members, id="wrong"), model=MODEL)
    async with running(house):
        finish = await finish_of(coordinator, 1)
    assert "not the mean of the updates" in finish.failed.reason
