"""`silotune lab run`: a whole federation on this machine, for one experiment.

The real coordinator as one process, all sites as another (deploy/lab/sites.py), and one trainer. What it does is in the
folder before it is done, so a lab that was killed goes on when the same command is typed again: the coordinator and the
agents always do.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client_agent.home import Home
from client_agent.taskdir import read_json, write_json
from coordinator.client import OperatorClient, facts, load_profile
from coordinator.watch import ENDED
from deploy.lab import tied
from deploy.lab.experiment import Experiment
from deploy.lab.models import directory_of
from deploy.lab.place import HOUSE, place
from deploy.local import COORDINATOR, LocalFederation, free_ports
from deploy.versions import versions
from protos import jobspec
from protos.errors import Conflict, InvalidInput
from protos.jobspec import JobSpec
from protos.v1 import operator_pb2
from protos.v1.operator_pb2 import GetJobResponse

PLAN, METRICS, READY = "lab.json", "metrics.json", "ready.json"
MODEL, TEACHERS = "model", "teachers"
AGENTS = "agents"
# A second submission with it is answered with the first job.
SUBMIT_TOKEN = "lab"
MOST_ROUNDS = 1000
POLL_SECONDS = 0.5
DEAD_SECONDS = 30.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What an experiment is; two runs of the same plan give the same versions."""

    experiment: Experiment
    spec: JobSpec
    # Threads of the trainer; 0: as many as there are cores.
    threads: int = 0

    def as_json(self) -> dict[str, Any]:
        return {
            "schema_version": "1",
            "experiment": self.experiment.model_dump(mode="json"),
            "spec": json.loads(self.spec.canonical_json),
            "threads": self.threads,
        }


