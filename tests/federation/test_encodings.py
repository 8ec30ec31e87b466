"""A job whose tensors travel in few bits: the bytes on the wire are those of arithmetic, every site has the very
version that was committed, and a killed agent adds nothing twice."""

from __future__ import annotations

import signal

import pytest

from client_agent.synthetic import tensor_shapes
from coordinator.client import OperatorClient, load_profile
from protos.encodings import encoded_header
from protos.v1 import operator_pb2
from tests.federation.conftest import Jobs

SITES = ("alfa", "bravo", "charlie")
ENCODED = '[encoding]\nup = "int4"\ndown = "int8"\n'
ROUNDS = 3


def size_of(encoding: str) -> int:
    layout = encoded_header(tensor_shapes(1_000_000), encoding=encoding, block=64)[1]
    bits = {"int8": 8, "int4": 4}[encoding] + 16 / 64
    assert layout.data_bytes == pytest.approx(1_000_000 / 4 * bits / 8, rel=0.01)
    return layout.file_bytes


def committed(jobs: Jobs, job: str) -> str:
    """The digest of the last version."""
    with OperatorClient(load_profile(str(jobs.federation.profile))) as client:
        return client.ask("GetModel", operator_pb2.GetModelRequest(job=job, version=ROUNDS)).model.digest


def test_an_encoded_job_sends_the_bytes_of_arithmetic_and_survives_a_kill_before_the_upload(three_sites: Jobs) -> None:
    federation = three_sites.federation
    job = three_sites.submit(rounds=ROUNDS, more=ENCODED)
    ended = three_sites.end(job)
    assert ended["job"]["state"] == "COMPLETED", ended["job"]["sentence"]

    rounds = {int(one["number"]): one for one in ended["rounds"]}
    for number in range(1, ROUNDS + 1):
        up, down = int(rounds[number].get("bytes_up", 0)), int(rounds[number].get("bytes_down", 0))
        assert up == len(SITES) * size_of("int4")
        # In round 1 every site makes version 0 by itself.
        assert down == (0 if number == 1 else len(SITES) * size_of("int8"))
    for site in SITES:
        assert "The whole version is fetched" not in federation.nodes[site].log.read_text()
        assert three_sites.trained(site, job) == list(range(1, ROUNDS + 1))

    # The same recipe once more. After round 1, when there are residuals, the coordinator stands still while alfa
    # trains, so that alfa is killed between its training and its upload.
    three_sites.hold("alfa", 2)
    again = three_sites.submit(rounds=ROUNDS, more=ENCODED)
    three_sites.wait_for_training("alfa", again, round_number=2)
    coordinator = federation.nodes["coordinator"]
    coordinator.kill(signal.SIGSTOP)
    three_sites.let_go("alfa", 2)
    federation.wait_for(
        lambda: len(three_sites.lines("alfa", again, "The result is sealed.")) == 2, seconds=300, saying="a result"
    )
    federation.nodes["alfa"].kill()
    coordinator.kill(signal.SIGCONT)
    kept = federation.home("alfa") / "jobs" / again
    assert {path.name for path in kept.glob("residual*")} == {"residual-1.safetensors", "residual-2.safetensors"}
    # What is damaged is noticed and made again.
    (kept / "initial.safetensors").write_bytes(b"torn")
    federation.start_agent("alfa", wait=False)
    assert three_sites.end(again)["job"]["state"] == "COMPLETED"
    assert three_sites.lines("alfa", again, "offered again") and three_sites.trained("alfa", again) == [1, 2, 3]
    assert committed(three_sites, again) == committed(three_sites, job)

    # Nothing of a job stays at a site once it has heard of its end.
    for site in SITES:
        states = federation.home(site) / "jobs"
        federation.wait_for(
            lambda states=states: not list(states.iterdir()), seconds=300, saying=f"{site} hearing of the end"
        )
