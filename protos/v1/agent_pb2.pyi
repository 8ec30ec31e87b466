from protos.v1 import manifest_pb2 as _manifest_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TaskKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_KIND_UNSPECIFIED: _ClassVar[TaskKind]
    TASK_KIND_INIT: _ClassVar[TaskKind]
    TASK_KIND_TRAIN: _ClassVar[TaskKind]
    TASK_KIND_EVALUATE: _ClassVar[TaskKind]
    TASK_KIND_DISTILL: _ClassVar[TaskKind]

class Stage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STAGE_UNSPECIFIED: _ClassVar[Stage]
    STAGE_APPROVING: _ClassVar[Stage]
    STAGE_FETCHING: _ClassVar[Stage]
    STAGE_LOADING: _ClassVar[Stage]
    STAGE_TRAINING: _ClassVar[Stage]
    STAGE_EVALUATING: _ClassVar[Stage]
    STAGE_UPLOADING: _ClassVar[Stage]
    STAGE_PAUSED: _ClassVar[Stage]
    STAGE_WAITING_FOR_DISK: _ClassVar[Stage]

class Fate(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FATE_UNSPECIFIED: _ClassVar[Fate]
    FATE_ACCEPTED: _ClassVar[Fate]
    FATE_REJECTED: _ClassVar[Fate]
    FATE_DISCARDED: _ClassVar[Fate]
TASK_KIND_UNSPECIFIED: TaskKind
TASK_KIND_INIT: TaskKind
TASK_KIND_TRAIN: TaskKind
TASK_KIND_EVALUATE: TaskKind
TASK_KIND_DISTILL: TaskKind
STAGE_UNSPECIFIED: Stage
STAGE_APPROVING: Stage
STAGE_FETCHING: Stage
STAGE_LOADING: Stage
STAGE_TRAINING: Stage
STAGE_EVALUATING: Stage
STAGE_UPLOADING: Stage
STAGE_PAUSED: Stage
STAGE_WAITING_FOR_DISK: Stage
FATE_UNSPECIFIED: Fate
FATE_ACCEPTED: Fate
FATE_REJECTED: Fate
FATE_DISCARDED: Fate

class EnrollRequest(_message.Message):
    __slots__ = ("token", "csr")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    CSR_FIELD_NUMBER: _ClassVar[int]
    token: str
    csr: bytes
    def __init__(self, token: _Optional[str] = ..., csr: _Optional[bytes] = ...) -> None: ...

class EnrollResponse(_message.Message):
    __slots__ = ("name", "certificate")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    name: str
    certificate: bytes
    def __init__(self, name: _Optional[str] = ..., certificate: _Optional[bytes] = ...) -> None: ...

class RenewCertificateRequest(_message.Message):
    __slots__ = ("csr",)
    CSR_FIELD_NUMBER: _ClassVar[int]
    csr: bytes
    def __init__(self, csr: _Optional[bytes] = ...) -> None: ...

class RenewCertificateResponse(_message.Message):
    __slots__ = ("certificate",)
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    def __init__(self, certificate: _Optional[bytes] = ...) -> None: ...

class DataSetInfo(_message.Message):
    __slots__ = ("name", "rows")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    name: str
    rows: int
    def __init__(self, name: _Optional[str] = ..., rows: _Optional[int] = ...) -> None: ...

class BaseModelInfo(_message.Message):
    __slots__ = ("name", "digest", "parameters", "size_bytes", "hidden_size", "layers", "linear", "vocabulary")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    LINEAR_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    parameters: int
    size_bytes: int
    hidden_size: int
    layers: int
    linear: _containers.RepeatedCompositeFieldContainer[LinearLayers]
    vocabulary: int
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., parameters: _Optional[int] = ..., size_bytes: _Optional[int] = ..., hidden_size: _Optional[int] = ..., layers: _Optional[int] = ..., linear: _Optional[_Iterable[_Union[LinearLayers, _Mapping]]] = ..., vocabulary: _Optional[int] = ...) -> None: ...

class LinearLayers(_message.Message):
    __slots__ = ("name", "out_features", "in_features", "count")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OUT_FEATURES_FIELD_NUMBER: _ClassVar[int]
    IN_FEATURES_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    name: str
    out_features: int
    in_features: int
    count: int
    def __init__(self, name: _Optional[str] = ..., out_features: _Optional[int] = ..., in_features: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class AgentInfo(_message.Message):
    __slots__ = ("version", "device", "data_sets", "base_models", "memory_bytes", "free_disk_bytes", "gpu_memory_bytes", "gpus")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DATA_SETS_FIELD_NUMBER: _ClassVar[int]
    BASE_MODELS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    GPU_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    version: str
    device: str
    data_sets: _containers.RepeatedCompositeFieldContainer[DataSetInfo]
    base_models: _containers.RepeatedCompositeFieldContainer[BaseModelInfo]
    memory_bytes: int
    free_disk_bytes: int
    gpu_memory_bytes: int
    gpus: int
    def __init__(self, version: _Optional[str] = ..., device: _Optional[str] = ..., data_sets: _Optional[_Iterable[_Union[DataSetInfo, _Mapping]]] = ..., base_models: _Optional[_Iterable[_Union[BaseModelInfo, _Mapping]]] = ..., memory_bytes: _Optional[int] = ..., free_disk_bytes: _Optional[int] = ..., gpu_memory_bytes: _Optional[int] = ..., gpus: _Optional[int] = ...) -> None: ...

class LeaseTaskRequest(_message.Message):
    __slots__ = ("agent", "wait_seconds", "holding", "keeps")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    HOLDING_FIELD_NUMBER: _ClassVar[int]
    KEEPS_FIELD_NUMBER: _ClassVar[int]
    agent: AgentInfo
    wait_seconds: float
    holding: _containers.RepeatedScalarFieldContainer[str]
    keeps: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, agent: _Optional[_Union[AgentInfo, _Mapping]] = ..., wait_seconds: _Optional[float] = ..., holding: _Optional[_Iterable[str]] = ..., keeps: _Optional[_Iterable[str]] = ...) -> None: ...

