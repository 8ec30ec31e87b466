"""`step`: one decision about one job.

Pure: no I/O, no clock, no logging. The controller reads facts from the store, calls it, and writes the transition in
one transaction, again and again until there is nothing more to decide; a coordinator that is killed at any line repeats
a decision, never loses one. Every transition carries the sentence that explains it.
"""

from __future__ import annotations

from dataclasses import replace

from coordinator.rounds import cohort as cohorts
from coordinator.rounds import evaluation as evaluations
from coordinator.rounds import sentences
from coordinator.rounds.state import (
    Aggregate,
    Command,
    CommandState,
    Commit,
    Contribution,
    Distill,
    EndTask,
    Facts,
    FailRound,
    Fate,
    Job,
    JobState,
    Judged,
    OpenRound,
    Phase,
    QueueTask,
    RejectUpdate,
    Round,
    SetBest,
    SetCohort,
    SetJobState,
    SiteFact,
    Task,
    TaskKind,
    TaskState,
    Transition,
)

# A site gets a task of one round this many times before the round goes on without it.
MAX_FAILURES = 2
# Pause before a command that failed for want of disk or memory is tried again.
COMMAND_RETRY_SECONDS = 10.0


def step(job: Job, facts: Facts, now: float) -> Transition:
    """The next decision of a job at `now` seconds of service; no effects when it has to wait."""
    if job.state.ended or job.state is JobState.PAUSED:
        return Transition((), sentences.at_rest(job))
    if job.state is JobState.SUBMITTED:
        effects = (SetJobState(JobState.RUNNING), _open(job, number=0, attempt=1, now=now))
        return Transition(effects, f"job {job.spec.name} begins: version 0 has to be made")
    tidied = _tidy(job, facts, now)
    if tidied:
        return tidied
    assert facts.round is not None
    if facts.round.phase is Phase.FAILED:
        number = facts.round.number
        again = _open(job, number=number, attempt=1, now=now)
        return Transition((again,), f"round {number} is tried again, because the operator resumed the job")
    if facts.round.phase is Phase.SELECTING:
        return _select(job, facts, facts.round, now)
    if facts.round.phase is Phase.COLLECTING:
        return _collect(job, facts, facts.round, now)
    if facts.round.phase is Phase.AGGREGATING:
        return _aggregate(job, facts, facts.round, now)
    if facts.round.phase is Phase.DISTILLING:
        return _distill(job, facts, facts.round, now)
    return _after_commit(job, facts, facts.round, now)


def _open(job: Job, *, number: int, attempt: int, now: float) -> OpenRound:
    return OpenRound(number, attempt, now + job.spec.cohort.round_deadline_seconds)


def _tidy(job: Job, facts: Facts, now: float) -> Transition | None:
    """What does not depend on the phase: revoked sites, leases that ran out, late evaluations, a new best version."""
    enrolled = {site.name for site in facts.sites}
    for task in facts.tasks:
        if task.state.open and task.site not in enrolled:
            # Nobody else can finish it, and its own site is not let in any more.
            end = EndTask(task.id, TaskState.EXPIRED, "the site's enrollment was revoked")
            return Transition((end,), f"{task.site} was revoked: {sentences.work(task)} goes on without it")
        if task.state.live and now > task.lease_until:
            again = QueueTask(task.kind, task.round, task.site, task.version, task.split)
            return Transition(
                (again,), f"{task.site} was not heard of in time: {sentences.work(task)} is offered again"
            )
        limit = job.spec.evaluation.deadline_seconds
        if task.kind is TaskKind.EVALUATE and task.state.open and now > task.queued_at + limit:
            reason = f"not evaluated within {sentences.duration(limit)}"
            end = EndTask(task.id, TaskState.EXPIRED, reason)
            return Transition((end,), f"version {task.version} was {reason} at {task.site}")
    return _judge(job, facts)


