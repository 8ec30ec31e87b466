"""A job as a picture: where it stands, who is at what, how the rounds went, how long it will take.

`picture` draws one answer of the coordinator and asks nothing; `watch` asks once a second and draws. The job does not
depend on being watched: the watcher may come and go, and so may the coordinator under its eyes.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from contextlib import nullcontext

from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from coordinator import benchmarks
from coordinator.client import OperatorClient, facts, word
from coordinator.terminal import Output, duration, size, table
from protos import jobspec
from protos.errors import RecipeInvalid, Unavailable
from protos.v1 import agent_pb2, operator_pb2
from protos.v1.operator_pb2 import GetJobResponse, RoundView, TaskView

POLL_SECONDS = 1.0
POLL_TIMEOUT_SECONDS = 5.0
# Rounds in the live picture; the rest would push the sites out of the window.
LAST_ROUNDS = 12
ENDED = {operator_pb2.JOB_STATE_COMPLETED: 0, operator_pb2.JOB_STATE_FAILED: 1, operator_pb2.JOB_STATE_CANCELLED: 1}
_OPEN = (operator_pb2.TASK_STATE_QUEUED, operator_pb2.TASK_STATE_LEASED, operator_pb2.TASK_STATE_RUNNING)
_FAILED = (operator_pb2.TASK_STATE_FAILED, operator_pb2.TASK_STATE_DECLINED, operator_pb2.TASK_STATE_EXPIRED)
_CURVE = "▁▂▃▄▅▆▇█"


def watch(client: OperatorClient, *, job: str, output: Output) -> int:
    """Shows the job until it ends; 0 when it completed, 1 when it failed or was cancelled.

    Without a terminal each change of the job's sentence is one line. NotFound, and Unavailable before the first
    answer; later the coordinator is waited for.
    """
    request = operator_pb2.GetJobRequest(job=job)
    state: GetJobResponse = client.ask("GetJob", request, timeout_seconds=POLL_TIMEOUT_SECONDS)
    house = house_agents(client)
    trouble, said = "", ""
    with Live(console=output.console, auto_refresh=False) if output.is_live else nullcontext() as live:
        while True:
            ended = ENDED.get(state.job.state)
            sentence = line(state, trouble=trouble)
            if live:
                live.update(picture(state, house=house, trouble=trouble, last_rounds=LAST_ROUNDS), refresh=True)
            elif sentence != said:
                output.answer({**facts(state.job), "trouble": trouble}, text=sentence, exit_code=ended or 0)
            said = sentence
            if ended is not None:
                return ended
            time.sleep(POLL_SECONDS)
            try:
                state = client.ask("GetJob", request, timeout_seconds=POLL_TIMEOUT_SECONDS)
                trouble = ""
            except Unavailable as error:
                trouble = f"{error.message} The watch goes on, and so will the job when it is back."


def house_agents(client: OperatorClient) -> set[str]:
    sites: operator_pb2.ListSitesResponse = client.ask("ListSites", operator_pb2.ListSitesRequest())
    return {site.name for site in sites.sites if site.house}


def line(state: GetJobResponse, *, trouble: str = "") -> str:
    """Where the job stands, in one line."""
    job = state.job
    return f"{name_of(operator_pb2.JobState, job.state)}, round {job.round} of {job.rounds}: {trouble or job.sentence}"


def picture(
    state: GetJobResponse, *, house: Collection[str], trouble: str = "", last_rounds: int | None = None
) -> RenderableType:
    """The whole job: head line, sites at work, curve of the key metric, rounds that are done."""
    parts: list[RenderableType] = [_head(state), Text(trouble or state.job.sentence, style="yellow" if trouble else "")]
    working = [task for task in state.tasks if task.state in _OPEN]
    if working:
        parts += [Text(), _sites(working)]
    metric, by_version = scores(state, house=house)
    if by_version:
        parts += [Text(), _curve(metric, by_version, best=_best(state))]
    done = [found for found in state.rounds if found.phase == operator_pb2.ROUND_PHASE_COMMITTED]
    if done:
        shown = done[-last_rounds:] if last_rounds else done
        parts += [Text(), _rounds(shown, metric=metric, by_version=by_version, best=_best(state))]
    return Group(*parts)


def scores(state: GetJobResponse, *, house: Collection[str]) -> tuple[str, dict[int, float]]:
    """The key metric, and its value on validation data by version.

    As the coordinator picks the best round: the house agent's value where it evaluates, else the mean of the sites
    weighted by rows.
    """
    evaluation = _evaluation(state)
    if evaluation is None:
        return "", {}
    metric = evaluation.metric
    found = [view for view in state.evaluations if view.split == "validation" and metric in view.metrics]
    if "house" in evaluation.where and house:
        found = [view for view in found if view.site in house]
    by_version: dict[int, float] = {}
    for version in sorted({view.version for view in found}):
        views = [view for view in found if view.version == version]
        rows = sum(view.examples for view in views)
        if rows:
            by_version[version] = sum(view.metrics[metric] * view.examples for view in views) / rows
    return metric, by_version


def waiting_lines(tasks: Sequence[TaskView]) -> list[str]:
    """A short line for each piece of work that is not done: who, what, how far."""
    return [
        f"{task.site}: {_work(task)}, {_stage(task)}{_percent(task)}{_left(task)}"
        for task in tasks
        if task.state in _OPEN
    ]


def failed_lines(tasks: Sequence[TaskView]) -> list[str]:
    """A line for each piece of work that did not succeed: who, what, how it ended, why."""
    return [
        f"{task.site}: {_work(task)}, {name_of(operator_pb2.TaskState, task.state).lower()}: {task.reason}"
        for task in tasks
        if task.state in _FAILED
    ]


def details(state: GetJobResponse, *, house: Collection[str]) -> list[RenderableType]:
    """What the picture leaves out: each update that did not count with its reason, every evaluation, and what the
    answers to questions say of the best version."""
    refused = table("round", "site", "fate", "reason", title="Updates that did not count", right=("round",))
    for found in state.rounds:
        for update in found.updates:
            if update.fate in (agent_pb2.FATE_REJECTED, agent_pb2.FATE_DISCARDED):
                fate = name_of(agent_pb2.Fate, update.fate).lower()
                refused.add_row(str(found.number), update.site, fate, update.reason)
    measured = table("version", "site", "split", "rows", "metrics", title="Evaluations", right=("version", "rows"))
    for view in state.evaluations:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in sorted(view.metrics.items()))
        measured.add_row(str(view.version), view.site, view.split, str(view.examples), numbers)
    extras: list[RenderableType] = [extra for extra in (refused, measured) if extra.row_count]
    if evaluation := _evaluation(state):
        said = benchmarks.lines(state.evaluations, evaluation=evaluation, version=_best(state), house=house)
        extras += [Text("\n".join(said))] if said else []
    return [Group(Text(), extra) for extra in extras]


def name_of(enum: EnumTypeWrapper, value: int) -> str:
    return word(enum.DESCRIPTOR, value)


def _evaluation(state: GetJobResponse) -> jobspec.Evaluation | None:
    """None of a recipe of another version of silotune: everything but its scores can still be shown."""
    try:
        return jobspec.from_json(state.spec_json).evaluation
    except RecipeInvalid:
        return None


def _best(state: GetJobResponse) -> int | None:
    return state.job.best_version if state.job.HasField("best_version") else None


def _head(state: GetJobResponse) -> Text:
    job = state.job
    style = {operator_pb2.JOB_STATE_COMPLETED: "bold green", operator_pb2.JOB_STATE_FAILED: "bold red"}
    head = Text.assemble((job.name, "bold"), f" ({job.id})  ")
    head.append(name_of(operator_pb2.JobState, job.state), style=style.get(job.state, "bold cyan"))
    head.append(f"  round {job.round} of {job.rounds}  {duration(job.service_seconds)} so far")
    if job.HasField("eta_seconds") and job.state not in ENDED:
        head.append(f", about {duration(job.eta_seconds)} to go")
    return head


def _sites(tasks: Sequence[TaskView]) -> Table:
    sites = table("site", "work", "stage", "progress", "", "loss", right=("loss",))
    for task in tasks:
        done, total, unit = task.progress.done, task.progress.total, task.progress.unit
        bar = ProgressBar(total=total, completed=done, width=20) if total else Text("")
        count = f"{size(done)} of {size(total)}" if unit == "bytes" else f"{done} of {total} {unit}"
        loss = task.progress.metrics.get("loss")
        sites.add_row(
            task.site,
            _work(task),
            _stage(task),
            bar,
            f"{_percent(task).strip()}  {count}" if total else task.reason,
            "" if loss is None else f"{loss:.3f}",
        )
    return sites


def _work(task: TaskView) -> str:
    if task.kind == agent_pb2.TASK_KIND_INIT:
        return "makes version 0"
    if task.kind == agent_pb2.TASK_KIND_EVALUATE:
        return f"evaluates version {task.round}"
    if task.kind == agent_pb2.TASK_KIND_DISTILL:
        return f"distils round {task.round}"
    return f"trains round {task.round}"


def _stage(task: TaskView) -> str:
    stage = name_of(agent_pb2.Stage, task.progress.stage).lower().replace("_", " ")
    if task.state == operator_pb2.TASK_STATE_QUEUED:
        # Progress was told by a grant whose lease ran out.
        return f"silent, was {stage}" if stage else "has not taken it yet"
    return stage or "starting"


def _left(task: TaskView) -> str:
    left = task.progress.total - task.progress.done
    return f", {size(left)} left" if task.progress.unit == "bytes" and left > 0 else ""


def _percent(task: TaskView) -> str:
    return f" {100 * task.progress.done / task.progress.total:.0f} %" if task.progress.total else ""


def _curve(metric: str, by_version: dict[int, float], *, best: int | None) -> Text:
    values = list(by_version.values())
    low, high = min(values), max(values)
    # A hundredth of the value is no rise and no fall.
    span = max(high - low, abs(high) / 100) or 1.0
    bars = "".join(_CURVE[round((value - low) / span * (len(_CURVE) - 1))] for value in values)
    text = Text.assemble((metric, "bold"), "  ", (bars, "cyan"), f"  {values[0]:.3f} to {values[-1]:.3f}")
    if best in by_version:
        text.append(f", best {by_version[best]:.3f} in version {best}")
    return text


def _rounds(rounds: Sequence[RoundView], *, metric: str, by_version: dict[int, float], best: int | None) -> Table:
    numbers = ("round", metric, "train loss", "seconds", "up", "down")
    shown = table("round", metric, "train loss", "updates", "seconds", "up", "down", right=numbers)
    for found in rounds:
        score, loss = by_version.get(found.number), _train_loss(found)
        shown.add_row(
            str(found.number),
            "" if score is None else f"{score:.3f}",
            "" if loss is None else f"{loss:.3f}",
            _fates(found),
            f"{found.seconds['total']:.1f}" if "total" in found.seconds else "",
            size(found.bytes_up),
            size(found.bytes_down),
            style="bold" if found.number == best else "",
        )
    return shown


def _train_loss(found: RoundView) -> float | None:
    """Mean over the accepted updates, weighted by their rows."""
    told = [view for view in found.updates if view.fate == agent_pb2.FATE_ACCEPTED and "loss" in view.metrics]
    rows = sum(view.examples for view in told)
    return sum(view.metrics["loss"] * view.examples for view in told) / rows if rows else None


def _fates(found: RoundView) -> str:
    if found.number == 0:
        return f"made by {', '.join(found.cohort)}"
    fates = [view.fate for view in found.updates]
    text = f"{fates.count(agent_pb2.FATE_ACCEPTED)} of {len(found.cohort)}"
    for fate in (agent_pb2.FATE_REJECTED, agent_pb2.FATE_DISCARDED):
        if fate in fates:
            text += f", {fates.count(fate)} {name_of(agent_pb2.Fate, fate).lower()}"
    if found.undistilled:
        text += f"; not distilled: {found.undistilled}"
    return text
