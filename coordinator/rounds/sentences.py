"""The sentences that say what a job waits for, whose turn it is, and until when. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.rounds import cohort as cohorts
from coordinator.rounds.state import Facts, Job, JobState, Round, SiteFact, Task, TaskKind, TaskState, Update


def duration(seconds: float) -> str:
    """For people: 45 s, 12 min, 3 h 05 min."""
    seconds = max(0.0, seconds)
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def work(task: Task) -> str:
    if task.kind is TaskKind.INIT:
        return "making version 0"
    if task.kind is TaskKind.TRAIN:
        return f"training of round {task.round}"
    return f"evaluation of version {task.version}"


def at_rest(job: Job) -> str:
    if job.state is JobState.PAUSED:
        return "paused by the operator; `silotune job resume` goes on where it stopped, and no deadline runs"
    return f"the job has ended: {job.state.value.lower()}"


def status(task: Task, *, connected: bool = True) -> str:
    """What one site is doing: `gard training 61 %`."""
    if task.state is TaskState.QUEUED:
        return f"{task.site} has not taken the task yet" if connected else f"{task.site} is not connected"
    stage = task.stage.lower() or "starting"
    if task.total:
        stage += f" {100 * task.done / task.total:.0f} %"
        if task.unit == "bytes":
            stage += f" ({(task.total - task.done) / 1e6:.1f} MB left)"
    return f"{task.site} {stage}"


def set_aside(facts: Facts) -> str:
    return "set aside: " + "; ".join(f"{name} ({reason})" for name, reason in sorted(facts.set_aside.items()))


def _connected(facts: Facts, name: str) -> bool:
    return any(site.connected for site in facts.sites if site.name == name)


def waits_for_updates(
    job: Job, facts: Facts, round_: Round, waiting: Sequence[Task], accepted: Sequence[Update], now: float
) -> str:
    who = ", ".join(status(task, connected=_connected(facts, task.site)) for task in waiting if task.state.open)
    left = duration(round_.deadline_at - now)
    if round_.number == 0:
        return f"version 0 is being made: {who}; given up in {left}"
    count = f"round {round_.number} waits for {len(waiting)} of {len(round_.cohort)} updates: {who}"
    quorum = job.spec.cohort.quorum
    if len(accepted) >= quorum:
        return f"{count}; closes without them in {left}"
    return f"{count}; ends in {left}, and needs {quorum - len(accepted)} more for its quorum of {quorum}"


def waits_for_sites(job: Job, facts: Facts, round_: Round, now: float) -> str:
    rules = job.spec.cohort
    ready = cohorts.eligible(job, facts)
    connected = [site.name for site in ready if site.connected]
    absent = [site.name for site in ready if not site.connected]
    if rules.sites != "all":
        known = {site.name for site in ready}
        absent += [
            f"{name} (not enrolled)" for name in rules.sites if name not in known and name not in facts.set_aside
        ]
    wanted = len(ready) if rules.size == "all" else rules.size
    text = (
        f"round {round_.number} waits for sites to connect: {len(connected)} of {max(wanted, rules.quorum)} are there"
    )
    if absent:
        text += f", missing {', '.join(absent)}"
    if facts.set_aside:
        text += f"; {set_aside(facts)}; `silotune job readmit` lets them take part again"
    if not ready and rules.sites == "all":
        text += ": no site is enrolled yet, `silotune site invite NAME` invites one"
    gather_left = round_.opened_at + rules.gather_seconds - now
    if len(connected) >= rules.quorum and gather_left > 0:
        return f"{text}; begins without them in {duration(gather_left)}"
    return f"{text}; needs {rules.quorum}, gives up in {duration(round_.deadline_at - now)}"


def waits_for_disk(facts: Facts, round_: Round, needed: int, now: float) -> str:
    have = max(0, facts.spare_bytes or 0)
    return (
        f"round {round_.number} waits for room on the coordinator's disk: it needs {needed / 1e9:.1f} GB and has "
        f"{have / 1e9:.1f} GB above the reserve; the operator can make room within "
        f"{duration(round_.deadline_at - now)}"
    )


def waits_for_initialiser(job: Job, left: Sequence[SiteFact], round_: Round, now: float) -> str:
    who = left[0].name if left else "a house agent or site to enroll"
    return f"version 0 waits for {who} to connect; given up in {duration(round_.deadline_at - now)}"


def waits_for_evaluation(job: Job, pending: Sequence[Task], now: float) -> str:
    who = ", ".join(f"{status(task)} (version {task.version})" for task in pending)
    ends = max(task.queued_at for task in pending) + job.spec.evaluation.deadline_seconds
    return (
        f"all rounds are committed; waits for {len(pending)} evaluations: {who}; until {duration(ends - now)} from now"
    )


def outcomes(tasks: Sequence[Task]) -> str:
    """How tasks ended, for the reason of a failed round."""
    ended = [task for task in tasks if task.state in (TaskState.FAILED, TaskState.DECLINED, TaskState.EXPIRED)]
    return "; ".join(f"{task.site} {task.state.value.lower()}: {task.reason}" for task in ended) or "no update arrived"
