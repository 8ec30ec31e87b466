"""What `silotune lab run` writes down."""

from __future__ import annotations

from deploy.lab.run import metrics_of, with_earlier
from protos import jobspec
from protos.v1 import operator_pb2 as pb

SPEC = jobspec.parse(
    {"name": "long", "rounds": 9, "task": {"type": "synthetic", "payload_mb": 0.01}, "local": {"steps": 1}}
)


def told(first: int, last: int, *, undistilled: str = "") -> pb.GetJobResponse:
    """A coordinator's answer that has these rounds, each with its evaluation."""
    return pb.GetJobResponse(
        spec_json=SPEC.canonical_json,
        rounds=[
            pb.RoundView(number=number, phase="ROUND_PHASE_COMMITTED", bytes_up=last, undistilled=undistilled)
            for number in range(first, last + 1)
        ],
        evaluations=[
            pb.EvaluationView(version=number, site="house", split="validation", metrics={"loss": 1.0})
            for number in range(first, last + 1)
        ],
    )


def test_rounds_that_the_coordinator_tells_no_more_are_kept() -> None:
    before = with_earlier(metrics_of(told(0, 3), rows={}), None)
    found = with_earlier(metrics_of(told(2, 5), rows={}), before)
    assert found["initial"]["number"] == 0
    # Of a round that both tell of, the later word counts.
    assert [(entry["number"], entry["bytes_up"]) for entry in found["rounds"]] == [
        (1, 3),
        *((n, 5) for n in range(2, 6)),
    ]
    assert [entry["version"] for entry in found["evaluations"]] == [0, 1, 2, 3, 4, 5]


def test_a_round_says_why_it_was_not_distilled() -> None:
    (entry,) = metrics_of(told(1, 1, undistilled="house declined: no teacher"), rows={})["rounds"]
    assert entry["undistilled"] == "house declined: no teacher"