class LeaseTaskResponse(_message.Message):
    __slots__ = ("task", "sentence", "ended")
    TASK_FIELD_NUMBER: _ClassVar[int]
    SENTENCE_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    task: Task
    sentence: str
    ended: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, task: _Optional[_Union[Task, _Mapping]] = ..., sentence: _Optional[str] = ..., ended: _Optional[_Iterable[str]] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("id", "job_id", "round", "kind", "spec_json", "spec_hash", "base_digest", "version", "model", "seed", "split", "generation", "lease_seconds", "counted_round", "encoded", "initial", "base_files", "members")
    ID_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    SPEC_HASH_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COUNTED_ROUND_FIELD_NUMBER: _ClassVar[int]
    ENCODED_FIELD_NUMBER: _ClassVar[int]
    INITIAL_FIELD_NUMBER: _ClassVar[int]
    BASE_FILES_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    id: str
    job_id: str
    round: int
    kind: TaskKind
    spec_json: str
    spec_hash: str
    base_digest: str
    version: int
    model: _manifest_pb2.BlobRef
    seed: int
    split: str
    generation: int
    lease_seconds: float
    counted_round: int
    encoded: _manifest_pb2.Manifest
    initial: str
    base_files: _containers.RepeatedCompositeFieldContainer[_manifest_pb2.FileRef]
    members: _containers.RepeatedCompositeFieldContainer[Member]
    def __init__(self, id: _Optional[str] = ..., job_id: _Optional[str] = ..., round: _Optional[int] = ..., kind: _Optional[_Union[TaskKind, str]] = ..., spec_json: _Optional[str] = ..., spec_hash: _Optional[str] = ..., base_digest: _Optional[str] = ..., version: _Optional[int] = ..., model: _Optional[_Union[_manifest_pb2.BlobRef, _Mapping]] = ..., seed: _Optional[int] = ..., split: _Optional[str] = ..., generation: _Optional[int] = ..., lease_seconds: _Optional[float] = ..., counted_round: _Optional[int] = ..., encoded: _Optional[_Union[_manifest_pb2.Manifest, _Mapping]] = ..., initial: _Optional[str] = ..., base_files: _Optional[_Iterable[_Union[_manifest_pb2.FileRef, _Mapping]]] = ..., members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("blob", "weight")
    BLOB_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    blob: _manifest_pb2.BlobRef
    weight: float
    def __init__(self, blob: _Optional[_Union[_manifest_pb2.BlobRef, _Mapping]] = ..., weight: _Optional[float] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("stage", "done", "total", "unit", "metrics")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    STAGE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    stage: Stage
    done: int
    total: int
    unit: str
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, stage: _Optional[_Union[Stage, str]] = ..., done: _Optional[int] = ..., total: _Optional[int] = ..., unit: _Optional[str] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("task_id", "generation", "progress")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    generation: int
    progress: Progress
    def __init__(self, task_id: _Optional[str] = ..., generation: _Optional[int] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("proceed", "reason", "lease_seconds")
    PROCEED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    proceed: bool
    reason: str
    lease_seconds: float
    def __init__(self, proceed: _Optional[bool] = ..., reason: _Optional[str] = ..., lease_seconds: _Optional[float] = ...) -> None: ...

class Succeeded(_message.Message):
    __slots__ = ("manifest", "examples", "steps", "metrics", "seconds", "files", "base_digest")
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
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    manifest: _manifest_pb2.Manifest
    examples: int
    steps: int
    metrics: _containers.ScalarMap[str, float]
    seconds: _containers.ScalarMap[str, float]
    files: _containers.RepeatedCompositeFieldContainer[_manifest_pb2.FileRef]
    base_digest: str
    def __init__(self, manifest: _Optional[_Union[_manifest_pb2.Manifest, _Mapping]] = ..., examples: _Optional[int] = ..., steps: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., seconds: _Optional[_Mapping[str, float]] = ..., files: _Optional[_Iterable[_Union[_manifest_pb2.FileRef, _Mapping]]] = ..., base_digest: _Optional[str] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("reason", "hint")
    REASON_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    reason: str
    hint: str
    def __init__(self, reason: _Optional[str] = ..., hint: _Optional[str] = ...) -> None: ...

class Declined(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class FinishTaskRequest(_message.Message):
    __slots__ = ("task_id", "generation", "succeeded", "failed", "declined")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SUCCEEDED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    DECLINED_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    generation: int
    succeeded: Succeeded
    failed: Failed
    declined: Declined
    def __init__(self, task_id: _Optional[str] = ..., generation: _Optional[int] = ..., succeeded: _Optional[_Union[Succeeded, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., declined: _Optional[_Union[Declined, _Mapping]] = ...) -> None: ...

class FinishTaskResponse(_message.Message):
    __slots__ = ("fate", "reason")
    FATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    fate: Fate
    reason: str
    def __init__(self, fate: _Optional[_Union[Fate, str]] = ..., reason: _Optional[str] = ...) -> None: ...
