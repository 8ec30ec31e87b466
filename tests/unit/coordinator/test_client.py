from __future__ import annotations

import re
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

from coordinator import ca, settings
from coordinator.client import OperatorClient, facts, load_profile
from protos.errors import Conflict, CorruptData, NotFound, Unauthenticated, Unavailable
from protos.v1 import operator_pb2

LIST = operator_pb2.ListJobsRequest()


def test_a_refusal_arrives_as_the_class_that_the_coordinator_raised(door: Any):
    with OperatorClient(load_profile(door.profile())) as client, pytest.raises(NotFound) as caught:
        client.ask("GetJob", operator_pb2.GetJobRequest(job="nope"))
    assert caught.value.message == "There is no job 'nope'."
    assert caught.value.hint == "`silotune job list` shows them all."


def test_a_coordinator_that_does_not_run_is_named_with_what_to_check(door: Any):
    door.stop()
    with OperatorClient(load_profile(door.profile())) as client, pytest.raises(Unavailable) as caught:
        client.ask("ListJobs", LIST)
    assert caught.value.message == f"The coordinator at {door.address} cannot be reached: nothing listens there."
    assert "silotune-coordinator serve" in caught.value.hint


def test_a_coordinator_of_another_federation_is_not_trusted(door: Any):
    directory = Path(door.profile())
    (directory / "ca.pem").write_bytes(ca.create(now=ca.utc_now()).pem)
    with OperatorClient(load_profile(str(directory))) as client, pytest.raises(Unavailable) as caught:
        client.ask("ListJobs", LIST)
    assert "its certificate is not from the CA in this profile" in caught.value.message


def test_a_coordinator_under_a_name_that_is_not_in_its_certificate_is_not_trusted(door: Any):
    directory = Path(door.profile())
    (directory / "profile.toml").write_text(f'address = "127.0.0.1:{door.port}"\n')
    with OperatorClient(load_profile(str(directory))) as client, pytest.raises(Unavailable) as caught:
        client.ask("ListJobs", LIST)
    assert "its certificate is for another host name" in caught.value.message


def test_an_expired_certificate_is_said_to_be_expired(door: Any):
    profile = load_profile(door.profile(valid_days=-0.001))
    with OperatorClient(profile) as client, pytest.raises(Unauthenticated, match="expired on 20"):
        client.ask("ListJobs", LIST)


def test_a_missing_profile_says_who_writes_one(tmp_path: Path):
    with pytest.raises(Unauthenticated) as caught:
        load_profile(str(tmp_path / "none"))
    assert "profile.toml is missing" in caught.value.message
    assert "silotune-coordinator init" in caught.value.hint


def test_a_profile_without_an_address_is_refused(door: Any):
    directory = Path(door.profile())
    (directory / "profile.toml").write_text("host = 'localhost'\n")
    with pytest.raises(Unauthenticated, match="does not name the coordinator's address"):
        load_profile(str(directory))


def test_a_blob_is_read_from_any_offset_in_frames(door: Any):
    content = bytes(range(256)) * 8192
    blob = door.add_blob(content)
    with OperatorClient(load_profile(door.profile())) as client:
        read = [(frame.offset, bytes(frame.data)) for frame in client.read(blob.digest, offset=1000)]
    assert [offset for offset, _ in read] == [1000, 1000 + (1 << 20)]
    assert b"".join(data for _, data in read) == content[1000:]


def test_a_flipped_bit_in_a_frame_is_noticed(door: Any):
    blob = door.add_blob(b"x" * 5000)
    door.on_frame = lambda frame: frame[:-1] + b"y"
    with OperatorClient(load_profile(door.profile())) as client, pytest.raises(CorruptData):
        list(client.read(blob.digest, offset=0))


