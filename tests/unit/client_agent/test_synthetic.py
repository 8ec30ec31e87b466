from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client_agent import synthetic
from client_agent.taskdir import (
    RESULT,
    UPDATE,
    Checkpoint,
    TaskSpec,
    checkpoint_step,
    read_result,
    read_spec,
    write_checkpoint,
    write_spec,
)
from protos.tensors import Layout, make_header, parse_header
from tests.unit.client_agent.work_to_do import model_bytes, spec


def run(
    directory: Path, *, model: bytes | None = None, kind: str = "train", pause: bool = False, **changes: Any
) -> list[dict[str, Any]]:
    """The events of the trainer, run as a process, for one task; `pause` sends the command after the first."""
    model_path = directory / "model"
    if model is not None:
        model_path.write_bytes(model)
    fields: dict[str, Any] = {
        "task_id": "t",
        "job_id": "j1",
        "round": 1,
        "kind": kind,
        "spec": spec(payload_mb=6).model_dump(mode="json"),
        "seed": 7,
        "split": "",
        "model_path": str(model_path) if model is not None else None,
        "base_model_path": None,
        "base_digest": "",
        "data_set": None,
        "device": "cpu",
        "threads": 1,
    }
    write_spec(directory, TaskSpec(**{**fields, **changes}))
    events = []
    command = [sys.executable, "-m", "client_agent.synthetic"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        print(json.dumps({"run": str(directory)}), file=process.stdin, flush=True)
        while not events or events[-1]["event"] == "progress":
            events.append(json.loads(process.stdout.readline()))
            if pause and len(events) == 1:
                print(json.dumps({"pause": True}), file=process.stdin, flush=True)
        process.stdin.close()
    assert process.returncode == 0
    return events


def tensors(path: Path) -> tuple[Layout, np.ndarray]:
    content = path.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    layout = parse_header(content[:length], file_bytes=len(content))
    return layout, np.frombuffer(content[length:], dtype=np.float32)


@pytest.mark.parametrize("payload_bytes", [100, 10_000, 1_000_000, 100_000_000, 2_300_000_000])
def test_the_tensors_have_the_size_that_was_asked_for(payload_bytes: int) -> None:
    shapes = synthetic.tensor_shapes(payload_bytes)
    total = sum(4 * int(np.prod(shape)) for _, _, shape in shapes)
    assert total == pytest.approx(payload_bytes, abs=4 * shapes[-1][2][1])
    assert len(shapes) > 5 or payload_bytes < 1_000_000


def test_version_0_depends_on_the_seed_of_the_job_alone(tmp_path: Path) -> None:
    assert run(tmp_path, kind="init", seed=1)[-1] == {"event": "done"}
    first = (tmp_path / UPDATE).read_bytes()
    run(tmp_path, kind="init", seed=2)
    assert (tmp_path / UPDATE).read_bytes() == first
    other = spec(payload_mb=6, seed=1).model_dump(mode="json")
    run(tmp_path, kind="init", spec=other)
    assert (tmp_path / UPDATE).read_bytes() != first
    _, values = tensors(tmp_path / UPDATE)
    assert values.nbytes == pytest.approx(6e6, rel=0.01)
    assert 0.015 < values.std() < 0.025


def test_training_adds_the_same_small_noise_for_the_same_seed(tmp_path: Path) -> None:
    model = model_bytes(6)
    assert run(tmp_path, model=model)[-1] == {"event": "done"}
    first = (tmp_path / UPDATE).read_bytes()
    before, _ = tensors(tmp_path / "model")
    layout, values = tensors(tmp_path / UPDATE)
    assert layout == before
    block = np.random.default_rng(7).standard_normal(synthetic.BLOCK_VALUES, dtype=np.float32) * np.float32(1e-3)
    expected = np.float32(0.5) + np.resize(block, values.size)
    assert np.array_equal(values, expected)
    run(tmp_path, model=model)
    assert (tmp_path / UPDATE).read_bytes() == first
    run(tmp_path, model=model, seed=8)
    assert (tmp_path / UPDATE).read_bytes() != first


def test_the_result_names_rows_steps_and_seconds(tmp_path: Path) -> None:
    events = run(tmp_path, model=model_bytes(), spec=spec(train_seconds=0.1).model_dump(mode="json"))
    result = read_result(tmp_path)
    assert (result.examples, result.steps) == (107, 4)
    assert result.seconds["train"] >= 0.1
    assert set(result.seconds) == {"train", "save", "load"}
    assert {"event": "progress", "stage": "training", "done": 4, "total": 4, "unit": "steps", "metrics": {}} in events


def test_evaluation_measures_the_first_values_and_leaves_no_tensors(tmp_path: Path) -> None:
    run(tmp_path, model=model_bytes(), kind="evaluate")
    assert read_result(tmp_path).metrics == {"accuracy": 0.8, "loss": 0.25}
    assert not (tmp_path / UPDATE).exists()


def test_a_bad_model_is_a_failure_with_a_reason_and_no_result(tmp_path: Path) -> None:
    events = run(tmp_path, model=b"x" * 100)
    assert events[-1]["event"] == "failed"
    assert "header" in events[-1]["reason"]
    assert not (tmp_path / RESULT).exists()


def test_a_paused_training_goes_on_after_the_time_that_has_passed(tmp_path: Path) -> None:
    long = spec(train_seconds=600).model_dump(mode="json")
    long["local"]["steps"] = 600_000
    assert run(tmp_path, model=model_bytes(), spec=long, pause=True)[-1] == {"event": "paused"}
    reached = checkpoint_step(tmp_path)
    assert 0 < reached < 600_000
    events = run(tmp_path, model=model_bytes(), spec=long, pause=True)
    assert events[-1] == {"event": "paused"}
    assert reached == events[0]["done"] and checkpoint_step(tmp_path) > reached
    # As if all but a moment of the training had passed.
    nearly = Checkpoint(read_spec(tmp_path).work_digest(), 599_990, {"seconds": 599.99})
    write_checkpoint(tmp_path, nearly)
    events = run(tmp_path, model=model_bytes(), spec=long)
    assert events[0]["done"] == 599_990 and events[-1] == {"event": "done"}
    assert read_result(tmp_path).steps == 600_000
    rough = (tmp_path / UPDATE).read_bytes()
    run(tmp_path, model=model_bytes())
    assert (tmp_path / UPDATE).read_bytes() == rough


def test_a_held_training_begins_and_does_not_go_on(tmp_path: Path) -> None:
    directory, held = tmp_path / "j1-1-train", tmp_path / "hold-1"
    directory.mkdir()
    held.touch()
    events = run(directory, model=model_bytes(), pause=True)
    assert [(event["event"], event.get("stage"), event.get("done")) for event in events] == [
        ("progress", "training", 0),
        ("paused", None, None),
    ]
    held.unlink()
    assert run(directory, model=model_bytes())[-1] == {"event": "done"}


def test_a_training_whose_update_has_no_room_does_not_begin(tmp_path: Path) -> None:
    header, layout = make_header([("weight", "F32", (shutil.disk_usage(tmp_path).total // 4,))])
    with (tmp_path / "model").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + layout.data_bytes)  # as large as the disk, but takes no room itself
    events = run(tmp_path, pause=True, model_path=str(tmp_path / "model"))
    assert {event.get("stage") for event in events[:-1]} == {"waiting_for_disk"}
    assert events[-1] == {"event": "paused"}


def test_checkpoints_are_saved_as_often_as_the_recipe_says(tmp_path: Path) -> None:
    often = spec(train_seconds=1.2, local={"steps": 4, "checkpoint_seconds": 0.1}).model_dump(mode="json")
    run(tmp_path, model=model_bytes(), spec=often)
    assert checkpoint_step(tmp_path) > 0


def test_the_end_of_input_ends_the_trainer_in_mid_task(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(model_bytes())
    run(tmp_path, model=model_bytes())
    fields = json.loads((tmp_path / "spec.json").read_text())
    fields["spec"]["task"]["train_seconds"] = 600
    (tmp_path / "spec.json").write_text(json.dumps(fields))
    command = [sys.executable, "-m", "client_agent.synthetic"]
    told = json.dumps({"run": str(tmp_path)}) + "\n"
    ended = subprocess.run(command, input=told, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(ended.stdout.splitlines()[-1]) == {"event": "cancelled"}
