from protos.v1 import agent_pb2 as _agent_pb2
from protos.v1 import manifest_pb2 as _manifest_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JobState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_STATE_UNSPECIFIED: _ClassVar[JobState]
    JOB_STATE_SUBMITTED: _ClassVar[JobState]
    JOB_STATE_RUNNING: _ClassVar[JobState]
    JOB_STATE_PAUSED: _ClassVar[JobState]
    JOB_STATE_COMPLETED: _ClassVar[JobState]
    JOB_STATE_FAILED: _ClassVar[JobState]
    JOB_STATE_CANCELLED: _ClassVar[JobState]

class RoundPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROUND_PHASE_UNSPECIFIED: _ClassVar[RoundPhase]
    ROUND_PHASE_SELECTING: _ClassVar[RoundPhase]
    ROUND_PHASE_COLLECTING: _ClassVar[RoundPhase]
    ROUND_PHASE_AGGREGATING: _ClassVar[RoundPhase]
    ROUND_PHASE_COMMITTED: _ClassVar[RoundPhase]
    ROUND_PHASE_FAILED: _ClassVar[RoundPhase]
    ROUND_PHASE_DISTILLING: _ClassVar[RoundPhase]

class TaskState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_STATE_UNSPECIFIED: _ClassVar[TaskState]
    TASK_STATE_QUEUED: _ClassVar[TaskState]
    TASK_STATE_LEASED: _ClassVar[TaskState]
    TASK_STATE_RUNNING: _ClassVar[TaskState]
    TASK_STATE_SUCCEEDED: _ClassVar[TaskState]
    TASK_STATE_FAILED: _ClassVar[TaskState]
    TASK_STATE_DECLINED: _ClassVar[TaskState]
    TASK_STATE_EXPIRED: _ClassVar[TaskState]

class JobAction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_ACTION_UNSPECIFIED: _ClassVar[JobAction]
    JOB_ACTION_PAUSE: _ClassVar[JobAction]
    JOB_ACTION_RESUME: _ClassVar[JobAction]
    JOB_ACTION_CANCEL: _ClassVar[JobAction]
    JOB_ACTION_READMIT: _ClassVar[JobAction]
JOB_STATE_UNSPECIFIED: JobState
JOB_STATE_SUBMITTED: JobState
JOB_STATE_RUNNING: JobState
JOB_STATE_PAUSED: JobState
JOB_STATE_COMPLETED: JobState
JOB_STATE_FAILED: JobState
JOB_STATE_CANCELLED: JobState
ROUND_PHASE_UNSPECIFIED: RoundPhase
ROUND_PHASE_SELECTING: RoundPhase
ROUND_PHASE_COLLECTING: RoundPhase
ROUND_PHASE_AGGREGATING: RoundPhase
ROUND_PHASE_COMMITTED: RoundPhase
ROUND_PHASE_FAILED: RoundPhase
ROUND_PHASE_DISTILLING: RoundPhase
TASK_STATE_UNSPECIFIED: TaskState
TASK_STATE_QUEUED: TaskState
TASK_STATE_LEASED: TaskState
TASK_STATE_RUNNING: TaskState
TASK_STATE_SUCCEEDED: TaskState
TASK_STATE_FAILED: TaskState
TASK_STATE_DECLINED: TaskState
TASK_STATE_EXPIRED: TaskState
JOB_ACTION_UNSPECIFIED: JobAction
JOB_ACTION_PAUSE: JobAction
JOB_ACTION_RESUME: JobAction
JOB_ACTION_CANCEL: JobAction
JOB_ACTION_READMIT: JobAction

class SubmitJobRequest(_message.Message):
    __slots__ = ("spec_json", "dry_run", "submit_token")
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_TOKEN_FIELD_NUMBER: _ClassVar[int]
    spec_json: str
    dry_run: bool
    submit_token: str
    def __init__(self, spec_json: _Optional[str] = ..., dry_run: _Optional[bool] = ..., submit_token: _Optional[str] = ...) -> None: ...

