"""The three kinds of task: version 0 from the job's seed, an update from a version, metrics of a version.

`Warm` keeps what is costly between tasks: the base model with its tokenizer, and tokenised rows. A task swaps only the
federated tensors and makes everything else that it changes anew, so it gives the same bytes warm as cold.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from client_agent.settings import DataSet
from client_agent.taskdir import (
    FILES,
    ROOM_LOOK_SECONDS,
    UPDATE,
    TaskResult,
    TaskSpec,
    until_written,
    wait_for_room,
)
from client_agent.training.checkpoints import Checkpoints
from client_agent.training.classification import TextClassification, Tokens
from client_agent.training.data import Split, fingerprint, read_rows
from client_agent.training.evaluate import evaluate
from client_agent.training.files import write_model_files, write_tensors
from client_agent.training.model import Model, build, load_version, update_norm
from client_agent.training.train import diverged, prepare, step_count, train
from protos import jobspec
from protos.digests import digest_of
from protos.errors import InvalidInput, SiteConfigInvalid

KEPT_MODELS = 1  # a second one would not fit on many a GPU
KEPT_SPLITS = 3  # train, validation and test of one data set

Kept = TypeVar("Kept")


class Report(Protocol):
    """Tells the daemon how far the task is. Raises when the task was cancelled."""

    def __call__(self, stage: str, done: int, total: int, unit: str, metrics: dict[str, float]) -> None: ...


@dataclass
class Warm:
    """What stays in memory between tasks."""

    models: OrderedDict[Hashable, Model] = field(default_factory=OrderedDict)
    splits: OrderedDict[Hashable, Tokens] = field(default_factory=OrderedDict)

    def clear(self) -> None:
        self.models.clear()
        self.splits.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@dataclass
class Work:
    """One task being done: its spec read, its device chosen, and the time kept."""

    task: TaskSpec
    directory: Path
    warm: Warm
    report: Report
    began: float  # time.monotonic() when the task was received
    # Whether the daemon wants the training to save its state and end; and what the site's log should have.
    pausing: Callable[[], bool] = lambda: False
    warn: Callable[[str], None] = lambda sentence: None
    spec: jobspec.JobSpec = field(init=False)
    kind: TextClassification = field(init=False)
    device: torch.device = field(init=False)
    seconds: dict[str, float] = field(default_factory=dict, init=False)
    # Steps of a training: done, and in all.
    _reached: tuple[int, int] = field(default=(0, 0), init=False)

    def __post_init__(self) -> None:
        self.spec = jobspec.parse(self.task.spec)
        if not isinstance(self.spec.task, jobspec.Classification):
            raise InvalidInput(f"This trainer does not know the task {self.spec.task.type!r}.")
        self.kind = TextClassification.of(self.spec.task)
        self.device = choose_device(self.task.device)
        prepare(device=self.device, threads=self.task.threads)

    def run(self) -> TaskResult:
        match self.task.kind:
            case "init":
                return self._init()
            case "train":
                return self._train()
            case "evaluate":
                return self._evaluate()
        raise InvalidInput(f"This trainer does not know tasks of kind {self.task.kind!r}.")

    def wait_for_room(self) -> None:
        """Says that the disk is full, and waits a moment. Raises when the task is to end."""
        self.report("waiting_for_disk", *self._reached, "steps", {})
        time.sleep(ROOM_LOOK_SECONDS)

    def _init(self) -> TaskResult:
        # Never the warm model: its head has been trained.
        self.warm.models.clear()
        model = self._model()
        self._lap("load", since=self.began)
        start = time.monotonic()
        write_tensors(model.federated, path=self.directory / UPDATE)
        write_model_files(model, task=self.kind, directory=self.directory / FILES)
        self._lap("save", since=start)
        return TaskResult(seconds=self.seconds)

    def _train(self) -> TaskResult:
        model, version = self._version()
        tokens = self._tokens(model, "train")
        self._lap("load", since=self.began)
        steps = step_count(self.spec.local, rows=len(tokens))
        learning_rate = self.spec.learning_rate_at(self.task.round)
        here = -1  # steps in this sitting

        def on_step(done: int, total: int, metrics: dict[str, float]) -> None:
            nonlocal here
            here += 1
            self._reached = done, total
            if here == 1:
                self._lap("first_step", since=self.began)
            self.report("training", done, total, "steps", metrics)

        # The update has the tensors of the version. What an earlier sitting left of it would only take its room.
        self._reached = 0, steps
        update = self.directory / UPDATE
        update.unlink(missing_ok=True)
        wait_for_room(update, size_bytes=version.stat().st_size, waits=self.wait_for_room)
        start = time.monotonic()
        loss = train(
            model, tokens=tokens, task=self.kind, local=self.spec.local, steps=steps,
            learning_rate_at=lambda step: learning_rate, seed=self.task.seed, on_step=on_step,
            checkpoints=self._checkpoints(model, tokens),
        )  # fmt: skip
        self._lap("train", since=start)
        start = time.monotonic()
        norm = update_norm(model, path=version)
        if not math.isfinite(norm):
            raise diverged("weights are no longer finite numbers")
        until_written(
            lambda: write_tensors(model.federated, path=update), waits=self.wait_for_room,
            partial=update.with_suffix(".new"),
        )  # fmt: skip
        self._lap("save", since=start)
        metrics = {
            "loss": loss,
            "learning_rate": learning_rate,
            "steps_per_second": here / self.seconds["train"],
            "update_norm": norm,
            "skipped_rows": float(tokens.skipped),
            **self._memory(),
        }
        return TaskResult(examples=len(tokens), steps=steps, metrics=metrics, seconds=self.seconds)

    def _checkpoints(self, model: Model, tokens: Tokens) -> Checkpoints:
        # The rows as the model sees them, so that a file that was only touched costs no training.
        rows = [digest_of(part.numpy().tobytes()) for part in (tokens.ids, tokens.starts, tokens.labels)]
        shapes = [(name, list(tensor.shape)) for name, tensor in model.federated.items()]
        # Another number of threads or another torch adds up in another order: what was begun so is begun anew.
        work = self.task.work_digest(
            rows=rows, tensors=shapes, device=self.device.type, threads=torch.get_num_threads(),
            torch=str(torch.__version__),
        )  # fmt: skip
        return Checkpoints(
            self.directory, work, self.spec.local.checkpoint_seconds, pausing=self.pausing, warn=self.warn
        )

    def _evaluate(self) -> TaskResult:
        if self.task.split not in ("validation", "test"):
            raise InvalidInput(f"There is no split {self.task.split!r} to evaluate on; there are validation and test.")
        model, _ = self._version()
        tokens = self._tokens(model, "test" if self.task.split == "test" else "validation")
        self._lap("load", since=self.began)
        start = time.monotonic()
        metrics = evaluate(
            model, tokens=tokens, task=self.kind, local=self.spec.local,
            on_rows=lambda done, total: self.report("evaluating", done, total, "rows", {}),
        )  # fmt: skip
        self._lap("evaluate", since=start)
        if not math.isfinite(metrics["loss"]):
            raise InvalidInput("The model's loss on these rows is not a finite number.")
        metrics |= {"skipped_rows": float(tokens.skipped), **self._memory()}
        return TaskResult(examples=len(tokens), metrics=metrics, seconds=self.seconds)

    def _version(self) -> tuple[Model, Path]:
        """The model holding the version that the task starts from, and that version's file."""
        if self.task.model_path is None:
            raise InvalidInput(f"A task of kind {self.task.kind!r} needs a model to start from.")
        path = Path(self.task.model_path)
        model = self._model()
        load_version(model, path=path)
        return model, path

    def _model(self) -> Model:
        if self.task.base_model_path is None:
            raise InvalidInput("The task names no base model.")
        base_model_path = Path(self.task.base_model_path)
        layers = self.spec.base_model.layers if self.spec.base_model else None
        key = (self.task.base_digest, base_model_path, layers, self.spec.method, self.kind, str(self.device))
        self.report("loading", 0, 0, "rows", {})
        return _kept(
            self.warm.models, key, limit=KEPT_MODELS,
            make=lambda: build(self.spec, task=self.kind, base_model_path=base_model_path, device=self.device),
        )  # fmt: skip

    def _tokens(self, model: Model, split: Split) -> Tokens:
        if self.task.data_set is None or self.spec.data is None:
            raise SiteConfigInvalid("The task names no data set.")
        data_set, name = DataSet.model_validate(self.task.data_set), self.spec.data.name

        def encode() -> Tokens:
            rows = read_rows(data_set, name=name, labels=self.kind.labels, split=split)
            return self.kind.encode(
                rows, tokenizer=model.tokenizer,
                on_rows=lambda done, total: self.report("loading", done, total, "rows", {}),
            )  # fmt: skip

        key = (fingerprint(data_set, name=name, split=split), self.task.base_digest, self.kind)
        return _kept(self.warm.splits, key, limit=KEPT_SPLITS, make=encode)

    def _memory(self) -> dict[str, float]:
        if self.device.type != "cuda":
            return {}
        return {"gpu_memory_bytes": float(torch.cuda.max_memory_allocated(self.device))}

    def _lap(self, stage: str, *, since: float) -> None:
        self.seconds[stage] = time.monotonic() - since


def choose_device(name: str) -> torch.device:
    """InvalidInput when a GPU is named that is not there."""
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SiteConfigInvalid(
            f"The device {name} is not there ({torch.cuda.device_count()} GPUs are).",
            hint='Set name under [device] in site.toml to "auto" or "cpu".',
        )
    return device


def _kept(store: OrderedDict[Hashable, Kept], key: Hashable, *, limit: int, make: Callable[[], Kept]) -> Kept:
    """What `store` keeps under `key`; made when missing, after the least recently used have gone."""
    if key in store:
        store.move_to_end(key)
    else:
        while len(store) >= limit:
            store.popitem(last=False)
        store[key] = make()
    return store[key]
