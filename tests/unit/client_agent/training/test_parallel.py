"""Two processes that train one model, next to one that does so alone: the same losses, the same update."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from client_agent.taskdir import UPDATE, TaskSpec, checkpoint_step, read_result
from client_agent.training.kinds import kind_of
from client_agent.training.parallel import Group
from client_agent.training.predicted import Predictions
from client_agent.training.warm import Warm
from protos import jobspec
from tests.unit.client_agent.training.conftest import Site, causal_recipe
from tests.unit.client_agent.training.test_worker import Worker

# Five rows in parts of two: one process has three of them, and the other two; the last batch of an epoch is smaller.
LOCAL = {
    "steps": 8, "batch_size": 5, "micro_batch_size": 2, "learning_rate": 1e-2, "optimizer": "sgd",
    "max_gradient_norm": 1.0, "gradient_checkpointing": True,
}  # fmt: skip
LORA = {"type": "lora", "rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": LORA, "base_model": {"name": "tiny-llama", "dtype": "bfloat16"}},
    "qlora": {"method": LORA, "base_model": {"name": "tiny-llama", "quantization": "nf4"}},
    # FedProx besides: what it pulls to is sharded as what it pulls.
    "full": {"method": {"type": "full"}},
}


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    started = Worker()
    yield started
    started.process.kill()
    started.process.communicate()


def init(site: Site, recipe: dict[str, Any]) -> Path:
    directory, _ = site.run(f"init-{recipe['method']['type']}", site.task("init", recipe=recipe), warm=Warm())
    return directory / UPDATE


def peers_of(worker: Worker) -> list[psutil.Process]:
    return psutil.Process(worker.process.pid).children(recursive=True)


def endless(site: Site, model: Path, **changes: Any) -> TaskSpec:
    recipe = causal_recipe(**METHODS["full"], local={**LOCAL, "steps": 10_000_000})
    return site.task("train", recipe=recipe, model=model, processes=2, **changes)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_as_one_does(teaching_site: Site, worker: Worker, method: str) -> None:
    recipe = causal_recipe(**METHODS[method], local={**LOCAL, "proximal": 2.0 if method == "full" else 0.0})
    version = init(teaching_site, recipe)
    task = teaching_site.task("train", recipe=recipe, model=version, processes=2)
    directory = teaching_site.write("two", task)
    events = worker.run(directory)
    assert events[-1] == {"event": "done"}
    alone, result = teaching_site.run("one", teaching_site.task("train", recipe=recipe, model=version))
    ours, theirs, begun = (load_file(path) for path in (directory / UPDATE, alone / UPDATE, version))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-5)
    assert max(float((theirs[name] - begun[name]).abs().max()) for name in theirs) > 1e-3, "it has learnt something"
    together = read_result(directory)
    assert together and together.examples == result.examples
    assert together.metrics["loss"] == pytest.approx(result.metrics["loss"], abs=1e-5)
    assert together.metrics["update_norm"] == pytest.approx(result.metrics["update_norm"], rel=1e-4)

    measure = teaching_site.task("evaluate", recipe=recipe, model=directory / UPDATE, processes=2)
    assert worker.run(teaching_site.write("measure", measure))[-1] == {"event": "done"}
    _, measured = teaching_site.run("measured", teaching_site.task("evaluate", recipe=recipe, model=alone / UPDATE))
    measured_together = read_result(teaching_site.directory / "measure")
    assert measured_together
    assert measured_together.metrics["loss"] == pytest.approx(measured.metrics["loss"], abs=1e-4)
    # They stay warm for the next task.
    assert len(peers_of(worker)) == 1


def test_two_processes_keep_what_was_said_of_each_row_once_and_in_one_file(site: Site, worker: Worker) -> None:
    said = site.directory / "said"
    keeping = replace(site, data_set=site.data_set.model_copy(update={"predictions": str(said)}))
    version = init(site, site.recipe())
    task = keeping.task("evaluate", recipe=site.recipe(), model=version, split="test")
    assert worker.run(keeping.write("two", replace(task, job_id="two", processes=2)))[-1] == {"event": "done"}
    keeping.run("one", replace(task, job_id="one"))
    assert {path.name for path in said.iterdir()} == {"two-version-1-test.parquet", "one-version-1-test.parquet"}
    two, one = (
        pyarrow.parquet.read_table(said / f"{job}-version-1-test.parquet").to_pylist() for job in ("two", "one")
    )
    assert [row["row"] for row in two] == list(range(42))
    for ours, theirs in zip(two, one, strict=True):
        assert ours == {**theirs, "probability": pytest.approx(theirs["probability"], abs=1e-5)}

    # Two that write the same file would not always show in it.
    helping = Predictions(replace(task, job_id="other"), kind_of(jobspec.parse(site.recipe())), writes=False)
    helping.write()
    assert len(list(said.iterdir())) == 2


def test_a_pause_costs_two_processes_no_bit_and_a_cancel_ends_the_other(teaching_site: Site, worker: Worker) -> None:
    lora = {**LORA, "dropout": 0.2}
    recipe = causal_recipe(method=lora, local={**LOCAL, "optimizer": "adamw", "steps": 12})
    task = teaching_site.task("train", recipe=recipe, model=init(teaching_site, recipe), processes=2)
    calm = teaching_site.write("calm", task)
    assert worker.run(calm)[-1] == {"event": "done"}
    rough = teaching_site.write("rough", task)
    worker.send(run=str(rough))
    for event in worker.events():
        if event.get("stage") == "training" and event["done"] == 0:
            worker.send(pause=True)
    assert event == {"event": "paused"}
    assert 0 < checkpoint_step(rough) < 12
    assert not peers_of(worker)
    assert worker.run(rough)[-1] == {"event": "done"}
    assert (rough / UPDATE).read_bytes() == (calm / UPDATE).read_bytes()

    full = causal_recipe(**METHODS["full"], local=LOCAL)
    long = teaching_site.write("long", endless(teaching_site, init(teaching_site, full)))
    worker.send(run=str(long))
    for event in worker.events():
        if event.get("done") == 1:
            worker.send(cancel=True)
    assert event == {"event": "cancelled"}
    assert not peers_of(worker)


def test_what_all_processes_meet_is_told_in_one_sentence(teaching_site: Site, worker: Worker) -> None:
    recipe = causal_recipe(**METHODS["full"], local=LOCAL)
    task = teaching_site.task("train", recipe=recipe, model=init(teaching_site, recipe), processes=2)
    (teaching_site.directory / "instructions.jsonl").write_text("{}\n")
    failed = worker.run(teaching_site.write("wrong", task))[-1]
    assert failed["event"] == "failed" and "row 1" in failed["reason"]
    assert not peers_of(worker)
    local = {"steps": 1, "optimizer": "sgd"}
    scaffold = causal_recipe(method={"type": "full"}, local=local, aggregation={"rule": "scaffold"})
    task = teaching_site.task("train", recipe=scaffold, model=init(teaching_site, scaffold), processes=2)
    failed = worker.run(teaching_site.write("scaffold", task))[-1]
    assert failed["event"] == "failed" and "several processes, which have no SCAFFOLD" in failed["reason"]


def test_every_row_counts_once_and_every_process_takes_as_many_steps() -> None:
    for rows in range(1, 9):
        for size in (2, 3):
            for micro_batch_size in (1, 2, 8):
                parts = [
                    Group(rank, size).parts(torch.arange(rows), micro_batch_size=micro_batch_size)
                    for rank in range(size)
                ]
                assert len({len(own) for own in parts}) == 1
                counted = [row for own in parts for part, weight in own if weight for row in part.tolist()]
                assert sorted(counted) == list(range(rows))


@pytest.mark.parametrize("killed", ["the first", "the other"])
def test_no_process_outlives_another(teaching_site: Site, killed: str, request: pytest.FixtureRequest) -> None:
    """Last, because the common worker does not survive it."""
    recipe = causal_recipe(**METHODS["full"], local=LOCAL)
    worker = Worker() if killed == "the first" else request.getfixturevalue("worker")
    worker.send(run=str(teaching_site.write("long", endless(teaching_site, init(teaching_site, recipe)))))
    try:
        assert worker.process.stdout
        while json.loads(worker.process.stdout.readline()).get("done") != 1:
            pass
        (other,) = peers_of(worker)
        victim = psutil.Process(worker.process.pid) if killed == "the first" else other
        victim.send_signal(signal.SIGKILL)
        # Both end, or this waits for ever.
        worker.process.communicate()
        psutil.wait_procs([other])
    finally:
        worker.process.kill()
    assert worker.process.returncode == (-signal.SIGKILL if killed == "the first" else 1)