class SubmitJobResponse(_message.Message):
    __slots__ = ("job_id", "estimates", "warnings")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    ESTIMATES_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    estimates: _containers.RepeatedScalarFieldContainer[str]
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, job_id: _Optional[str] = ..., estimates: _Optional[_Iterable[str]] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class ListJobsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListJobsResponse(_message.Message):
    __slots__ = ("jobs",)
    JOBS_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[JobView]
    def __init__(self, jobs: _Optional[_Iterable[_Union[JobView, _Mapping]]] = ...) -> None: ...

class GetJobRequest(_message.Message):
    __slots__ = ("job", "last_rounds")
    JOB_FIELD_NUMBER: _ClassVar[int]
    LAST_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    job: str
    last_rounds: int
    def __init__(self, job: _Optional[str] = ..., last_rounds: _Optional[int] = ...) -> None: ...

class GetJobResponse(_message.Message):
    __slots__ = ("job", "rounds", "tasks", "evaluations", "spec_json")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    job: JobView
    rounds: _containers.RepeatedCompositeFieldContainer[RoundView]
    tasks: _containers.RepeatedCompositeFieldContainer[TaskView]
    evaluations: _containers.RepeatedCompositeFieldContainer[EvaluationView]
    spec_json: str
    def __init__(self, job: _Optional[_Union[JobView, _Mapping]] = ..., rounds: _Optional[_Iterable[_Union[RoundView, _Mapping]]] = ..., tasks: _Optional[_Iterable[_Union[TaskView, _Mapping]]] = ..., evaluations: _Optional[_Iterable[_Union[EvaluationView, _Mapping]]] = ..., spec_json: _Optional[str] = ...) -> None: ...

class JobView(_message.Message):
    __slots__ = ("id", "name", "state", "sentence", "round", "rounds", "head_version", "best_version", "service_seconds", "eta_seconds", "created_unix_seconds")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SENTENCE_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    HEAD_VERSION_FIELD_NUMBER: _ClassVar[int]
    BEST_VERSION_FIELD_NUMBER: _ClassVar[int]
    SERVICE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ETA_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    state: JobState
    sentence: str
    round: int
    rounds: int
    head_version: int
    best_version: int
    service_seconds: float
    eta_seconds: float
    created_unix_seconds: float
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., state: _Optional[_Union[JobState, str]] = ..., sentence: _Optional[str] = ..., round: _Optional[int] = ..., rounds: _Optional[int] = ..., head_version: _Optional[int] = ..., best_version: _Optional[int] = ..., service_seconds: _Optional[float] = ..., eta_seconds: _Optional[float] = ..., created_unix_seconds: _Optional[float] = ...) -> None: ...

class RoundView(_message.Message):
    __slots__ = ("number", "phase", "sentence", "cohort", "seconds", "bytes_up", "bytes_down", "updates", "attempt", "metrics", "undistilled")
    class SecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    SENTENCE_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    UNDISTILLED_FIELD_NUMBER: _ClassVar[int]
    number: int
    phase: RoundPhase
    sentence: str
    cohort: _containers.RepeatedScalarFieldContainer[str]
    seconds: _containers.ScalarMap[str, float]
    bytes_up: int
    bytes_down: int
    updates: _containers.RepeatedCompositeFieldContainer[UpdateView]
    attempt: int
    metrics: _containers.ScalarMap[str, float]
    undistilled: str
    def __init__(self, number: _Optional[int] = ..., phase: _Optional[_Union[RoundPhase, str]] = ..., sentence: _Optional[str] = ..., cohort: _Optional[_Iterable[str]] = ..., seconds: _Optional[_Mapping[str, float]] = ..., bytes_up: _Optional[int] = ..., bytes_down: _Optional[int] = ..., updates: _Optional[_Iterable[_Union[UpdateView, _Mapping]]] = ..., attempt: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., undistilled: _Optional[str] = ...) -> None: ...

