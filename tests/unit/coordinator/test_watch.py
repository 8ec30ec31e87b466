from __future__ import annotations

import io
import json
import threading
import time
from typing import Any

import pytest
from rich.console import Console

from coordinator import watch
from coordinator.client import OperatorClient, load_profile
from coordinator.terminal import Output
from protos import jobspec
from protos.v1 import agent_pb2, operator_pb2

SPEC = jobspec.parse(
    {
        "name": "questions",
        "task": {"type": "synthetic"},
        "local": {"steps": 2},
        "rounds": 3,
        "evaluation": {"where": ["sites", "house"]},
    }
)


def state_of(*, ended: operator_pb2.JobState | None = None, sentence: str = "round 2 waits") -> Any:
    """A job in round 2 of 3 with two sites, after one committed round."""
    update = operator_pb2.UpdateView(
        site="gard", fate=agent_pb2.FATE_ACCEPTED, examples=30, metrics={"loss": 1.0}, steps=2
    )
    rejected = operator_pb2.UpdateView(site="ninds", fate=agent_pb2.FATE_REJECTED, reason="Tensor 'a' has NaN.")
    return operator_pb2.GetJobResponse(
        job=operator_pb2.JobView(
            id="j1",
            name="questions",
            state=ended or operator_pb2.JOB_STATE_RUNNING,
            sentence=sentence,
            round=2,
            rounds=3,
            best_version=1,
            service_seconds=70,
            eta_seconds=125,
        ),
        rounds=[
            operator_pb2.RoundView(number=0, phase=operator_pb2.ROUND_PHASE_COMMITTED, cohort=["house"]),
            operator_pb2.RoundView(
                number=1,
                phase=operator_pb2.ROUND_PHASE_COMMITTED,
                cohort=["gard", "ninds"],
                seconds={"collecting": 9.0, "total": 10.5},
                bytes_up=2_000_000,
                bytes_down=4_000_000,
                updates=[update, rejected],
            ),
        ],
        tasks=[
            operator_pb2.TaskView(
                site="gard",
                kind=agent_pb2.TASK_KIND_TRAIN,
                state=operator_pb2.TASK_STATE_RUNNING,
                round=2,
                progress=agent_pb2.Progress(
                    stage=agent_pb2.STAGE_TRAINING, done=3, total=8, unit="steps", metrics={"loss": 0.75}
                ),
            ),
            operator_pb2.TaskView(
                site="ninds", kind=agent_pb2.TASK_KIND_TRAIN, state=operator_pb2.TASK_STATE_QUEUED, round=2
            ),
        ],
        evaluations=[
            _evaluation(0, "gard", rows=10, accuracy=0.2),
            _evaluation(0, "ninds", rows=30, accuracy=0.6),
            _evaluation(1, "gard", rows=10, accuracy=0.8),
            _evaluation(1, "house", rows=50, accuracy=0.7),
            operator_pb2.EvaluationView(version=1, site="house", split="test", examples=9, metrics={"accuracy": 0.1}),
        ],
        spec_json=SPEC.canonical_json,
    )


def _evaluation(version: int, site: str, *, rows: int, accuracy: float) -> Any:
    return operator_pb2.EvaluationView(
        version=version, site=site, split="validation", examples=rows, metrics={"accuracy": accuracy}
    )


def drawn(state: Any, *, house: set[str] = frozenset(), **options: Any) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(watch.picture(state, house=house, **options))
    return console.export_text()


def test_the_picture_says_where_the_job_stands():
    text = drawn(state_of())
    assert "questions (j1)  RUNNING  round 2 of 3  0:01:10 so far, about 0:02:05 to go" in text
    assert "round 2 waits" in text


def test_the_picture_says_who_is_at_what():
    rows = [line.split() for line in drawn(state_of()).splitlines()]
    gard = next(row for row in rows if row[:1] == ["gard"])
    assert gard[1:5] == ["trains", "round", "2", "training"]
    assert gard[-6:] == ["38", "%", "3", "of", "8", "steps"] or gard[-1] == "0.750"
    assert ["ninds", "trains", "round", "2", "has", "not", "taken", "it", "yet"] in rows


