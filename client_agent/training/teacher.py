"""The teacher of a distillation: a second model, wholly trained, that stays with the house agent from round to round.

Its state lies among what is kept of the job, one file for each round, beside `teacher-<counted round>`, from which the
task started and a repeated one starts again: nothing is learnt twice. The optimizer begins anew in each round.

On few rows a teacher that is trained round after round learns them by heart, and then teaches the student nonsense with
great confidence. So with `keep_best` the file always holds the best state that was seen, by its loss on the house
agent's validation rows; that one teaches, and what comes after it is thrown away. `Followed` shows both losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from client_agent.taskdir import TaskSpec, sync_directory, until_written
from client_agent.training.files import write_tensors
from client_agent.training.kinds import Kind
from client_agent.training.loading import load_version
from client_agent.training.model import Model, build
from protos import jobspec
from protos.errors import CorruptData, InvalidInput

STATE = "teacher-{round}.safetensors"

# The metrics of a model on the validation rows; empty where there are none.
Measure = Callable[[Model], dict[str, float]]


def spec_of_teacher(spec: jobspec.JobSpec) -> jobspec.JobSpec:
    """The job's spec as if the teacher were its base model and all of it were trained."""
    assert spec.distillation is not None
    if spec.distillation.teacher is None:
        raise InvalidInput("The recipe names no teacher.", hint="Set teacher under [distillation].")
    return spec.model_copy(
        update={
            "base_model": spec.distillation.teacher,
            "method": jobspec.Full(type="full"),
            "local": spec.local.model_copy(update={"compile": False}),
            "aggregation": jobspec.Aggregation(),
        }
    )


def build_teacher(spec: jobspec.JobSpec, *, task: TaskSpec, kind: Kind, device: torch.device) -> Model:
    """As in the job's first round: a new head on the pretrained model. Errors as `build`."""
    if task.teacher_model_path is None:
        raise InvalidInput("The task names no teacher.")
    return build(spec_of_teacher(spec), task=kind, base_model_path=Path(task.teacher_model_path), device=device)


@dataclass
class Teacher:
    """A teacher at work in one round. `model` holds its state; `best` is what was measured of the one that is kept."""

    model: Model
    task: TaskSpec
    spec: jobspec.JobSpec
    keep_best: bool
    measure: Measure
    # Says that the disk is full and takes a moment.
    waits: Callable[[], None]
    warn: Callable[[str], None]
    best: dict[str, float] = field(default_factory=dict, init=False)

    def begin(self) -> dict[str, float]:
        """Goes on from the last round whose distillation counted; what is measured of that state."""
        counted = self._path(self.task.counted_round)
        if counted.exists():
            try:
                self._load(counted)
            except (CorruptData, InvalidInput) as error:
                self.warn(f"The teacher begins anew, because its state cannot be used: {error.message}")
        elif self.task.counted_round:
            self.warn("The teacher begins anew, because its state is no longer here.")
        self.best = self.measure(self.model)
        self._write()
        return self.best

    def look(self) -> None:
        """After an epoch: keeps this state, unless an earlier one was better. Leaves the network ready to train."""
        found = self.measure(self.model)
        self.model.network.train()
        if not self.keep_best or _loss(found) < _loss(self.best):
            self.best = found
            self._write()

    def settle(self) -> None:
        """The state that is kept is the one in `model`."""
        self._load(self._path(self.task.round))

    def _load(self, path: Path) -> None:
        spec = spec_of_teacher(self.spec)
        load_version(self.model, path=path, spec=spec, round_number=self.task.round, site=None)

    def _write(self) -> None:
        path = self._path(self.task.round)
        path.parent.mkdir(parents=True, exist_ok=True)
        until_written(
            lambda: write_tensors(self.model.federated, path=path), waits=self.waits, partial=path.with_suffix(".new")
        )
        sync_directory(path.parent)
        for other in path.parent.glob(STATE.format(round="*")):
            if other not in (path, self._path(self.task.counted_round)):
                other.unlink()

    def _path(self, round_number: int) -> Path:
        return Path(self.task.state_directory, STATE.format(round=round_number))


def _loss(metrics: dict[str, float]) -> float:
    loss = metrics.get("loss", math.inf)
    return loss if math.isfinite(loss) else math.inf