def test_facts_are_plain_values():
    view = operator_pb2.JobView(id="j1", state=operator_pb2.JOB_STATE_RUNNING, round=2, head_version=1)
    found = facts(operator_pb2.ListJobsResponse(jobs=[view]))["jobs"][0]
    assert (found["state"], found["head_version"], found["best_version"]) == ("RUNNING", 1, None)
    update = operator_pb2.UpdateView(site="gard", metrics={"loss": 0.5})
    assert facts(update) == {
        "site": "gard",
        "fate": "",
        "reason": "",
        "examples": 0,
        "steps": 0,
        "metrics": {"loss": 0.5},
        "seconds": {},
    }


def test_a_port_that_does_not_speak_tls_is_said_to_be_another(door: Any):
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("localhost:0")
    server.start()
    directory = Path(door.profile())
    (directory / "profile.toml").write_text(f'address = "localhost:{port}"\n')
    with OperatorClient(load_profile(str(directory))) as client, pytest.raises(Unavailable) as caught:
        client.ask("ListJobs", LIST)
    server.stop(grace=None)
    assert "does not speak this TLS" in caught.value.message


@pytest.mark.parametrize(("address", "insecure"), [("127.0.0.1:9443", True), ("fl.example.org:9443", False)])
def test_tls_is_left_out_on_this_machine_only(door: Any, address: str, insecure: bool):
    directory = Path(door.profile())
    (directory / "profile.toml").write_text(f'address = "{address}"\ninsecure_loopback = true\n')
    assert load_profile(str(directory)).insecure_loopback is insecure


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_a_profile_is_looked_for_where_init_writes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr("sys.platform", platform)
    for name in ("default", "~/fed/operator"):
        directory = settings.profile_directory(name)
        assert directory.is_relative_to(tmp_path)
        with pytest.raises(Unauthenticated, match=re.escape(f"There is no operator profile in {directory}:")):
            load_profile(name)


def test_an_error_is_made_printable_too(door: Any):
    door.trouble = Conflict("gard\x1b[31m said\nno.", hint="Ask \u202egard.")
    with OperatorClient(load_profile(door.profile())) as client, pytest.raises(Conflict) as caught:
        client.ask("ListJobs", LIST)
    assert (caught.value.message, caught.value.hint) == ("gard[31m saidno.", "Ask gard.")


def test_a_recipe_is_left_as_it_is_to_the_letter(door: Any):
    door.jobs["j1"] = operator_pb2.GetJobResponse(spec_json='{"name":"a\u202eb"}')
    with OperatorClient(load_profile(door.profile())) as client:
        assert client.ask("GetJob", operator_pb2.GetJobRequest(job="j1")).spec_json == '{"name":"a\u202eb"}'


def test_of_several_addresses_one_that_answers_is_enough_and_kept(door: Any):
    directory = Path(door.profile())
    (directory / "profile.toml").write_text(f'address = "localhost:1,{door.address}"\n')
    blob = door.add_blob(b"x" * 10)
    with OperatorClient(load_profile(str(directory))) as client:
        assert not client.ask("ListJobs", LIST).jobs
        assert [bytes(frame.data) for frame in client.read(blob.digest, offset=0)] == [b"x" * 10]
    door.stop()
    with OperatorClient(load_profile(str(directory))) as client, pytest.raises(Unavailable, match="nothing listens"):
        client.ask("ListJobs", LIST)


def test_a_coordinator_with_a_certificate_of_another_ca_needs_the_profiles_ca_bundle(door: Any):
    directory = Path(door.profile())
    (directory / "hospital.pem").write_bytes((directory / "ca.pem").read_bytes())
    (directory / "ca.pem").write_bytes(ca.create(now=ca.utc_now()).pem)
    with OperatorClient(load_profile(str(directory))) as client, pytest.raises(Unavailable) as caught:
        client.ask("ListJobs", LIST)
    assert "name a file with that CA as ca_bundle" in caught.value.hint
    (directory / "profile.toml").write_text(f'address = "{door.address}"\nca_bundle = "hospital.pem"\n')
    with OperatorClient(load_profile(str(directory))) as client:
        assert not client.ask("ListJobs", LIST).jobs
