from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from client_agent.taskdir import (
    CHECKPOINT,
    RESULT,
    Checkpoint,
    TaskResult,
    TaskSpec,
    checkpoint_step,
    full_disk_waits,
    read_checkpoint,
    read_result,
    remove_checkpoint,
    write_checkpoint,
    write_result,
)
from protos.errors import OutOfSpace

TASK = TaskSpec(
    task_id="t", job_id="j1", round=1, kind="train", spec={}, seed=7, split="", model_path="/home/a/blobs/x",
    base_model_path=None, base_digest="b", data_set=None, device="cpu", threads=1, model_digest="m",
)  # fmt: skip


def save(directory: Path, *, step: int, content: bytes = b"tensors") -> Checkpoint:
    file = f"checkpoint-{step}.safetensors"
    (directory / file).write_bytes(content)
    write_checkpoint(directory, Checkpoint("work", step, {"losses": [0.1]}, file))
    found = read_checkpoint(directory, work="work")
    assert found is not None
    return found


def test_the_newest_checkpoint_is_found_and_older_ones_are_gone(tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path, work="work") is None and checkpoint_step(tmp_path) == 0
    save(tmp_path, step=3)
    assert (save(tmp_path, step=6).state, checkpoint_step(tmp_path)) == ({"losses": [0.1]}, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-6.safetensors", CHECKPOINT]
    remove_checkpoint(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_other_work_is_not_believed(tmp_path: Path) -> None:
    save(tmp_path, step=3)
    assert read_checkpoint(tmp_path, work="other work") is None


@pytest.mark.parametrize("damage", ["tensors", "tensors gone", "torn", "not ours", "step"])
def test_a_damaged_checkpoint_is_not_believed(tmp_path: Path, damage: str) -> None:
    save(tmp_path, step=3)
    path, tensors = tmp_path / CHECKPOINT, tmp_path / "checkpoint-3.safetensors"
    match damage:
        case "tensors":
            tensors.write_bytes(b"tensorz")
        case "tensors gone":
            tensors.unlink()
        case "torn":
            path.write_bytes(path.read_bytes()[:40])
        case "not ours":
            path.write_text("[1, 2]")
        case "step":
            fields = json.loads(path.read_text())
            fields["checkpoint"]["step"] = 4
            path.write_text(json.dumps(fields))
    assert read_checkpoint(tmp_path, work="work") is None


def test_work_is_named_by_what_it_follows_from_and_not_by_who_grants_it_or_where_it_lies() -> None:
    digest = TASK.work_digest(rows="r")
    assert replace(TASK, task_id="u", model_path="/srv/x", threads=8).work_digest(rows="r") == digest
    changes = [{"seed": 8}, {"round": 2}, {"spec": {"a": 1}}, {"base_digest": "c"}, {"model_digest": "n"}]
    others = {replace(TASK, **change).work_digest(rows="r") for change in changes}  # type: ignore[arg-type]
    assert len(others | {digest, TASK.work_digest(rows="s")}) == len(changes) + 2


def test_a_torn_result_is_no_result(tmp_path: Path) -> None:
    write_result(tmp_path, TaskResult(examples=5))
    assert read_result(tmp_path) == TaskResult(examples=5)
    for text in ("", '{"examples"', "[]", "\0\0"):
        (tmp_path / RESULT).write_text(text)
        assert read_result(tmp_path) is None


def test_a_full_disk_is_an_error_that_is_waited_for_and_another_is_not() -> None:
    with pytest.raises(OutOfSpace, match="disk is full"), full_disk_waits(), open("/dev/full", "wb") as full:
        full.write(b"x")
        full.flush()
    with pytest.raises(FileNotFoundError), full_disk_waits():
        Path("/nowhere/x").read_bytes()
