"""The store's records as the operator's messages."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.json_format import ParseDict

from coordinator.rounds.state import Evaluation, Task
from coordinator.storage.base_models import BaseModelRow
from coordinator.storage.sites import SiteRow
from coordinator.storage.views import EventRecord, JobRecord, RoundRecord, UpdateRecord
from protos.identity import Role
from protos.v1 import agent_pb2
from protos.v1 import operator_pb2 as pb
from protos.v1.manifest_pb2 import BlobRef, FileRef


def job(record: JobRecord) -> pb.JobView:
    return pb.JobView(
        id=record.id,
        name=record.spec.name,
        state=f"JOB_STATE_{record.state.value}",
        sentence=record.sentence,
        round=record.round,
        rounds=record.spec.rounds,
        head_version=record.head_version,
        best_version=record.best_version,
        service_seconds=record.service_seconds,
        eta_seconds=record.eta_seconds,
        created_unix_seconds=record.created_unix_seconds,
    )


def round_(record: RoundRecord) -> pb.RoundView:
    return pb.RoundView(
        number=record.number,
        phase=f"ROUND_PHASE_{record.phase.value}",
        sentence=record.sentence,
        cohort=record.cohort,
        seconds=record.seconds,
        bytes_up=record.bytes_up,
        bytes_down=record.bytes_down,
        updates=[update(one) for one in record.updates],
        attempt=record.attempt,
        metrics=record.metrics,
        undistilled=record.undistilled,
    )


def update(record: UpdateRecord) -> pb.UpdateView:
    return pb.UpdateView(
        site=record.site,
        fate=f"FATE_{record.fate.value}",
        reason=record.reason,
        examples=record.examples,
        steps=record.steps,
        metrics=record.metrics,
        seconds=record.seconds,
    )


def task(record: Task) -> pb.TaskView:
    return pb.TaskView(
        id=record.id,
        site=record.site,
        kind=f"TASK_KIND_{record.kind.value}",
        state=f"TASK_STATE_{record.state.value}",
        round=record.round,
        progress=agent_pb2.Progress(
            stage=f"STAGE_{record.stage or 'UNSPECIFIED'}",
            done=record.done,
            total=record.total,
            unit=record.unit,
            metrics=record.metrics,
        ),
        reason=record.reason,
        generation=record.generation,
    )


def evaluation(record: Evaluation) -> pb.EvaluationView:
    return pb.EvaluationView(
        version=record.version,
        site=record.site,
        split=record.split,
        examples=record.examples,
        metrics=record.metrics,
    )


def event(record: EventRecord) -> pb.EventView:
    return pb.EventView(id=record.id, unix_seconds=record.unix_seconds, round=record.round, sentence=record.sentence)


def base_model(row: BaseModelRow) -> pb.BaseModelView:
    return pb.BaseModelView(name=row.name, digest=row.digest, files=file_refs(row.files), complete=row.complete)


def file_refs(files: Iterable[tuple[str, str, int]]) -> list[FileRef]:
    """Of (name, digest, size)."""
    return [FileRef(name=name, blob=BlobRef(digest=digest, size=size)) for name, digest, size in files]


def site(row: SiteRow, *, paused: bool, now_unix_seconds: float) -> pb.SiteView:
    return pb.SiteView(
        name=row.name,
        house=row.role is Role.HOUSE,
        state=row.state,
        connected=row.connected(now_unix_seconds=now_unix_seconds),
        last_seen_unix_seconds=row.last_seen_unix_seconds,
        certificate_expires_unix_seconds=row.certificate_expires_unix_seconds,
        # An older or newer agent may have said more of itself than this coordinator knows.
        agent=ParseDict(dict(row.agent), agent_pb2.AgentInfo(), ignore_unknown_fields=True),
        paused=paused,
    )