def _judge(job: Job, facts: Facts) -> Transition | None:
    """Compares what was measured with the best version, once each: what lost is not looked at again."""
    judged = evaluations.unjudged(facts)
    best = evaluations.best_version(job, facts)
    mark = (Judged(judged),) if judged else ()
    if best is not None and best != job.best_version:
        return Transition((SetBest(best), *mark), f"version {best} is the best so far by {job.spec.evaluation.metric}")
    if not judged:
        return None
    which = ", ".join(str(version) for version in judged) if len(judged) <= 5 else f"{judged[0]} to {judged[-1]}"
    kept = f"no better than version {best} by {job.spec.evaluation.metric}" if best is not None else "not measured"
    return Transition(mark, f"version {which} is {kept}")


def _fail(job: Job, facts: Facts, reason: str, *ends: EndTask) -> Transition:
    return Transition((*ends, FailRound(reason), SetJobState(JobState.FAILED)), sentences.failed(job, facts, reason))


# --- SELECTING


def _select(job: Job, facts: Facts, round_: Round, now: float) -> Transition:
    if round_.number == 0:
        return _select_initialiser(job, facts, round_, now)
    if facts.set_aside and len(cohorts.possible(job, facts) | cohorts.accepted(facts)) < job.spec.cohort.quorum:
        # Nothing that may still happen by itself can fill this round.
        return _fail(job, facts, f"round {round_.number} cannot reach its quorum: {sentences.set_aside(facts)}")
    cohort = cohorts.draw(job, facts, round_number=round_.number, waited_seconds=now - round_.opened_at)
    if cohort is None:
        if now > round_.deadline_at:
            return _below_quorum(job, facts, round_, now, why="too few sites are connected")
        return Transition((), sentences.waits_for_sites(job, facts, round_, now))
    to_train = [site for site in cohort if site not in cohorts.accepted(facts)]
    # Every update still to come, the state of a server optimizer, and the new version must fit on the disk.
    needed = (len(to_train) + 3 + job.spec.is_distilled(round_.number)) * facts.model_bytes
    if facts.spare_bytes is not None and needed > facts.spare_bytes:
        if now > round_.deadline_at:
            why = f"the coordinator's disk has no room: {sentences.no_room(facts, needed)}"
            return _below_quorum(job, facts, round_, now, why=why)
        return Transition((), sentences.waits_for_disk(job, facts, round_, needed, now))
    assert job.head_version is not None
    tasks = tuple(QueueTask(TaskKind.TRAIN, round_.number, site, job.head_version) for site in to_train)
    begins = sentences.begins(facts, round_, cohort, left_out=cohorts.eligible(job, facts))
    return Transition((SetCohort(cohort), *tasks), begins)


def _select_initialiser(job: Job, facts: Facts, round_: Round, now: float) -> Transition:
    """Version 0 is made by the house agent, else by the first site: the coordinator has no model code."""
    left = _may_initialise(job, facts)
    if not left and _tried(facts):
        reasons = sentences.outcomes([task for task in facts.tasks if task.kind is TaskKind.INIT])
        return _fail(job, facts, f"version 0 could not be made: {reasons}")
    patient = now - round_.opened_at < cohorts.patience_seconds(job)
    for position, site in enumerate(left):
        if site.connected and (position == 0 or not patient):
            task = QueueTask(TaskKind.INIT, 0, site.name, 0)
            return Transition((SetCohort((site.name,)), task), f"{site.name} makes version 0")
    if now > round_.deadline_at:
        return _fail(job, facts, "no site that could make version 0 connected in time")
    return Transition((), sentences.waits_for_initialiser(job, left, round_, now))


def _tried(facts: Facts) -> set[str]:
    """The sites that could not make version 0. When the operator resumes the job, their reasons are forgotten."""
    return {task.site for task in facts.tasks if task.kind is TaskKind.INIT and (task.state.open or task.reason)}


def _may_initialise(job: Job, facts: Facts) -> list[SiteFact]:
    """Who may still make version 0, the house agent first."""
    house = evaluations.house_agent(facts)
    order = [site for site in facts.sites if site.name == house] + cohorts.draw_order(
        cohorts.eligible(job, facts), seed=job.spec.seed, round_number=0
    )
    return [site for site in order if site.name not in _tried(facts)]


# --- COLLECTING


