"""The sentences that say what a job waits for, whose turn it is, until when, and what happens then. Pure.

Times are the job's seconds of service, so "40 s ago" leaves out what the coordinator was down or the job paused.
"""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.rounds import cohort as cohorts
from coordinator.rounds.state import Command, Facts, Job, JobState, Round, SiteFact, Task, TaskKind, TaskState, Update
from protos.update_figures import COEFFICIENT, COSINE, NORM_Z, OUTLYING_Z, by_site

# A site that works and shows no progress for this long is said to stand still.
QUIET_SECONDS = 30.0
# Half of the sites are a little longer than the median; who counts less than this of its weight is named.
NOTABLY_CLIPPED = 0.5


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
    if task.kind is TaskKind.DISTILL:
        return f"distillation of round {task.round}"
    return f"evaluation of version {task.version}"


def at_rest(job: Job) -> str:
    if job.state is JobState.PAUSED:
        return paused(job.id)
    return f"the job has ended: {job.state.value.lower()}"


def paused(job_id: str) -> str:
    return f"paused by the operator: no deadline runs, and `silotune job resume {job_id}` goes on where it stopped"


def failed(job: Job, facts: Facts, reason: str) -> str:
    """Why a job failed, and the commands that go on with it."""
    round_ = facts.round
    assert round_ is not None
    what = "tries version 0 again" if round_.number == 0 else f"tries round {round_.number} again"
    kept = len(cohorts.accepted(facts))
    if kept:
        what += f" and keeps the {kept} updates that have come" if kept > 1 else " and keeps the update that has come"
    return (
        f"{reason.rstrip('.')}. Mend the cause, then `silotune job resume {job.id}` {what}; "
        f"`silotune job readmit {job.id}` first lets the sites that were set aside take part again"
    )


# --- one site


def status(task: Task, *, now: float, connected: bool = True) -> str:
    """What one site is doing, or why it is not: `gard training 61 % (39 steps left)`."""
    if task.state is TaskState.QUEUED:
        return f"{task.site} {_not_at_it(task, now=now, connected=connected)}"
    text = f"{task.site} {_doing(task)}"
    quiet = now - task.last_progress_at
    if quiet >= QUIET_SECONDS:
        text += f" for {duration(quiet)}" if task.stage in _WAITING else f", no progress for {duration(quiet)}"
    return text if connected else f"{text}, not connected now"


def _not_at_it(task: Task, *, now: float, connected: bool) -> str:
    if task.lease_until:
        # The task was taken, and whoever took it was not heard of until its lease ran out.
        silent = "is connected but silent about its task" if connected else "is silent"
        was = f", was {_doing(task)}" if task.stage else ""
        return f"{silent}: its lease ran out {duration(now - task.lease_until)} ago{was}"
    if not connected:
        return "is not connected"
    what = f"its second try after it failed ({task.reason})" if task.failures else "the task"
    return f"has not taken {what} yet, offered {duration(now - task.queued_at)} ago"


# Stages in which a site waits for people, for hours of the day or for its disk, and is not expected to move.
_WAITING = {
    "APPROVING": "waits for its administrator to approve the job (`silotune-agent approvals` there)",
    "PAUSED": "is paused by its administrator or outside its hours",
    "WAITING_FOR_DISK": "waits for room on its disk",
}


def _doing(task: Task) -> str:
    stage = _WAITING.get(task.stage) or task.stage.lower()
    if not stage:
        return "has the task and is about to begin"
    if stage == "loading":
        return "loading the model"
    if not task.total or task.stage == "WAITING_FOR_DISK":
        return stage
    left = task.total - task.done
    stage += f" {100 * task.done / task.total:.0f} %"
    if task.unit == "bytes":
        return f"{stage} ({left / 1e6:.1f} MB left)"
    return f"{stage} ({left} {task.unit} left)" if task.unit else stage


def _statuses(facts: Facts, tasks: Sequence[Task], *, now: float) -> str:
    here = {site.name for site in facts.sites if site.connected}
    return ", ".join(status(task, now=now, connected=task.site in here) for task in tasks)


def set_aside(facts: Facts) -> str:
    return "set aside: " + "; ".join(f"{name} ({reason})" for name, reason in sorted(facts.set_aside.items()))


def readmits(job: Job) -> str:
    return f"`silotune job readmit {job.id}` lets them take part again"


