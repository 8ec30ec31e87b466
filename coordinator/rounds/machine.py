"""`step`: one decision about one job.

Pure: no I/O, no clock, no logging. The controller reads facts from the store, calls it, and writes the transition in
one transaction, again and again until there is nothing more to decide; a coordinator that is killed at any line repeats
a decision, never loses one. Every transition carries the sentence that explains it.
"""

from __future__ import annotations

from coordinator.rounds import cohort as cohorts
from coordinator.rounds import evaluation as evaluations
from coordinator.rounds import sentences
from coordinator.rounds.state import (
    Aggregate,
    CommandState,
    Commit,
    Contribution,
    EndTask,
    Facts,
    FailRound,
    Fate,
    Job,
    JobState,
    OpenRound,
    Phase,
    QueueTask,
    RejectUpdate,
    Round,
    SetBest,
    SetCohort,
    SetJobState,
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
    if facts.round.phase is Phase.SELECTING:
        return _select(job, facts, facts.round, now)
    if facts.round.phase is Phase.COLLECTING:
        return _collect(job, facts, facts.round, now)
    if facts.round.phase is Phase.AGGREGATING:
        return _aggregate(job, facts, facts.round, now)
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
    best = evaluations.best_version(job, facts)
    if best is not None and best != job.best_version:
        return Transition((SetBest(best),), f"version {best} is the best so far by {job.spec.evaluation.metric}")
    return None


# --- SELECTING


def _select(job: Job, facts: Facts, round_: Round, now: float) -> Transition:
    if round_.number == 0:
        return _select_initialiser(job, facts, round_, now)
    waited = now - round_.opened_at
    cohort = cohorts.draw(job, facts, round_number=round_.number, waited_seconds=waited)
    if cohort is not None:
        # A round that is tried again keeps what was accepted: those sites do not train twice.
        accepted = {update.site for update in facts.updates if update.fate is Fate.ACCEPTED}
        cohort = tuple(sorted({*cohort, *accepted}))
        # Every update still to come, the state of a server optimizer, and the new version must fit on the disk.
        needed = (len(set(cohort) - accepted) + 3) * facts.model_bytes
        if facts.spare_bytes is not None and needed > facts.spare_bytes and now <= round_.deadline_at:
            return Transition((), sentences.waits_for_disk(facts, round_, needed, now))
        assert job.head_version is not None
        tasks = tuple(
            QueueTask(TaskKind.TRAIN, round_.number, site, job.head_version) for site in cohort if site not in accepted
        )
        return Transition((SetCohort(cohort), *tasks), f"round {round_.number} begins with {', '.join(cohort)}")
    if facts.set_aside and len(cohorts.possible(job, facts)) < job.spec.cohort.quorum:
        # Nothing that may still happen by itself can fill this round.
        reason = f"round {round_.number} cannot reach its quorum: {sentences.set_aside(facts)}"
        return Transition((FailRound(reason), SetJobState(JobState.FAILED)), reason)
    if now > round_.deadline_at:
        return _below_quorum(job, facts, round_, now, why="too few sites are connected")
    return Transition((), sentences.waits_for_sites(job, facts, round_, now))


def _select_initialiser(job: Job, facts: Facts, round_: Round, now: float) -> Transition:
    """Version 0 is made by the house agent, else by the first site: the coordinator has no model code."""
    tried = {task.site for task in facts.tasks if task.kind is TaskKind.INIT}
    house = evaluations.house_agent(facts)
    waited = now - round_.opened_at
    order = [site for site in facts.sites if site.name == house] + cohorts.draw_order(
        cohorts.eligible(job, facts), seed=job.spec.seed, round_number=0
    )
    left = [site for site in order if site.name not in tried]
    if tried and not left:
        reasons = "; ".join(f"{task.site}: {task.reason}" for task in facts.tasks if task.kind is TaskKind.INIT)
        return Transition((FailRound(reasons), SetJobState(JobState.FAILED)), f"version 0 could not be made: {reasons}")
    for position, site in enumerate(left):
        if site.connected and (position == 0 or waited >= job.spec.cohort.gather_seconds):
            task = QueueTask(TaskKind.INIT, 0, site.name, 0)
            return Transition((SetCohort((site.name,)), task), f"{site.name} makes version 0")
    if now > round_.deadline_at:
        reason = "no site that could make version 0 connected in time"
        return Transition((FailRound(reason), SetJobState(JobState.FAILED)), reason)
    return Transition((), sentences.waits_for_initialiser(job, left, round_, now))


# --- COLLECTING


def _collect(job: Job, facts: Facts, round_: Round, now: float) -> Transition:
    tasks = [task for task in facts.tasks if task.round == round_.number and task.kind is not TaskKind.EVALUATE]
    if round_.number == 0:
        return _collect_initial(job, facts, round_, tasks, now)
    for task in tasks:
        if task.state is TaskState.FAILED and task.failures < MAX_FAILURES and task.site not in facts.set_aside:
            again = QueueTask(task.kind, task.round, task.site, task.version)
            return Transition((again,), f"{task.site} failed ({task.reason}) and gets round {round_.number} once more")
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
            return Transition((), sentences.waits_for_updates(job, facts, round_, waiting, accepted, now))
    if len(accepted) < quorum:
        why = "the deadline passed" if waiting else sentences.outcomes(tasks)
        return _below_quorum(job, facts, round_, now, why=why)
    closed = tuple(
        EndTask(task.id, TaskState.EXPIRED, f"round {round_.number} closed without this update") for task in waiting
    )
    shares = cohorts.contributions(job, accepted)
    start = Aggregate(shares, generation=1 if facts.command is None else facts.command.generation + 1)
    left_out = f"; without {', '.join(task.site for task in waiting)}" if waiting else ""
    return Transition((*closed, start), f"round {round_.number} aggregates {len(accepted)} updates{left_out}")


def _collect_initial(job: Job, facts: Facts, round_: Round, tasks: list[Task], now: float) -> Transition:
    if facts.initial is not None:
        first = facts.initial
        commit = Commit(0, first.digest, first.size, "", (first,))
        return Transition(
            (commit, *evaluations.measure(job, facts, version=0)), f"version 0 by {first.site} is the head"
        )
    current = [task for task in tasks if task.site in round_.cohort]
    if any(task.state.open for task in current):
        if now <= round_.deadline_at:
            return Transition((), sentences.waits_for_updates(job, facts, round_, current, [], now))
        late = tuple(EndTask(task.id, TaskState.EXPIRED, "the deadline passed") for task in current if task.state.open)
        return Transition((*late, _open(job, number=0, attempt=round_.attempt + 1, now=now)), "version 0 took too long")
    reasons = sentences.outcomes(current)
    return Transition(
        (_open(job, number=0, attempt=round_.attempt + 1, now=now),), f"version 0 was not made: {reasons}"
    )


def _below_quorum(job: Job, facts: Facts, round_: Round, now: float, *, why: str) -> Transition:
    """Ends an attempt that cannot close; another one begins while the recipe has retries."""
    accepted = sum(update.fate is Fate.ACCEPTED for update in facts.updates)
    short = f"round {round_.number} has {accepted} of the {job.spec.cohort.quorum} updates it needs: {why}"
    ends = tuple(
        EndTask(task.id, TaskState.EXPIRED, "this attempt of the round ended below its quorum")
        for task in facts.tasks
        if task.round == round_.number and task.kind is TaskKind.TRAIN and task.state.open
    )
    if round_.attempt <= job.spec.cohort.retries:
        again = _open(job, number=round_.number, attempt=round_.attempt + 1, now=now)
        return Transition(
            (*ends, again), f"{short}; attempt {round_.attempt + 1} of {job.spec.cohort.retries + 1} begins"
        )
    return Transition((*ends, FailRound(short), SetJobState(JobState.FAILED)), f"{short}; no attempts are left")


# --- AGGREGATING


def _aggregate(job: Job, facts: Facts, round_: Round, now: float) -> Transition:
    command = facts.command
    assert command is not None
    # As long again as the round had; a full disk may be cleared meanwhile.
    limit = round_.deadline_at + job.spec.cohort.round_deadline_seconds
    given_up = f"given up in {sentences.duration(limit - now)}"
    if command.state is not CommandState.DONE and now > limit:
        reason = f"round {round_.number} could not be aggregated: {command.error or 'it took too long'}"
        return Transition((FailRound(reason), SetJobState(JobState.FAILED)), reason)
    if command.state is CommandState.QUEUED:
        count = len(command.contributions)
        return Transition((), f"round {round_.number}: the coordinator aggregates {count} updates; {given_up}")
    if command.state is CommandState.DONE:
        version = round_.number
        commit = Commit(version, command.digest, command.size, command.optimizer_digest, command.contributions)
        return Transition(
            (commit, *evaluations.measure(job, facts, version=version)),
            f"round {round_.number} is committed: version {version} from {len(command.contributions)} updates",
        )
    if command.corrupt_site:
        return _without(job, facts, round_, command.contributions, command.corrupt_site, command.generation, now)
    if now < command.queued_at + COMMAND_RETRY_SECONDS:
        trouble = f"the coordinator could not aggregate and tries again: {command.error}"
        return Transition((), f"round {round_.number}: {trouble}; {given_up}")
    again = Aggregate(command.contributions, command.generation + 1)
    return Transition((again,), f"round {round_.number} is aggregated again after: {command.error}")


def _without(
    job: Job, facts: Facts, round_: Round, used: tuple[Contribution, ...], site: str, generation: int, now: float
) -> Transition:
    """A stored update no longer matches its digest: it cannot count, the round goes on down to the quorum."""
    reject = RejectUpdate(site, "the stored update no longer matches its digest")
    rest = [update for update in facts.updates if update.fate is Fate.ACCEPTED and update.site != site]
    if len(rest) >= job.spec.cohort.quorum:
        start = Aggregate(cohorts.contributions(job, rest), generation + 1)
        return Transition((reject, start), f"round {round_.number} goes on without {site}: {reject.reason}")
    again = _open(job, number=round_.number, attempt=round_.attempt + 1, now=now)
    return Transition((reject, again), f"round {round_.number} needs {site} to train again: {reject.reason}")


# --- COMMITTED


def _after_commit(job: Job, facts: Facts, round_: Round, now: float) -> Transition:
    stop_early = round_.number > 0 and evaluations.should_stop_early(job, facts)
    if round_.number < job.spec.rounds and not stop_early:
        opened = _open(job, number=round_.number + 1, attempt=1, now=now)
        return Transition((opened,), f"round {round_.number + 1} opens")
    pending = [task for task in facts.tasks if task.kind is TaskKind.EVALUATE and task.state.open]
    if pending:
        return Transition((), sentences.waits_for_evaluation(job, pending, now))
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
    done = any(found.split == evaluations.TEST for found in facts.evaluations)
    tried = any(task.split == evaluations.TEST for task in facts.tasks)
    return None if done or tried else QueueTask(TaskKind.EVALUATE, version, house, version, evaluations.TEST)
