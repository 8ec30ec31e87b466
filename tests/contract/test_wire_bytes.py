"""Bytes that agents in the field already send and read. A change here is a change of the wire: it needs a new version.

`buf breaking` compares the .proto files with those of an earlier commit; these bytes hold also where buf did not run,
and they hold the parts that no .proto file describes: frames, tensor headers and tokens.
"""

from __future__ import annotations

import base64

import pytest
from google.protobuf.message import Message

from protos import frames, tensors
from protos.errors import LeaseFenced, to_details
from protos.identity import JoinToken
from protos.v1 import agent_pb2, manifest_pb2, operator_pb2, transfer_pb2

BLOB = manifest_pb2.BlobRef(digest="ab12", size=300)
MESSAGES: dict[str, tuple[Message, str]] = {
    "blob": (
        BLOB,
        "0a046162313210ac02",
    ),
    "manifest": (
        manifest_pb2.Manifest(blob=BLOB, encoding="ENCODING_RAW", form="FORM_VALUES", base_version=7),
        "0a090a046162313210ac02100118012007",
    ),
    "lease": (
        agent_pb2.LeaseTaskRequest(
            agent=agent_pb2.AgentInfo(
                version="0.1.0",
                device="cpu",
                data_sets=[agent_pb2.DataSetInfo(name="notes", rows=12)],
                base_models=[agent_pb2.BaseModelInfo(name="minilm", digest="d", parameters=1, size_bytes=2)],
                memory_bytes=3,
                free_disk_bytes=4,
            ),
            wait_seconds=20,
        ),
        "0a2c0a05302e312e3012036370751a090a056e6f746573100c220f0a066d696e696c6d1201641801200228033004110000000000003440",
    ),
    "task": (
        agent_pb2.Task(
            id="t",
            job_id="j",
            round=2,
            kind="TASK_KIND_TRAIN",
            spec_json="{}",
            spec_hash="h",
            base_digest="b",
            version=1,
            model=BLOB,
            seed=9,
            split="validation",
            generation=3,
            lease_seconds=60,
        ),
        "0a017412016a180220022a027b7d3201683a016240014a090a046162313210ac0250095a0a76616c69646174696f6e6003690000000000004e40",
    ),
    "heartbeat": (
        agent_pb2.HeartbeatRequest(
            task_id="t",
            generation=3,
            progress=agent_pb2.Progress(stage="STAGE_TRAINING", done=1, total=8, unit="steps", metrics={"loss": 0.5}),
        ),
        "0a017410031a1e080410011808220573746570732a0f0a046c6f737311000000000000e03f",
    ),
    "succeeded": (
        agent_pb2.FinishTaskRequest(
            task_id="t",
            generation=3,
            succeeded=agent_pb2.Succeeded(
                manifest=manifest_pb2.Manifest(blob=BLOB),
                examples=100,
                steps=8,
                metrics={"loss": 0.5},
                seconds={"train": 2.0},
                files=[manifest_pb2.FileRef(name="config.json", blob=BLOB)],
                base_digest="b",
            ),
        ),
        "0a017410031a510a0b0a090a046162313210ac0210641808220f0a046c6f737311000000000000e03f2a100a05747261696e11000000000000004032180a0b636f6e6669672e6a736f6e12090a046162313210ac023a0162",
    ),
    "failed": (
        agent_pb2.FinishTaskRequest(task_id="t", generation=3, failed=agent_pb2.Failed(reason="r", hint="h")),
        "0a0174100322060a0172120168",
    ),
    "declined": (
        agent_pb2.FinishTaskRequest(task_id="t", generation=3, declined=agent_pb2.Declined(reason="r")),
        "0a017410032a030a0172",
    ),
    "fate": (agent_pb2.FinishTaskResponse(fate="FATE_DISCARDED", reason="late"), "080312046c617465"),
    "enroll": (agent_pb2.EnrollRequest(token="t", csr=b"c"), "0a0174120163"),
    "read": (transfer_pb2.ReadRequest(digest="d", offset=1 << 32), "0a0164108080808010"),
    "target": (
        transfer_pb2.WriteRequest(target=transfer_pb2.UploadTarget(task_id="t", generation=3, blob=BLOB)),
        "22100a017410031a090a046162313210ac02",
    ),
    "written": (transfer_pb2.WriteResponse(committed_size=1 << 20, sealed=True), "088080401001"),
    "submit": (operator_pb2.SubmitJobRequest(spec_json="{}", dry_run=True, submit_token="s"), "0a027b7d10011a0173"),
    "model": (operator_pb2.GetModelRequest(job="j", version=0), "0a016a1000"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_keeps_its_bytes(name: str) -> None:
    message, expected = MESSAGES[name]
    assert message.SerializeToString(deterministic=True).hex() == expected
    assert type(message).FromString(bytes.fromhex(expected)) == message


def test_a_frame_keeps_its_bytes() -> None:
    assert (
        frames.encode(b"silotune", offset=1 << 20).hex() == "090000100000000000118f98e76dffa486b31a0873696c6f74756e65"
    )
    assert frames.encode(b"", offset=0).hex() == "09000000000000000011c294d3380580062d1a00"


def test_a_tensor_header_keeps_its_bytes() -> None:
    header, _ = tensors.make_header([("b", "F32", (2, 3)), ("a", "BF16", ())])
    assert header == (
        b"\x90\x00\x00\x00\x00\x00\x00\x00"
        b'{"__metadata__":{"format":"pt"},'
        b'"a":{"dtype":"BF16","shape":[],"data_offsets":[0,2]},'
        b'"b":{"dtype":"F32","shape":[2,3],"data_offsets":[2,26]}}   '
    )


def test_an_error_keeps_its_bytes() -> None:
    error = LeaseFenced("Task t was granted again.", hint="Drop it.")
    assert base64.b64encode(to_details(error, code_number=9)).decode() == (
        "CAkSGVRhc2sgdCB3YXMgZ3JhbnRlZCBhZ2Fpbi4aVQoodHlwZS5nb29nbGVhcGlzLmNvbS9nb29nbGUu"
        "cnBjLkVycm9ySW5mbxIpCgtMZWFzZUZlbmNlZBIIc2lsb3R1bmUaEAoEaGludBIIRHJvcCBpdC4="
    )


def test_a_token_keeps_its_text() -> None:
    assert (
        JoinToken("a", "b", "c:1", "ZA==").encode()
        == "silo1.eyJuYW1lIjoiYSIsInNlY3JldCI6ImIiLCJlbnJvbGxtZW50X2FkZHJlc3MiOiJjOjEiLCJjYSI6IlpBPT0ifQ"
    )


def test_the_services_keep_their_calls() -> None:
    """Their full names are the HTTP/2 paths that proxies and firewalls at the sites let through."""
    calls = {
        service.full_name: sorted(method.name for method in service.methods)
        for file in (agent_pb2, transfer_pb2, operator_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
    }
    assert calls == {
        "silotune.v1.EnrollmentService": ["Enroll"],
        "silotune.v1.AgentService": ["FinishTask", "Heartbeat", "LeaseTask", "RenewCertificate"],
        "silotune.v1.TransferService": ["FindMissing", "QueryWriteStatus", "Read", "Write"],
        "silotune.v1.OperatorService": [
            "AddBaseModel",
            "ControlJob",
            "GetJob",
            "GetModel",
            "InviteSite",
            "ListBaseModels",
            "ListEvents",
            "ListJobs",
            "ListSites",
            "RemoveBaseModel",
            "RevokeSite",
            "SubmitJob",
        ],
    }


def test_no_request_names_the_site_that_sends_it() -> None:
    """Identity comes from the client certificate only."""
    for service in (
        agent_pb2.DESCRIPTOR.services_by_name["AgentService"],
        *transfer_pb2.DESCRIPTOR.services_by_name.values(),
    ):
        for method in service.methods:
            assert not {"site", "site_name", "name"} & {field.name for field in method.input_type.fields}, (
                method.full_name
            )
