"""The judge's formulas are those of the parts that it judges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from client_agent import synthetic
from client_agent.taskdir import UPDATE, TaskSpec
from protos import jobspec
from protos.digests import digest_of
from protos.jobspec import task_seed
from tests.chaos import checker
from tests.chaos.recompute import recompute
from tests.chaos.scenario import HOUSE, OPTIMIZERS
from tests.chaos.test_checker import CALM, versions


def test_the_formula_of_the_judge_is_that_of_the_synthetic_trainer(tmp_path: Path) -> None:
    """The judge's own arithmetic and the trainer's agree bit for bit, or it would judge by another rule."""

    class Control:
        def __getattr__(self, _name: str):  # type: ignore[no-untyped-def]
            return lambda *_: None

    spec = jobspec.parse({**CALM.recipe, "task": {**CALM.recipe["task"], "train_seconds": 0}})
    work = {
        "task_id": "t", "job_id": "j", "spec": spec.model_dump(mode="json"), "split": "", "base_model_path": None,
        "base_digest": "", "data_set": None, "device": "cpu", "threads": 1,
    }  # fmt: skip
    first, second, third, scratch = (tmp_path / name for name in ("init", "train", "distill", "scratch"))
    for directory in (first, second, third, scratch):
        directory.mkdir()
    made = recompute(CALM.recipe, versions(weights={})[:2], scratch=scratch)
    synthetic.init(TaskSpec(round=0, kind="init", seed=1, model_path=None, **work), first, Control())  # type: ignore[arg-type]
    head = first / UPDATE
    assert digest_of(head.read_bytes()) == made[0].digest
    seed = task_seed(spec.seed, round_number=1, site="alfa")
    task = TaskSpec(round=1, kind="train", seed=seed, model_path=str(head), **work)  # type: ignore[arg-type]
    result = synthetic.train(task, second, Control())  # type: ignore[arg-type]
    assert digest_of((second / UPDATE).read_bytes()) == made[1].updates["alfa"]
    assert result.examples == made[1].examples["alfa"]

    # And of what a house agent makes of version 1.
    distilled = replace(CALM, distills=True).recipe
    must = recompute(distilled, versions(weights={})[:2], scratch=scratch)[1]
    left = recompute(distilled, versions(weights={})[:2], scratch=scratch, undistilled=[1])[1]
    assert left.digest == made[1].digest != must.digest
    seed = task_seed(spec.seed, round_number=1, site=HOUSE)
    # Where `recompute` has left it.
    model = str(scratch / "version-1")
    task = TaskSpec(round=1, kind="distill", seed=seed, model_path=model, state_directory=str(third), **work)  # type: ignore[arg-type]
    synthetic.distill(task, third, Control())  # type: ignore[arg-type]
    assert digest_of((third / UPDATE).read_bytes()) == must.digest


def test_each_server_optimizer_agrees_with_plain_arithmetic(tmp_path: Path) -> None:
    for number, optimizer in enumerate(OPTIMIZERS):
        scratch = tmp_path / str(number)
        scratch.mkdir()
        scenario = replace(CALM, optimizer=optimizer)
        found = recompute(scenario.recipe, versions(weights={}), scratch=scratch)
        assert all(one.off_by < checker.REFERENCE_TOLERANCE for one in found.values()), optimizer