def _collect(job: Job, facts: Facts, round_: Round, now: float) -> Transition:
    tasks = [task for task in facts.tasks if task.round == round_.number and task.kind is not TaskKind.EVALUATE]
    if round_.number == 0:
        return _collect_initial(job, facts, round_, tasks, now)
    for task in tasks:
        again = QueueTask(task.kind, task.round, task.site, task.version)
        may_try = task.site in round_.cohort and task.site not in facts.set_aside
        if task.state is TaskState.FAILED and task.failures < MAX_FAILURES and may_try:
            return Transition((again,), f"{task.site} failed ({task.reason}) and gets round {round_.number} once more")
        if task.state is TaskState.DECLINED and may_try:
            # Who declines is set aside with it: the operator has readmitted the site since.
            return Transition((again,), f"{task.site} was readmitted and gets round {round_.number} again")
        if task.state is TaskState.DECLINED and task.site in round_.cohort:
            substitute = cohorts.replacement(job, facts, round_number=round_.number, cohort=round_.cohort)
            if substitute:
                assert job.head_version is not None
                wider = SetCohort(tuple(sorted({*round_.cohort, substitute} - {task.site})))
                work = QueueTask(TaskKind.TRAIN, round_.number, substitute, job.head_version)
                return Transition((wider, work), f"{substitute} takes the place of {task.site}, which declined")
    accepted = [update for update in facts.updates if update.fate is Fate.ACCEPTED]
    waiting = [task for task in tasks if task.state.open]
    quorum = job.spec.cohort.quorum
    if waiting and now <= round_.deadline_at:
        stalled = all(now - task.last_progress_at > job.spec.cohort.stall_limit_seconds for task in waiting)
        if not (stalled and len(accepted) >= quorum):
            return Transition((), sentences.waits_for_updates(job, facts, round_, tasks, accepted, now))
    if len(accepted) < quorum:
        why = "the deadline passed" if waiting else sentences.outcomes(tasks)
        return _below_quorum(job, facts, round_, now, why=why)
    closed = tuple(
        EndTask(task.id, TaskState.EXPIRED, f"round {round_.number} closed without this update") for task in waiting
    )
    shares = cohorts.contributions(job, accepted, sites=len(cohorts.eligible(job, facts)))
    start = Aggregate(shares, generation=1 if facts.command is None else facts.command.generation + 1)
    left_out = f"; without {', '.join(task.site for task in waiting)}" if waiting else ""
    return Transition((*closed, start), f"round {round_.number} aggregates {len(accepted)} updates{left_out}")


def _collect_initial(job: Job, facts: Facts, round_: Round, tasks: list[Task], now: float) -> Transition:
    if facts.initial is not None:
        first = facts.initial
        measure = evaluations.measure(job, facts, version=0)
        commit = Commit(0, first.digest, first.size, "", (first,), bool(measure))
        return Transition((commit, *measure), f"version 0 by {first.site} is the head")
    current = [task for task in tasks if task.site in round_.cohort]
    waiting = [task for task in current if task.state.open]
    others = _may_initialise(job, facts)
    again = _open(job, number=0, attempt=round_.attempt + 1, now=now)
    if not waiting:
        return Transition((again,), f"version 0 was not made: {sentences.outcomes(current)}")
    # Nobody works on it, and somebody else could.
    limit = job.spec.cohort.stall_limit_seconds
    silent = all(task.state is TaskState.QUEUED and now - task.last_progress_at > limit for task in waiting)
    if now <= round_.deadline_at and not (silent and any(site.connected for site in others)):
        return Transition((), sentences.waits_for_version_0(facts, round_, waiting, others, now))
    reason = f"nothing was heard of it for {sentences.duration(limit)}" if silent else "the deadline passed"
    late = tuple(EndTask(task.id, TaskState.EXPIRED, reason) for task in waiting)
    who = ", ".join(task.site for task in waiting)
    return Transition((*late, again), f"version 0 was not made by {who}: {reason}")