class UpdateView(_message.Message):
    __slots__ = ("site", "fate", "reason", "examples", "steps", "metrics", "seconds")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class SecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    SITE_FIELD_NUMBER: _ClassVar[int]
    FATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    site: str
    fate: _agent_pb2.Fate
    reason: str
    examples: int
    steps: int
    metrics: _containers.ScalarMap[str, float]
    seconds: _containers.ScalarMap[str, float]
    def __init__(self, site: _Optional[str] = ..., fate: _Optional[_Union[_agent_pb2.Fate, str]] = ..., reason: _Optional[str] = ..., examples: _Optional[int] = ..., steps: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., seconds: _Optional[_Mapping[str, float]] = ...) -> None: ...

class TaskView(_message.Message):
    __slots__ = ("id", "site", "kind", "state", "round", "progress", "reason", "generation")
    ID_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    id: str
    site: str
    kind: _agent_pb2.TaskKind
    state: TaskState
    round: int
    progress: _agent_pb2.Progress
    reason: str
    generation: int
    def __init__(self, id: _Optional[str] = ..., site: _Optional[str] = ..., kind: _Optional[_Union[_agent_pb2.TaskKind, str]] = ..., state: _Optional[_Union[TaskState, str]] = ..., round: _Optional[int] = ..., progress: _Optional[_Union[_agent_pb2.Progress, _Mapping]] = ..., reason: _Optional[str] = ..., generation: _Optional[int] = ...) -> None: ...

class EvaluationView(_message.Message):
    __slots__ = ("version", "site", "split", "examples", "metrics")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    version: int
    site: str
    split: str
    examples: int
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, version: _Optional[int] = ..., site: _Optional[str] = ..., split: _Optional[str] = ..., examples: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class ListEventsRequest(_message.Message):
    __slots__ = ("job", "after_id")
    JOB_FIELD_NUMBER: _ClassVar[int]
    AFTER_ID_FIELD_NUMBER: _ClassVar[int]
    job: str
    after_id: int
    def __init__(self, job: _Optional[str] = ..., after_id: _Optional[int] = ...) -> None: ...