def test_the_picture_lists_the_rounds_that_are_done():
    rows = [line.split() for line in drawn(state_of()).splitlines()]
    done = ["1", "0.717", "1.000", "1", "of", "2,", "1", "rejected", "10.5", "2.0", "MB", "4.0", "MB"]
    assert done in rows
    assert any(row[:1] == ["0"] and "house" in row for row in rows)


def test_only_the_last_rounds_are_drawn_when_a_number_is_given():
    assert "made by house" not in drawn(state_of(), last_rounds=1)


def test_scores_are_means_over_the_sites_weighted_by_rows():
    state = state_of()
    del state.evaluations[3:]
    assert watch.scores(state, house=set()) == ("accuracy", {0: pytest.approx(0.5), 1: pytest.approx(0.8)})


def test_scores_are_the_house_agents_where_it_evaluates():
    assert watch.scores(state_of(), house={"house"}) == ("accuracy", {1: pytest.approx(0.7)})


def test_a_recipe_of_another_version_costs_only_the_curve():
    state = state_of()
    state.spec_json = '{"name": "questions", "novelty": 1}'
    assert watch.scores(state, house=set()) == ("", {})
    assert "RUNNING" in drawn(state)


def test_waiting_lines_name_only_who_is_waited_for():
    state = state_of()
    state.tasks[1].state = operator_pb2.TASK_STATE_SUCCEEDED
    assert watch.waiting_lines(state.tasks) == ["gard: trains round 2, training 38 %"]


def test_a_watch_outlives_a_restart_of_the_coordinator(
    door: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.05)
    door.jobs["j1"] = state_of(sentence="round 1 waits for gard")
    codes: list[int] = []

    def run() -> None:
        with OperatorClient(load_profile(door.profile())) as client:
            codes.append(watch.watch(client, job="j1", output=Output(as_json=True)))

    watcher = threading.Thread(target=run)
    watcher.start()
    told: list[dict[str, Any]] = []

    def wait_for(condition: Any) -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            told.extend(json.loads(line) for line in capsys.readouterr().out.splitlines())
            if any(condition(answer) for answer in told):
                return
            time.sleep(0.05)
        raise AssertionError(told)

    wait_for(lambda answer: answer["data"]["sentence"] == "round 1 waits for gard")
    door.stop()
    wait_for(lambda answer: "cannot be reached" in answer["data"]["trouble"])
    door.jobs["j1"] = state_of(ended=operator_pb2.JOB_STATE_FAILED, sentence="round 2 has 0 of 1 updates")
    door.start()
    watcher.join(timeout=120)
    assert codes == [1]
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["exit_code"], last["data"]["state"], last["data"]["trouble"]) == (1, "FAILED", "")


def test_a_watch_of_a_finished_job_ends_at_once(door: Any, capsys: pytest.CaptureFixture[str]):
    door.jobs["j1"] = state_of(ended=operator_pb2.JOB_STATE_COMPLETED, sentence="the job is complete")
    with OperatorClient(load_profile(door.profile())) as client:
        assert watch.watch(client, job="j1", output=Output(as_json=False)) == 0
    assert capsys.readouterr().out == "COMPLETED, round 2 of 3: the job is complete\n"


def test_the_details_say_how_the_answers_changed_after_the_best_version():
    spec = jobspec.parse(
        {
            "name": "teaching",
            "task": {"type": "causal-lm"},
            "data": {"name": "notes"},
            "base_model": {"name": "llama"},
            "local": {"steps": 2},
            "rounds": 3,
            "evaluation": {"where": ["house"], "metric": "medqa_accuracy", "benchmarks": ["medqa"]},
        }
    )
    state = state_of()
    state.spec_json = spec.canonical_json
    for version, right, unparseable in ((1, 0.5, 0.0), (2, 0.25, 0.5)):
        shares = {"questions": 200.0, "accuracy": right, "unparseable": unparseable}
        metrics = {f"medqa_{name}": value for name, value in shares.items()}
        state.evaluations.append(
            operator_pb2.EvaluationView(version=version, site="house", split="validation", examples=9, metrics=metrics)
        )
    console = Console(file=io.StringIO(), width=400)
    for part in watch.details(state, house={"house"}):
        console.print(part)
    text = console.file.getvalue()
    assert "medqa, version 1: 50.00 % of 200 answers are right" in text
    assert "medqa, version 2: 25.00 %, 25.00 points fewer." in text