def _below_quorum(job: Job, facts: Facts, round_: Round, now: float, *, why: str) -> Transition:
    """Ends an attempt that cannot close; another one begins while the recipe has retries."""
    accepted, quorum = len(cohorts.accepted(facts)), job.spec.cohort.quorum
    short = f"round {round_.number} has {accepted} of the {quorum} updates it needs: {why}"
    if accepted >= quorum:
        short = f"round {round_.number} could not go on: {why}"
    ends = tuple(
        EndTask(task.id, TaskState.EXPIRED, "this attempt of the round ended below its quorum")
        for task in facts.tasks
        if task.round == round_.number and task.kind is TaskKind.TRAIN and task.state.open
    )
    if round_.attempt <= job.spec.cohort.retries:
        again = _open(job, number=round_.number, attempt=round_.attempt + 1, now=now)
        attempt = f"attempt {round_.attempt + 1} of {job.spec.cohort.retries + 1} begins"
        return Transition((*ends, again), f"{short}; {attempt}")
    return _fail(job, facts, f"{short}; no attempts are left", *ends)


# --- AGGREGATING


def _aggregate(job: Job, facts: Facts, round_: Round, now: float) -> Transition:
    command = facts.command
    assert command is not None
    # As long again as the round had; a full disk may be cleared meanwhile.
    limit = round_.deadline_at + job.spec.cohort.round_deadline_seconds
    if command.state is not CommandState.DONE and now > limit:
        why = command.error or "it took too long"
        return _fail(job, facts, f"round {round_.number} could not be aggregated: {why}")
    if command.state is CommandState.QUEUED:
        return Transition((), sentences.aggregates(round_, command, limit=limit, now=now))
    if command.state is CommandState.DONE:
        return _commit_or_distill(job, facts, round_, command, now)
    if command.corrupt_site:
        return _without(job, facts, round_, command.corrupt_site, command.generation, now)
    again_at = command.queued_at + COMMAND_RETRY_SECONDS
    if now < again_at:
        return Transition((), sentences.could_not_aggregate(round_, command, again_at=again_at, limit=limit, now=now))
    again = Aggregate(command.contributions, command.generation + 1, last_error=command.error)
    return Transition((again,), f"round {round_.number} is aggregated again after: {command.error}")


def _commit_or_distill(job: Job, facts: Facts, round_: Round, command: Command, now: float) -> Transition:
    if job.spec.distillation is None or not job.spec.is_distilled(round_.number):
        return _commit(job, facts, round_, command)
    house = evaluations.house_agent(facts)
    if house is None:
        return _commit(job, facts, round_, command, undistilled="no house agent is enrolled")
    assert job.head_version is not None
    task = QueueTask(TaskKind.DISTILL, round_.number, house, job.head_version)
    begins = Distill(now + job.spec.distillation.deadline_seconds)
    return Transition((begins, task), f"round {round_.number} is aggregated, and {house} distils it")


def _commit(
    job: Job, facts: Facts, round_: Round, command: Command, *ends: EndTask,
    by: Contribution | None = None, undistilled: str = "",
) -> Transition:  # fmt: skip
    """What was aggregated becomes the version, or what the house agent made `by` distilling it."""
    version = round_.number
    measure = evaluations.measure(job, facts, version=version)
    made = (command.digest, command.size) if by is None else (by.digest, by.size)
    commit = Commit(
        version, *made, command.optimizer_digest, command.contributions, bool(measure), undistilled=undistilled
    )  # fmt: skip
    said = f"round {version} is committed: version {version} from {len(command.contributions)} updates"
    said += sentences.judged(job, command)
    if by is not None:
        said += f", distilled by {by.site}"
    if undistilled:
        said += f", not distilled: {undistilled}"
    return Transition((*ends, commit, *measure), said)


def _without(job: Job, facts: Facts, round_: Round, site: str, generation: int, now: float) -> Transition:
    """A stored update no longer matches its digest: it cannot count, the round goes on down to the quorum."""
    reject = RejectUpdate(site, "the stored update no longer matches its digest")
    rest = tuple(replace(update, fate=Fate.REJECTED) if update.site == site else update for update in facts.updates)
    left = [update for update in rest if update.fate is Fate.ACCEPTED]
    if len(left) >= job.spec.cohort.quorum:
        shares = cohorts.contributions(job, left, sites=len(cohorts.eligible(job, facts)))
        start = Aggregate(shares, generation + 1)
        return Transition((reject, start), f"round {round_.number} goes on without {site}: {reject.reason}")
    ended = _below_quorum(job, replace(facts, updates=rest), round_, now, why=f"{site}: {reject.reason}")
    return replace(ended, effects=(reject, *ended.effects))