def outcomes(tasks: Sequence[Task]) -> str:
    """How tasks ended, for the reason of a failed round."""
    ended = [task for task in tasks if task.state in (TaskState.FAILED, TaskState.DECLINED, TaskState.EXPIRED)]
    return "; ".join(f"{task.site} {task.state.value.lower()}: {task.reason}" for task in ended) or "no update arrived"


# --- a round


def then(job: Job, round_: Round) -> str:
    """What happens to a round that ends below its quorum."""
    attempts = job.spec.cohort.retries + 1
    if round_.attempt < attempts:
        return f"then attempt {round_.attempt + 1} of {attempts} begins"
    return "then the job fails, because no attempts are left"


def waits_for_sites(job: Job, facts: Facts, round_: Round, now: float) -> str:
    rules = job.spec.cohort
    ready = cohorts.eligible(job, facts)
    connected = [site.name for site in ready if site.connected]
    away = [site.name for site in ready if not site.connected]
    if rules.sites != "all":
        known = {site.name for site in ready}
        away += [f"{name} (not enrolled)" for name in rules.sites if name not in known and name not in facts.set_aside]
    wanted = len(ready) if rules.size == "all" else rules.size
    text = (
        f"round {round_.number} waits for sites to connect: {len(connected)} of {max(wanted, rules.quorum)} are there"
    )
    if away:
        text += f", missing {', '.join(away)}"
    if facts.set_aside:
        text += f"; {set_aside(facts)}; {readmits(job)}"
    if not ready and rules.sites == "all":
        text += ": no site is enrolled yet, `silotune site invite NAME` invites one"
    patience_left = round_.opened_at + cohorts.patience_seconds(job) - now
    if len({*connected, *cohorts.accepted(facts)}) >= rules.quorum and patience_left > 0:
        return f"{text}; begins without them in {duration(patience_left)}"
    return f"{text}; needs {rules.quorum}, gives up in {duration(round_.deadline_at - now)}, {then(job, round_)}"


def begins(facts: Facts, round_: Round, cohort: Sequence[str], *, left_out: Sequence[SiteFact]) -> str:
    text = f"round {round_.number} begins with {', '.join(cohort)}"
    names = [site.name for site in left_out if site.name not in cohort and not site.connected]
    gone = f", without {', '.join(names)}, not connected" if names else ""
    return f"{text}{gone}; {set_aside(facts)}" if facts.set_aside else f"{text}{gone}"


def no_room(facts: Facts, needed: int) -> str:
    have = max(0, facts.spare_bytes or 0)
    return f"it needs {needed / 1e6:,.0f} MB and has {have / 1e6:,.0f} MB above the reserve"


def waits_for_disk(job: Job, facts: Facts, round_: Round, needed: int, now: float) -> str:
    return (
        f"round {round_.number} waits for room on the coordinator's disk: {no_room(facts, needed)}; the operator can "
        f"make room within {duration(round_.deadline_at - now)}, {then(job, round_)}"
    )


def waits_for_initialiser(job: Job, left: Sequence[SiteFact], round_: Round, now: float) -> str:
    text = f"version 0 waits for {f'{left[0].name} to connect' if left else 'a house agent or a site to enroll'}"
    others = [site.name for site in left[1:] if site.connected]
    patience_left = round_.opened_at + cohorts.patience_seconds(job) - now
    if others and patience_left > 0:
        return f"{text}; {others[0]} makes it instead in {duration(patience_left)}"
    return f"{text}; given up in {duration(round_.deadline_at - now)}, then the job fails"


def waits_for_version_0(
    facts: Facts, round_: Round, waiting: Sequence[Task], others: Sequence[SiteFact], now: float
) -> str:
    after = f"{others[0].name} tries" if others else "the job fails"
    left = duration(round_.deadline_at - now)
    return f"version 0 is being made: {_statuses(facts, waiting, now=now)}; given up in {left}, then {after}"


