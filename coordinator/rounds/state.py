"""The state of a job as frozen values: what is in the store, what a step may decide.

    Job     SUBMITTED -> RUNNING <-> PAUSED -> COMPLETED | FAILED | CANCELLED
    Round   SELECTING -> COLLECTING -> AGGREGATING (-> DISTILLING) -> COMMITTED | FAILED
            (a round that ends below its quorum goes back to SELECTING while it has retries; what was accepted stays)
            (a FAILED round goes back to SELECTING when the operator resumes its job)
    Task    QUEUED -> LEASED -> RUNNING -> SUCCEEDED | FAILED | DECLINED | EXPIRED
            (a lease that runs out puts the task back to QUEUED; the next grant raises the generation)

Round 0 makes version 0 by an INIT task; round n makes version n. Times are seconds of service of the job: a clock that
stands still while the coordinator is down or the job is paused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from protos.jobspec import JobSpec


class JobState(Enum):
    SUBMITTED = "SUBMITTED"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def ended(self) -> bool:
        return self in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED)

    @property
    def final(self) -> bool:
        """Nothing goes on with it any more; a FAILED job may be resumed."""
        return self in (JobState.COMPLETED, JobState.CANCELLED)


class Phase(Enum):
    SELECTING = "SELECTING"
    COLLECTING = "COLLECTING"
    AGGREGATING = "AGGREGATING"
    DISTILLING = "DISTILLING"
    COMMITTED = "COMMITTED"
    FAILED = "FAILED"


class TaskKind(Enum):
    INIT = "INIT"
    TRAIN = "TRAIN"
    DISTILL = "DISTILL"
    EVALUATE = "EVALUATE"


class TaskState(Enum):
    QUEUED = "QUEUED"
    LEASED = "LEASED"  # granted; the agent has not reported yet
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    DECLINED = "DECLINED"
    EXPIRED = "EXPIRED"  # nobody waits for it any more

    @property
    def open(self) -> bool:
        return self in (TaskState.QUEUED, TaskState.LEASED, TaskState.RUNNING)

    @property
    def live(self) -> bool:
        return self in (TaskState.LEASED, TaskState.RUNNING)


class Fate(Enum):
    ACCEPTED = "ACCEPTED"
    REJECTED = "REJECTED"
    DISCARDED = "DISCARDED"


class CommandState(Enum):
    QUEUED = "QUEUED"
    DONE = "DONE"
    FAILED = "FAILED"


@dataclass(frozen=True)
class Job:
    id: str
    spec: JobSpec
    state: JobState
    head_version: int | None
    best_version: int | None
    service_seconds: float
    base_digest: str = ""
    # Of the replica that drives the job: what it decided is not written once another one has taken over.
    driver_generation: int = 0


@dataclass(frozen=True)
class Round:
    number: int
    attempt: int
    phase: Phase
    cohort: tuple[str, ...]
    opened_at: float
    # The end of SELECTING and COLLECTING together, counted anew by each attempt; then that of DISTILLING.
    deadline_at: float


@dataclass(frozen=True)
class Task:
    """One piece of work for one site.

    `version` is what it starts from; an EVALUATE task's round is that version. A DISTILL task starts from the aggregate
    of its round.
    """

    id: str
    job_id: str
    round: int
    kind: TaskKind
    site: str
    version: int
    split: str = ""
    state: TaskState = TaskState.QUEUED
    generation: int = 0
    queued_at: float = 0.0
    lease_until: float = 0.0
    last_progress_at: float = 0.0
    failures: int = 0
    stage: str = ""
    done: int = 0
    total: int = 0
    unit: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Update:
    """What a site sent back for the round in progress."""

    site: str
    fate: Fate
    digest: str
    size: int
    examples: int
    steps: int
    reason: str = ""


@dataclass(frozen=True)
class Evaluation:
    version: int
    site: str
    split: str
    examples: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Contribution:
    """A site's part in an aggregate: with x the version before, the next one is x + the sum of weight (site's - x).

    The weights of one aggregate sum to 1, but those of fednova need not.
    """

    site: str
    digest: str
    size: int
    weight: float
    # scaffold: what the site's mean gradient weighs in that of all sites, and of how many steps it is the mean.
    control_weight: float = 0.0
    steps: int = 0


@dataclass(frozen=True)
class Command:
    """Work that takes long, carried out idempotently by the controller; a result of an old generation is refused."""

    round: int
    generation: int
    state: CommandState
    contributions: tuple[Contribution, ...]
    queued_at: float
    digest: str = ""
    size: int = 0
    optimizer_digest: str = ""
    # Why it failed; while it is QUEUED, why the try before failed.
    error: str = ""
    # The site whose stored update was found damaged.
    corrupt_site: str = ""
    # What the aggregation measured of itself and of the updates.
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SiteFact:
    name: str
    house: bool
    connected: bool


@dataclass(frozen=True)
class Facts:
    """Everything of the store that a decision may depend on."""

    sites: tuple[SiteFact, ...] = ()
    round: Round | None = None
    # The tasks of the round in progress, and every evaluation that is not over.
    tasks: tuple[Task, ...] = ()
    updates: tuple[Update, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    command: Command | None = None
    # Sites that declined this job, or failed its tasks again and again: reason by site.
    set_aside: Mapping[str, str] = field(default_factory=dict)
    # The INIT task's sealed result, and that of the round's DISTILL task.
    initial: Contribution | None = None
    distilled: Contribution | None = None
    # Size of the head version, and room for blobs at the coordinator; None: not known.
    model_bytes: int = 0
    spare_bytes: int | None = None
    # Who was drawn for the round before, and whose update counted in it; empty before round 2.
    last_cohort: tuple[str, ...] = ()
    last_counted: frozenset[str] = frozenset()
    # Measured versions that were not compared with the best one yet. `evaluations` holds theirs, those of the best
    # version and, for early stopping, of those after it: a job may have thousands, and the others cannot matter.
    unjudged: frozenset[int] = frozenset()


# --- effects: what a step may decide, carried out together in one transaction


@dataclass(frozen=True)
class SetJobState:
    state: JobState


@dataclass(frozen=True)
class OpenRound:
    number: int
    attempt: int
    deadline_at: float


@dataclass(frozen=True)
class SetCohort:
    cohort: tuple[str, ...]


@dataclass(frozen=True)
class QueueTask:
    """A new task, or the same task again."""

    kind: TaskKind
    round: int
    site: str
    version: int
    split: str = ""


@dataclass(frozen=True)
class EndTask:
    task_id: str
    state: TaskState
    reason: str


@dataclass(frozen=True)
class RejectUpdate:
    site: str
    reason: str


@dataclass(frozen=True)
class Aggregate:
    contributions: tuple[Contribution, ...]
    generation: int
    # Why the try before this one failed.
    last_error: str = ""


@dataclass(frozen=True)
class Distill:
    """What was aggregated is distilled before it is committed; the task is queued besides."""

    deadline_at: float


@dataclass(frozen=True)
class Commit:
    """Make `version` the head."""

    version: int
    digest: str
    size: int
    optimizer_digest: str
    contributions: tuple[Contribution, ...]
    # Whether evaluations of it were queued, so that it is to be judged.
    measured: bool = False
    # Why it is not distilled, where the recipe asks for that.
    undistilled: str = ""


@dataclass(frozen=True)
class FailRound:
    reason: str


@dataclass(frozen=True)
class SetBest:
    version: int


@dataclass(frozen=True)
class Judged:
    """These versions were compared with the best one."""

    versions: tuple[int, ...]


Effect = (
    SetJobState
    | OpenRound
    | SetCohort
    | QueueTask
    | EndTask
    | RejectUpdate
    | Aggregate
    | Distill
    | Commit
    | FailRound
    | SetBest
    | Judged
)


@dataclass(frozen=True)
class Transition:
    """What to write, and the sentence that says why, or what the job waits for when there is nothing to write."""

    effects: tuple[Effect, ...]
    sentence: str
