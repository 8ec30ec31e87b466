"""The kinds of task: version 0 from the job's seed, an update from a version, metrics of a version, and a distillation,
which makes a version of an aggregate.

A task swaps only the federated tensors of what is warm (warm.py) and makes everything else that it changes anew, so it
gives the same bytes warm as cold.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from client_agent.settings import DataSet
from client_agent.taskdir import (
    FILES,
    ROOM_LOOK_SECONDS,
    UPDATE,
    Paused,
    TaskResult,
    TaskSpec,
    TooManyEpochs,
    until_written,
    wait_for_room,
)
from client_agent.training.benchmarks import QUESTIONS, ask_all
from client_agent.training.checkpoints import Checkpoints
from client_agent.training.classification import TextClassification
from client_agent.training.data import fingerprint
from client_agent.training.distill import Lesson, distill, write_result
from client_agent.training.drift import read_corrections, with_controls, write_state
from client_agent.training.encoding import is_encoded, source_of, version_file, write_update
from client_agent.training.evaluate import evaluate
from client_agent.training.files import write_model_files, write_tensors
from client_agent.training.kinds import Encoded, Kind, kind_of
from client_agent.training.loading import load_version, update_norm
from client_agent.training.mentor import train_with_mentor
from client_agent.training.model import Model, build
from client_agent.training.parallel import ALONE, Group
from client_agent.training.predicted import Predictions
from client_agent.training.tables import Split
from client_agent.training.teacher import Teacher, build_teacher
from client_agent.training.train import Report, diverged, prepare, train
from client_agent.training.warm import KEPT_MODELS, Warm, kept
from protos import jobspec
from protos.digests import digest_of
from protos.errors import InvalidInput, SiteConfigInvalid


@dataclass
class Work:
    """One task being done: its spec read, its device chosen, and the time kept."""

    task: TaskSpec
    directory: Path
    warm: Warm
    # Tells the daemon how far the task is. Raises when the task was cancelled.
    report: Report
    began: float  # time.monotonic() when the task was received
    # Whether the daemon wants the training to save its state and end; and what the site's log should have.
    pausing: Callable[[], bool] = lambda: False
    warn: Callable[[str], None] = lambda sentence: None
    # The trainers that do this task together, this one among them.
    group: Group = ALONE
    spec: jobspec.JobSpec = field(init=False)
    kind: Kind = field(init=False)
    device: torch.device = field(init=False)
    seconds: dict[str, float] = field(default_factory=dict, init=False)
    # Steps of a training: done, and in all.
    _reached: tuple[int, int] = field(default=(0, 0), init=False)

    def __post_init__(self) -> None:
        self.spec = jobspec.parse(self.task.spec)
        self.kind = kind_of(self.spec)
        self.device = choose_device(self.task.device, place=self.group.rank)
        prepare(device=self.device, threads=self.task.threads, processes=self.group.size)

    def run(self) -> TaskResult:
        match self.task.kind:
            case "init":
                return self._init()
            case "train":
                return self._train()
            case "evaluate":
                return self._evaluate()
            case "distill":
                return self._distill()
        raise InvalidInput(f"This trainer does not know tasks of kind {self.task.kind!r}.")

    def wait_for_room(self) -> None:
        """Says that the disk is full, and waits a moment. Raises when the task is to end."""
        self.report("waiting_for_disk", *self._reached, "steps", {})
        time.sleep(ROOM_LOOK_SECONDS)

    def _init(self) -> TaskResult:
        model = self._initial_model()
        self._lap("load", since=self.began)
        self.warm.fresh_seconds = self.seconds["load"]
        start = time.monotonic()
        write_tensors(with_controls(model.federated, spec=self.spec), path=self.directory / UPDATE)
        write_model_files(model, task=self.kind, directory=self.directory / FILES)
        self._lap("save", since=start)
        return TaskResult(seconds=self.seconds)

    def _train(self) -> TaskResult:
        known = set(self.warm.models)
        model, version = self._version()
        corrections = None
        if self.spec.aggregation.rule == "scaffold":
            corrections = read_corrections(self.task, model=model, version=version)
        tokens = self._tokens(model, "train")
        self._lap("load", since=self.began)
        fresh = not known & set(self.warm.models)
        steps = self.spec.local.step_count(len(tokens))
        self._check_epochs(tokens)
        here = -1  # steps in this sitting
        speed = 0.0

        def on_step(done: int, total: int, metrics: dict[str, float]) -> None:
            nonlocal here, speed
            here += 1
            speed = metrics.get("tokens_per_second", speed)
            self._reached = done, total
            if here == 0:
                self._say_ready(fresh=fresh)
            if here == 1:
                self._lap("first_step", since=self.began)
            self.report("training", done, total, "steps", metrics)

        # The update has the tensors of the version. What an earlier sitting left of it would only take its room.
        self._reached = 0, steps
        update = self.directory / UPDATE
        if self.group.leads:
            update.unlink(missing_ok=True)
            wait_for_room(update, size_bytes=version.stat().st_size, waits=self.wait_for_room)
        start = time.monotonic()
        of_mentor: dict[str, float] = {}
        if self.spec.local.mentor:
            loss, of_mentor = train_with_mentor(
                model, tokens, task=self.task, spec=self.spec, kind=self.kind, mentors=self.warm.mentors,
                tokens_of=partial(self._tokens, model), steps=steps, seed=self._seed(), on_step=on_step,
                report=self.report, pausing=self.pausing, waits=self.wait_for_room, warn=self.warn,
            )  # fmt: skip
        else:
            loss = train(
                model, tokens=tokens, task=self.kind, local=self.spec.local, steps=steps,
                learning_rate_at=lambda step: self.spec.learning_rate_at(self.task.round, part=step / steps),
                seed=self._seed(), on_step=on_step,
                checkpoints=self._checkpoints(model, tokens), corrections=corrections,
            )  # fmt: skip
        self._lap("train", since=start)
        start = time.monotonic()
        model = replace(model, federated=self.group.whole(model.federated))
        if not self.group.leads:
            return TaskResult()
        norm = update_norm(model, path=version)
        if not math.isfinite(norm):
            raise diverged("weights are no longer finite numbers")
        until_written(
            lambda: self._write_update(model, version=version), waits=self.wait_for_room,
            partial=update.with_suffix(".new"),
        )  # fmt: skip
        if corrections:
            rate = self.spec.learning_rate_at(self.task.round)
            save = partial(write_state, self.task, model=model, corrections=corrections, version=version)
            until_written(lambda: save(steps=steps, learning_rate=rate), waits=self.wait_for_room)
        self._lap("save", since=start)
        metrics = {
            "loss": loss,
            "learning_rate": self.spec.learning_rate_at(self.task.round),
            "steps_per_second": here / self.seconds["train"],
            "tokens_per_second": speed,
            "update_norm": norm,
            "skipped_rows": float(tokens.skipped),
            **of_mentor,
            **self._memory(),
        }
        return TaskResult(examples=tokens.examples, steps=steps, metrics=metrics, seconds=self.seconds)

    def _write_update(self, model: Model, *, version: Path) -> None:
        if not is_encoded(self.task):
            return write_tensors(model.federated, path=self.directory / UPDATE)
        tensors = [(name, "F32", tuple(tensor.shape)) for name, tensor in sorted(model.federated.items())]
        values = source_of(model.federated)
        write_update(self.task, values, tensors=tensors, version=version, directory=self.directory)

    def _seed(self) -> int:
        """Of the order of the rows and of dropout: the round's, or for all rounds that of the first."""
        if self.spec.local.data_order == "new":
            return self.task.seed
        return jobspec.task_seed(self.spec.seed, round_number=1, site=self.task.site)

    def _check_epochs(self, tokens: Encoded) -> None:
        """Only here is it known how many sequences the rows are, and how many of them are kept for validation."""
        local, allowed = self.spec.local, self.task.max_epochs
        if local.steps is None or allowed is None:
            return
        epochs = local.steps / math.ceil(len(tokens) / local.batch_size)
        if epochs > max(allowed, 1):
            raise TooManyEpochs(
                f"The policy of this site does not allow it: {local.steps} steps are {epochs:.1f} epochs over its "
                f"{tokens.examples} rows, more than max_epochs = {allowed:g}."
            )

    def _say_ready(self, *, fresh: bool) -> None:
        """For the trainer's log."""
        ready_seconds = time.monotonic() - self.began
        if fresh:
            self.warm.fresh_seconds = ready_seconds
        print(
            f"Round {self.task.round}: ready to train {ready_seconds:.3f} s after the task came; loading afresh "
            f"took {self.warm.fresh_seconds:.3f} s.",
            file=sys.stderr,
        )

    def _checkpoints(self, model: Model, tokens: Encoded) -> Checkpoints:
        # The rows as the model sees them, so that a file that was only touched costs no training.
        rows = [digest_of(part.numpy().tobytes()) for part in tokens.content]
        shapes = [(name, list(tensor.shape)) for name, tensor in model.federated.items()]
        # Another number of threads or another torch adds up in another order: what was begun so is begun anew.
        work = self.task.work_digest(
            rows=rows, tensors=shapes, device=self.device.type, threads=torch.get_num_threads(),
            torch=str(torch.__version__), processes=self.group.size, counted_round=self.task.counted_round,
        )  # fmt: skip
        self.group.check_agree(work)
        return Checkpoints(
            self.directory, work, self.spec.local.checkpoint_seconds, pausing=self.pausing, warn=self.warn
        )

    def _evaluate(self) -> TaskResult:
        if self.task.split not in ("validation", "test"):
            raise InvalidInput(f"There is no split {self.task.split!r} to evaluate on; there are validation and test.")
        split: Split = "test" if self.task.split == "test" else "validation"
        model, _ = self._version()
        tokens = self._tokens(model, split) if self._has_rows(split) else None
        self._lap("load", since=self.began)
        start = time.monotonic()
        metrics, said = dict[str, float](), Predictions(self.task, self.kind, writes=self.group.leads)
        if tokens is not None:
            metrics = evaluate(
                model, tokens=tokens, task=self.kind, local=self.spec.local, on_predicted=said.add,
                on_rows=lambda done, total: self.report("evaluating", done, total, "rows", {}),
            )  # fmt: skip
            until_written(said.write, waits=self.wait_for_room)
            if not math.isfinite(metrics["loss"]):
                raise InvalidInput("The model's loss on these rows is not a finite number.")
            metrics["skipped_rows"] = float(tokens.skipped)
        asked = ask_all(
            model, spec=self.spec, task=self.task, split=split, warn=self.warn,
            on_rows=lambda done, total: self.report("evaluating", done, total, "rows", {}),
            write=lambda write: until_written(write, waits=self.wait_for_room) if self.group.leads else None,
        )  # fmt: skip
        self._lap("evaluate", since=start)
        examples = tokens.examples if tokens is not None else int(sum(asked[name] for name in QUESTIONS & asked.keys()))
        if not examples:
            raise SiteConfigInvalid(f"This site has nothing to measure the model on for {split}.")
        metrics |= {**asked, **self._memory()}
        return TaskResult(examples=examples, metrics=metrics, seconds=self.seconds)

    def _distill(self) -> TaskResult:
        how = self.spec.distillation
        if how is None or not isinstance(self.kind, TextClassification):
            raise InvalidInput("The recipe has no distillation that this trainer knows.")
        if self.group.size > 1:
            raise InvalidInput(
                "A distillation is work for one process.",
                hint="Set processes = 1 under [device] in the house agent's site.toml.",
            )
        student, aggregate = self._version()
        # Without a data set of the job's own, the validation rows are those beside the rows that are learnt from.
        held_out = self._tokens(student, "validation", proxy=self.task.data_set is None)
        rows = self._tokens(student, "train", proxy=True)

        def on_step(done: int, total: int, metrics: dict[str, float]) -> None:
            self._reached = done, total
            if self.pausing():
                raise Paused
            self.report("training", done, total, "steps", metrics)

        lesson = Lesson(
            self.spec, self.task, self.kind, rows, held_out, on_step,
            on_rows=lambda done, total: self.report("evaluating", done, total, "rows", {}),
        )  # fmt: skip
        self._lap("load", since=self.began)
        start = time.monotonic()
        taught = distill(student, aggregate=aggregate, make_teacher=lambda: self._teacher(lesson), lesson=lesson)
        self._lap("train", since=start)
        start = time.monotonic()
        update = self.directory / UPDATE
        until_written(
            lambda: write_result(student, taught=taught, aggregate=aggregate, path=update),
            waits=self.wait_for_room, partial=update.with_suffix(".new"),
        )  # fmt: skip
        self._lap("save", since=start)
        metrics = {**taught.metrics, **self._memory()}
        return TaskResult(examples=rows.examples, steps=taught.steps, metrics=metrics, seconds=self.seconds)

    def _teacher(self, lesson: Lesson) -> Teacher:
        self.report("loading", 0, 0, "rows", {})
        model = build_teacher(self.spec, task=self.task, kind=self.kind, device=self.device)
        return Teacher(model, self.task, self.spec, lesson.how.keep_best, lesson.measure, self.wait_for_room, self.warn)

    def _has_rows(self, split: Split) -> bool:
        """Whether the job's own rows are measured: always, unless they are not here and there are questions to ask."""
        if not self.spec.evaluation.benchmarks:
            return True
        if self.task.data_set is None:
            return False
        data_set = DataSet.model_validate(self.task.data_set)
        return data_set.test is not None if split == "test" else bool(data_set.validation)

    def _write_initial(self, path: Path) -> None:
        write_tensors(self._initial_model().federated, path=path)

    def _version(self) -> tuple[Model, Path]:
        """The model holding the version that the task starts from, and that version's file."""
        if self.task.model_path is None and not self.task.model_digest:
            raise InvalidInput(f"A task of kind {self.task.kind!r} needs a model to start from.")
        path = version_file(self.task, directory=self.directory, make_initial=self._write_initial)
        model = self._model()
        site = self.task.site if self.task.kind == "train" else None
        load_version(model, path=path, spec=self.spec, round_number=self.task.round, site=site)
        return model, path

    def _initial_model(self) -> Model:
        """Never the warm one: its head has been trained. Alone, so it need not fit one of several GPUs."""
        self.warm.models.clear()
        return self._model() if self.task.processes == 1 else self._build(ALONE, torch.device("cpu"))

    def _model(self) -> Model:
        base = self.spec.base_model.model_dump_json() if self.spec.base_model else None
        # The rule decides what stands between the factors, precision what quantised weights are multiplied in.
        method = (self.spec.method.model_dump_json(), self.spec.aggregation.rule)
        local = (self.spec.local.precision, self.spec.local.compile)
        place = (self.task.base_digest, self.task.base_model_path)
        key = (place, base, method, local, self.kind, str(self.device), self.group.size)
        self.report("loading", 0, 0, "rows", {})
        models = self.warm.models
        make = partial(self._build, self.group, self.device)
        return kept(models, key, is_full=lambda: len(models) >= KEPT_MODELS, make=make)

    def _build(self, group: Group, device: torch.device) -> Model:
        if self.task.base_model_path is None:
            raise InvalidInput("The task names no base model.")
        path = Path(self.task.base_model_path)
        self.warm.mentors.clear()
        with group.in_turn():
            return build(self.spec, task=self.kind, base_model_path=path, device=device, group=group)

    def _tokens(self, model: Model, split: Split, *, proxy: bool = False) -> Encoded:
        """The rows of the job's data set, or with `proxy` of the one that a distillation learns from."""
        fields, name = self.task.data_set, self.spec.data.name if self.spec.data else ""
        if proxy:
            fields, name = self.task.proxy_data_set, self.spec.proxy_data
        if fields is None or not name:
            raise SiteConfigInvalid("The task names no data set.")
        data_set, how = DataSet.model_validate(fields), self.spec.distillation
        has_labels = not proxy or split != "train" or how is None or how.labels

        def encode() -> Encoded:
            read = self.kind.read
            if isinstance(self.kind, TextClassification) and not has_labels:
                read = self.kind.read_texts
            rows = read(data_set, name=name, split=split)
            return self.kind.encode(
                rows, tokenizer=model.tokenizer,
                on_rows=lambda done, total: self.report("loading", done, total, "rows", {}),
            )  # fmt: skip

        key = (fingerprint(data_set, name=name, split=split), self.task.base_digest, self.kind, has_labels)
        return kept(self.warm.splits, key, is_full=self.warm.has_enough_splits, make=encode)

    def _memory(self) -> dict[str, float]:
        if self.device.type != "cuda":
            return {}
        return {"gpu_memory_bytes": float(torch.cuda.max_memory_allocated(self.device))}

    def _lap(self, stage: str, *, since: float) -> None:
        self.seconds[stage] = time.monotonic() - since


def choose_device(name: str, *, place: int = 0) -> torch.device:
    """The one of this name, or that many places behind it. SiteConfigInvalid when there is no such GPU."""
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        device = torch.device("cuda", (device.index or 0) + place)
        if device.index >= torch.cuda.device_count():
            raise SiteConfigInvalid(
                f"The device {device} is not there ({torch.cuda.device_count()} GPUs are).",
                hint='Set name under [device] in site.toml to "auto" or "cpu", or processes to the number of GPUs.',
            )
    return device