def waits_for_updates(
    job: Job, facts: Facts, round_: Round, tasks: Sequence[Task], accepted: Sequence[Update], now: float
) -> str:
    waiting = [task for task in tasks if task.state.open]
    text = f"round {round_.number} waits for {len(waiting)} of {len(round_.cohort)} updates: "
    text += _statuses(facts, waiting, now=now)
    counted = {update.site for update in accepted}
    elsewhere = {*counted, *facts.set_aside}
    lost = [task for task in tasks if not task.state.open and task.site in {*round_.cohort} - elsewhere and task.reason]
    if lost:
        text += f"; without {outcomes(lost)}"
    if facts.set_aside:
        text += f"; {set_aside(facts)}; {readmits(job)}"
    if facts.spare_bytes is not None and facts.spare_bytes < facts.model_bytes:
        text += f"; uploads wait for room on the coordinator's disk: {no_room(facts, facts.model_bytes)}"
    left = round_.deadline_at - now
    quorum = job.spec.cohort.quorum
    if len(accepted) >= quorum:
        stalls = max(task.last_progress_at for task in waiting) + job.spec.cohort.stall_limit_seconds - now
        sooner = f", or in {duration(stalls)} when nothing moves" if stalls < left else ""
        return f"{text}; closes without them in {duration(left)}{sooner}"
    missing = quorum - len(accepted)
    more = f"needs {missing} more for its quorum of {quorum}"
    if missing > len(waiting):
        more += ", which this attempt cannot reach any more"
    return f"{text}; ends in {duration(left)}, and {more}, {then(job, round_)}"


def aggregates(round_: Round, command: Command, *, limit: float, now: float) -> str:
    begun = f"begun {duration(now - command.queued_at)} ago"
    text = f"round {round_.number}: the coordinator aggregates {len(command.contributions)} updates, {begun}"
    if command.error:
        text += f", again after: {command.error}"
    return f"{text}; given up in {duration(limit - now)}, then the job fails"


def judged(job: Job, command: Command) -> str:
    """What a robust rule did to single updates, and which are unlike the others; nothing where there is no such."""
    rule, metrics = job.spec.aggregation.robust.type, command.metrics
    coefficients = by_site(metrics, COEFFICIENT)
    weighted = [part for part in command.contributions if part.weight and part.site in coefficients]
    shares = {part.site: coefficients[part.site] / part.weight for part in weighted}
    left_out = [site for site, share in shares.items() if not share]
    shortened = [f"{site} at {share:.0%}" for site, share in shares.items() if 0 < share < NOTABLY_CLIPPED]
    text = ""
    if len(left_out) == len(shares) - 1 > 0:
        text += f"; {rule} counts {', '.join(set(shares) - set(left_out))} alone"
    elif left_out:
        text += f"; {rule} leaves out {', '.join(left_out)}"
    if shortened:
        text += f"; {rule} counts {', '.join(shortened)}"
    against = [site for site, cosine in by_site(metrics, COSINE).items() if cosine < 0]
    outlying = [f"{site} ({z:+.1f})" for site, z in by_site(metrics, NORM_Z).items() if abs(z) > OUTLYING_Z]
    if against:
        text += f"; against the mean of the others: {', '.join(against)}"
    if outlying:
        text += f"; of unusual length, in deviations: {', '.join(outlying)}"
    return text


def could_not_aggregate(round_: Round, command: Command, *, again_at: float, limit: float, now: float) -> str:
    return (
        f"round {round_.number}: the coordinator could not aggregate {len(command.contributions)} updates: "
        f"{command.error}; tries again in {duration(again_at - now)}; given up in {duration(limit - now)}, then the "
        "job fails"
    )


def waits_for_distillation(facts: Facts, round_: Round, task: Task, *, stalls_at: float, now: float) -> str:
    here = {site.name for site in facts.sites if site.connected}
    left = round_.deadline_at - now
    sooner = f", or in {duration(stalls_at - now)} when nothing moves" if stalls_at < round_.deadline_at else ""
    return (
        f"round {round_.number} is aggregated and waits for its distillation: "
        f"{status(task, now=now, connected=task.site in here)}; committed without it in {duration(left)}{sooner}"
    )


def waits_for_evaluation(job: Job, facts: Facts, pending: Sequence[Task], now: float) -> str:
    here = {site.name for site in facts.sites if site.connected}
    who = ", ".join(
        f"{status(task, now=now, connected=task.site in here)} ({task.split or 'validation'} of version {task.version})"
        for task in pending
    )
    ends = max(task.queued_at for task in pending) + job.spec.evaluation.deadline_seconds
    return (
        f"all rounds are committed; waits for {len(pending)} evaluations: {who}; "
        f"the job ends without them in {duration(ends - now)}"
    )