class ListEventsResponse(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[EventView]
    def __init__(self, events: _Optional[_Iterable[_Union[EventView, _Mapping]]] = ...) -> None: ...

class EventView(_message.Message):
    __slots__ = ("id", "unix_seconds", "round", "sentence")
    ID_FIELD_NUMBER: _ClassVar[int]
    UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SENTENCE_FIELD_NUMBER: _ClassVar[int]
    id: int
    unix_seconds: float
    round: int
    sentence: str
    def __init__(self, id: _Optional[int] = ..., unix_seconds: _Optional[float] = ..., round: _Optional[int] = ..., sentence: _Optional[str] = ...) -> None: ...

class ControlJobRequest(_message.Message):
    __slots__ = ("job", "action", "site")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    job: str
    action: JobAction
    site: str
    def __init__(self, job: _Optional[str] = ..., action: _Optional[_Union[JobAction, str]] = ..., site: _Optional[str] = ...) -> None: ...

class ControlJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: JobView
    def __init__(self, job: _Optional[_Union[JobView, _Mapping]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("job", "version")
    JOB_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    job: str
    version: int
    def __init__(self, job: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("job_id", "version", "model", "files", "base_digest", "evaluations", "contributors", "spec_json")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTORS_FIELD_NUMBER: _ClassVar[int]
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    version: int
    model: _manifest_pb2.BlobRef
    files: _containers.RepeatedCompositeFieldContainer[_manifest_pb2.FileRef]
    base_digest: str
    evaluations: _containers.RepeatedCompositeFieldContainer[EvaluationView]
    contributors: _containers.RepeatedCompositeFieldContainer[UpdateView]
    spec_json: str
    def __init__(self, job_id: _Optional[str] = ..., version: _Optional[int] = ..., model: _Optional[_Union[_manifest_pb2.BlobRef, _Mapping]] = ..., files: _Optional[_Iterable[_Union[_manifest_pb2.FileRef, _Mapping]]] = ..., base_digest: _Optional[str] = ..., evaluations: _Optional[_Iterable[_Union[EvaluationView, _Mapping]]] = ..., contributors: _Optional[_Iterable[_Union[UpdateView, _Mapping]]] = ..., spec_json: _Optional[str] = ...) -> None: ...

class AddBaseModelRequest(_message.Message):
    __slots__ = ("name", "files")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    name: str
    files: _containers.RepeatedCompositeFieldContainer[_manifest_pb2.FileRef]
    def __init__(self, name: _Optional[str] = ..., files: _Optional[_Iterable[_Union[_manifest_pb2.FileRef, _Mapping]]] = ...) -> None: ...

class AddBaseModelResponse(_message.Message):
    __slots__ = ("digest", "missing")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    digest: str
    missing: _containers.RepeatedCompositeFieldContainer[_manifest_pb2.FileRef]
    def __init__(self, digest: _Optional[str] = ..., missing: _Optional[_Iterable[_Union[_manifest_pb2.FileRef, _Mapping]]] = ...) -> None: ...

class RemoveBaseModelRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class RemoveBaseModelResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListBaseModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListBaseModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[BaseModelView]
    def __init__(self, models: _Optional[_Iterable[_Union[BaseModelView, _Mapping]]] = ...) -> None: ...

class BaseModelView(_message.Message):
    __slots__ = ("name", "digest", "files", "complete")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    files: _containers.RepeatedCompositeFieldContainer[_manifest_pb2.FileRef]
    complete: bool
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., files: _Optional[_Iterable[_Union[_manifest_pb2.FileRef, _Mapping]]] = ..., complete: _Optional[bool] = ...) -> None: ...

class InviteSiteRequest(_message.Message):
    __slots__ = ("name", "house", "valid_seconds")
    NAME_FIELD_NUMBER: _ClassVar[int]
    HOUSE_FIELD_NUMBER: _ClassVar[int]
    VALID_SECONDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    house: bool
    valid_seconds: float
    def __init__(self, name: _Optional[str] = ..., house: _Optional[bool] = ..., valid_seconds: _Optional[float] = ...) -> None: ...

class InviteSiteResponse(_message.Message):
    __slots__ = ("token", "expires_unix_seconds")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    token: str
    expires_unix_seconds: float
    def __init__(self, token: _Optional[str] = ..., expires_unix_seconds: _Optional[float] = ...) -> None: ...

class ListSitesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListSitesResponse(_message.Message):
    __slots__ = ("sites",)
    SITES_FIELD_NUMBER: _ClassVar[int]
    sites: _containers.RepeatedCompositeFieldContainer[SiteView]
    def __init__(self, sites: _Optional[_Iterable[_Union[SiteView, _Mapping]]] = ...) -> None: ...

class SiteView(_message.Message):
    __slots__ = ("name", "house", "state", "connected", "last_seen_unix_seconds", "certificate_expires_unix_seconds", "agent", "paused")
    NAME_FIELD_NUMBER: _ClassVar[int]
    HOUSE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_EXPIRES_UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    name: str
    house: bool
    state: str
    connected: bool
    last_seen_unix_seconds: float
    certificate_expires_unix_seconds: float
    agent: _agent_pb2.AgentInfo
    paused: bool
    def __init__(self, name: _Optional[str] = ..., house: _Optional[bool] = ..., state: _Optional[str] = ..., connected: _Optional[bool] = ..., last_seen_unix_seconds: _Optional[float] = ..., certificate_expires_unix_seconds: _Optional[float] = ..., agent: _Optional[_Union[_agent_pb2.AgentInfo, _Mapping]] = ..., paused: _Optional[bool] = ...) -> None: ...

class RevokeSiteRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class RevokeSiteResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