# --- DISTILLING


def _distill(job: Job, facts: Facts, round_: Round, now: float) -> Transition:
    """A round is never lost here: whatever becomes of the distillation, the aggregate is there to be committed."""
    command = facts.command
    assert command is not None
    if facts.distilled is not None:
        return _commit(job, facts, round_, command, by=facts.distilled)
    tasks = [task for task in facts.tasks if task.kind is TaskKind.DISTILL]
    waiting = next((task for task in tasks if task.state.open), None)
    if waiting is None:
        house = evaluations.house_agent(facts)
        for task in tasks:
            if task.state is TaskState.FAILED and task.failures < MAX_FAILURES and task.site == house:
                again = QueueTask(task.kind, task.round, task.site, task.version)
                failed = f"{task.site} failed to distil ({task.reason})"
                return Transition((again,), f"{failed} and gets the aggregate of round {round_.number} once more")
        return _commit(job, facts, round_, command, undistilled=sentences.outcomes(tasks))
    limit = job.spec.cohort.stall_limit_seconds
    # It may have an evaluation in hand before it comes to this, which did not stand still before it was offered.
    in_hand = [task for task in facts.tasks if task.state.live and task.site == waiting.site]
    moved_at = max(task.last_progress_at for task in (waiting, *in_hand))
    if not (in_hand or waiting.lease_until):
        moved_at = round_.deadline_at
    stalls_at, stalled = moved_at + limit, f"nothing moved for {sentences.duration(limit)}"
    connected = any(site.connected for site in facts.sites if site.name == waiting.site)
    if not connected and not waiting.lease_until:
        # It never took the task: an agent that is away must not hold up each round. One that is there has its hands
        # full with another job, or is about to take it.
        stalls_at, stalled = waiting.queued_at + cohorts.patience_seconds(job), "it is not connected"
    if now <= min(round_.deadline_at, stalls_at):
        return Transition((), sentences.waits_for_distillation(facts, round_, waiting, stalls_at=stalls_at, now=now))
    reason = stalled if now <= round_.deadline_at else "the deadline passed"
    end = EndTask(waiting.id, TaskState.EXPIRED, f"round {round_.number} was committed without it: {reason}")
    return _commit(job, facts, round_, command, end, undistilled=f"{waiting.site} handed nothing in: {reason}")


# --- COMMITTED


def _after_commit(job: Job, facts: Facts, round_: Round, now: float) -> Transition:
    stop_early = round_.number > 0 and evaluations.should_stop_early(job, facts)
    if round_.number < job.spec.rounds and not stop_early:
        opened = _open(job, number=round_.number + 1, attempt=1, now=now)
        return Transition((opened,), f"round {round_.number + 1} opens")
    pending = [task for task in facts.tasks if task.kind is TaskKind.EVALUATE and task.state.open]
    if pending:
        return Transition((), sentences.waits_for_evaluation(job, facts, pending, now))
    test = _final_test(job, facts)
    if test:
        return Transition((test,), f"version {test.version} goes to {test.site} for the one report on test data")
    why = f"{job.spec.evaluation.metric} no longer improved" if stop_early else f"all {job.spec.rounds} rounds are done"
    best = f"; best is version {job.best_version}" if job.best_version is not None else ""
    untested = next((task.reason for task in facts.tasks if task.split == evaluations.TEST and task.reason), "")
    if untested:
        best += f"; the test rows were not evaluated: {untested}"
    return Transition((SetJobState(JobState.COMPLETED),), f"job {job.spec.name} is complete: {why}{best}")


def _final_test(job: Job, facts: Facts) -> QueueTask | None:
    house = evaluations.house_agent(facts)
    if not job.spec.evaluation.test or not house:
        return None
    version = job.best_version if job.best_version is not None else job.head_version
    assert version is not None
    tried = any(task.split == evaluations.TEST for task in facts.tasks)
    return None if tried else QueueTask(TaskKind.EVALUATE, version, house, version, evaluations.TEST)