def run(plan: Plan, *, out: Path, say: Say, check: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Begins the experiment in `out`, or goes on with it; what came of it, as in metrics.json. The job may have failed.

    `check` is called twice a second, and may raise to end it. Conflict: a run goes on in `out`, or another
    experiment lies there. CommandFailed: a process of it ended.
    """
    with _claimed(out, plan):
        have = read_json(out / METRICS)
        if have is not None and have["job"]["state"] == "COMPLETED":
            say("This experiment is done already.")
            return read_metrics(out)
        _wait_for_the_dead(out)
        models = _models(plan, out=out, say=say)
        with LocalFederation(out, wrap=lambda name, command: tied.argv(command)) as federation:
            if not (out / READY).exists():
                # A set-up that was cut off is done anew; it takes seconds.
                for part in (AGENTS, COORDINATOR, "operator"):
                    shutil.rmtree(out / part, ignore_errors=True)
                federation.init()
            federation.start_coordinator()
            with OperatorClient(load_profile(str(federation.profile))) as client:
                if not (out / READY).exists():
                    say(f"Enrolling {plan.experiment.sites} sites.")
                    rows = place(
                        out / AGENTS, experiment=plan.experiment, spec=plan.spec, seed=plan.spec.seed,
                        threads=plan.threads, models=models, client=client, coordinator=federation.address,
                    )  # fmt: skip
                    write_json(out / READY, {"rows": rows})
                address = f"127.0.0.1:{free_ports(1)[0]}"
                federation.start("sites", ["python", "-m", "deploy.lab.sites", str(out / AGENTS), address], address)
                request = operator_pb2.SubmitJobRequest(spec_json=plan.spec.canonical_json, submit_token=SUBMIT_TOKEN)
                job = client.ask("SubmitJob", request, timeout_seconds=60).job_id
                _resume(client, job=job)
                return _follow(client, job=job, out=out, checks=(federation.check_alive, check), say=say)


def read_metrics(out: Path) -> dict[str, Any]:
    """What `run` has written so far. InvalidInput when nothing was run there."""
    found = read_json(out / METRICS)
    if not isinstance(found, dict):
        raise InvalidInput(f"{out} holds no {METRICS}.", hint="`silotune lab run RECIPE --out DIR` writes it.")
    return found


@contextmanager
def _claimed(out: Path, plan: Plan) -> Iterator[None]:
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"An experiment runs in {out} at this moment.", hint="Give another folder.") from None
        have = read_json(out / PLAN)
        if have not in (None, plan.as_json()):
            raise Conflict(f"{out} holds another experiment.", hint="Give another folder with --out, or remove it.")
        if have is None:
            if any(path.name != "lock" for path in out.iterdir()):
                raise Conflict(f"{out} holds files that no experiment made.", hint="Give another folder with --out.")
            write_json(out / PLAN, plan.as_json())
        yield


def _wait_for_the_dead(out: Path) -> None:
    """The processes of a lab that was killed end with it, but not in the same instant. Conflict when they do not."""
    deadline = time.monotonic() + DEAD_SECONDS
    # A coordinator's directory is locked in the same way as an agent's.
    places = [Home(path) for path in (out / COORDINATOR, *(out / AGENTS).glob("*"))]
    while any(home.is_locked() for home in places):
        if time.monotonic() > deadline:
            raise Conflict(f"Processes of an earlier run still work in {out}.", hint="End them first.")
        time.sleep(0.1)


def _models(plan: Plan, *, out: Path, say: Say) -> dict[str, Path]:
    """Directories of the base models by the names that the recipe calls them."""
    found = {}
    named = plan.spec.base_model
    if plan.experiment.model is not None and named is not None:
        found[named.name] = directory_of(plan.experiment.model, made=out / MODEL, threads=plan.threads, say=say)
    for name, model in plan.experiment.teachers.items():
        found[name] = directory_of(model, made=out / TEACHERS / name, threads=plan.threads, say=say)
    return found


def _resume(client: OperatorClient, *, job: str) -> None:
    """A job that failed is tried again: whoever types the command a second time has mended the cause."""
    state: GetJobResponse = client.ask("GetJob", operator_pb2.GetJobRequest(job=job))
    if state.job.state == operator_pb2.JOB_STATE_FAILED:
        for action in (operator_pb2.JOB_ACTION_READMIT, operator_pb2.JOB_ACTION_RESUME):
            client.ask("ControlJob", operator_pb2.ControlJobRequest(job=job, action=action))


def _follow(
    client: OperatorClient, *, job: str, out: Path, checks: Sequence[Callable[[], None]], say: Say
) -> dict[str, Any]:
    """Writes the metrics and says what is new, until the job has ended."""
    said_rounds, said_versions, sentence, known = 0, -1, "", None
    while True:
        for check in checks:
            check()
        seen = _glance(client, job=job)
        if seen == known:
            time.sleep(POLL_SECONDS)
            continue
        known = seen
        request = operator_pb2.GetJobRequest(job=job, last_rounds=MOST_ROUNDS)
        state: GetJobResponse = client.ask("GetJob", request)
        metrics = with_earlier(metrics_of(state, rows=read_json(out / READY)["rows"]), read_json(out / METRICS))
        write_json(out / METRICS, metrics)
        for entry in metrics["rounds"][said_rounds:]:
            say(f"round {entry['number']} of {state.job.rounds}: training loss {entry['train_loss']:.4f}")
        for found in metrics["evaluations"]:
            if found["site"] == HOUSE and found["split"] == "validation" and found["version"] > said_versions:
                said_versions = found["version"]
                shown = ", ".join(f"{name} {value:.4f}" for name, value in sorted(found["metrics"].items()))
                say(f"  version {found['version']} on held-out rows: {shown}")
        said_rounds = len(metrics["rounds"])
        if state.job.sentence != sentence and not metrics["rounds"]:
            say(state.job.sentence)
        sentence = state.job.sentence
        if state.job.state in ENDED:
            return metrics
        time.sleep(POLL_SECONDS)


def _glance(client: OperatorClient, *, job: str) -> Any:
    """What tells that something happened. The whole history of a job is megabytes, and would be most of the work."""
    state: GetJobResponse = client.ask("GetJob", operator_pb2.GetJobRequest(job=job, last_rounds=1))
    # Until the first round its sentence is worth saying.
    sentence = "" if state.job.head_version else state.job.sentence
    return state.job.state, state.job.head_version, len(state.evaluations), sentence


def metrics_of(state: GetJobResponse, *, rows: dict[str, int]) -> dict[str, Any]:
    """What a round is worth knowing of, committed rounds only; sizes in bytes, times in seconds."""
    shown = facts(state)
    spec = jobspec.from_json(state.spec_json)
    committed = [entry for entry in shown["rounds"] if entry["phase"] == "COMMITTED"]
    return {
        "schema_version": "1",
        "job": shown["job"],
        "spec": json.loads(state.spec_json),
        "rows": rows,
        # Version 0.
        "initial": next((_round(entry, spec=spec) for entry in committed if not entry["number"]), None),
        "rounds": [_round(entry, spec=spec) for entry in committed if entry["number"]],
        "evaluations": shown["evaluations"],
        "versions": versions(),
    }


def with_earlier(metrics: dict[str, Any], earlier: dict[str, Any] | None) -> dict[str, Any]:
    """`metrics` with what only an earlier answer told: the coordinator tells of the latest rounds alone."""
    if earlier is None:
        return metrics
    rounds = {entry["number"]: entry for entry in (*earlier["rounds"], *metrics["rounds"])}
    evaluations = {
        (entry["version"], entry["site"], entry["split"]): entry
        for entry in (*earlier["evaluations"], *metrics["evaluations"])
    }
    return {
        **metrics,
        "initial": metrics["initial"] or earlier["initial"],
        "rounds": [rounds[number] for number in sorted(rounds)],
        "evaluations": [evaluations[key] for key in sorted(evaluations)],
    }


def _round(entry: dict[str, Any], *, spec: JobSpec) -> dict[str, Any]:
    counted = [update for update in entry["updates"] if update["fate"] == "ACCEPTED"]
    examples = sum(update["examples"] for update in counted)
    loss = sum(update["metrics"].get("loss", 0.0) * update["examples"] for update in counted)
    return {
        "number": entry["number"],
        "train_loss": loss / examples if examples else 0.0,
        "learning_rate": spec.learning_rate_at(entry["number"]) if counted else 0.0,
        "seconds": entry["seconds"],
        "bytes_up": entry["bytes_up"],
        "bytes_down": entry["bytes_down"],
        # What the aggregation measured of itself.
        "metrics": entry["metrics"],
        # Why it was committed without its distillation; else empty.
        "undistilled": entry["undistilled"],
        "updates": counted,
    }
