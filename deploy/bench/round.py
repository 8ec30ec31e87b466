"""One job of the synthetic trainer through the real coordinator and real agents, measured from outside."""

from __future__ import annotations

import platform
import shutil
import statistics
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from client_agent.synthetic import BLOCK_VALUES
from coordinator.aggregation.admission import read_layout
from deploy.bench import floor
from deploy.bench.sampling import Sampler
from deploy.local import LocalFederation
from protos.jobspec import Synthetic, task_seed

SITE_TOML = """\
[http]
address = "{http}"

[policy]
tasks = ["synthetic"]
methods = ["full"]
"""

RECIPE = """\
name = "bench"
rounds = {rounds}
seed = {seed}

[task]
type = "synthetic"
payload_mb = {payload_mb}

[local]
steps = 1

[cohort]
quorum = {sites}
gather_seconds = 600

[evaluation]
where = []
"""
SEED = 20
# The longest that a measured job may take.
LIMIT_SECONDS = 3600.0


def measure(
    *, payload_mb: float, sites: int, rounds: int, insecure_loopback: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """The figures of `silotune bench round`; bytes in bytes, times in seconds, CPU in seconds of one core."""
    directory = Path(tempfile.mkdtemp(prefix="silotune-bench-"))
    try:
        with LocalFederation(directory, insecure_loopback=insecure_loopback) as federation:
            return _measure(
                federation, payload_mb=payload_mb, sites=sites, rounds=rounds, insecure=insecure_loopback, say=say
            )
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _measure(
    federation: LocalFederation, *, payload_mb: float, sites: int, rounds: int, insecure: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    names = [f"site-{number:02}" for number in range(1, sites + 1)]
    say(f"starting a coordinator and {sites} agents")
    federation.init()
    federation.start_coordinator()
    for name in names:
        federation.enroll(name, site_toml=SITE_TOML)
    for name in names:
        federation.start_agent(name, wait=False)
    nodes = federation.nodes
    sampler = Sampler({"coordinator": [nodes["coordinator"].pid], "agents": [nodes[name].pid for name in names]})
    recipe = federation.directory / "recipe.toml"
    recipe.write_text(RECIPE.format(rounds=rounds, seed=SEED, payload_mb=payload_mb, sites=sites))
    sampler.start()
    wire = psutil.net_io_counters(pernic=True)["lo"].bytes_recv
    job = federation.silotune("job", "submit", str(recipe))["job_id"]
    say(f"{rounds} rounds of {payload_mb:g} MB from {sites} sites")
    federation.wait_for(
        lambda: federation.job(job)["job"]["state"] in ("COMPLETED", "FAILED"),
        seconds=LIMIT_SECONDS, saying="the end of the job", poll_seconds=1.0,
    )  # fmt: skip
    wire = psutil.net_io_counters(pernic=True)["lo"].bytes_recv - wire
    shown = federation.job(job)
    if shown["job"]["state"] != "COMPLETED":
        raise RuntimeError(f"the job failed: {shown['job']['sentence']}")
    events = federation.silotune("job", "events", job)["events"]
    sampler.stop()
    measured = [_round(entry, events, sampler) for entry in shown["rounds"] if entry["number"] > 0]
    payload = read_layout(_version(federation, shown, rounds)).file_bytes
    ideal = 2 * sites * payload * rounds
    memory = {
        "coordinator_peak_rss": nodes["coordinator"].peak_rss_bytes(),
        "aggregation_peak_rss": sampler.peak_child_rss_bytes("coordinator"),
        "agent_peak_rss": max(nodes[name].peak_rss_bytes() for name in names),
        "trainer_peak_rss": sampler.peak_child_rss_bytes("agents"),
    }
    say("the error of the mean")
    error = _error_of_last_round(federation, job, shown, names, rounds)
    tls = None if insecure else _tls(federation, names[0])
    federation.stop()
    say("the floors: bare streams, then durable ones")
    floors = {
        kind: floor.as_json(
            floor.measure(
                payload_bytes=payload, sites=sites, durable=kind == "durable", tls=tls, directory=federation.directory
            )
        )
        for kind in ("bare", "durable")
    }
    steady = [entry for entry in measured if entry["number"] > 1] or measured
    median = {
        key: statistics.median(entry[key] for entry in steady)
        for key in ("seconds", "coordinator_cpu_seconds", "agents_cpu_seconds")
    }
    return {
        "what": {
            "payload_bytes": payload, "sites": sites, "rounds": rounds, "tls": not insecure,
            "python": platform.python_version(), "grpcio": version("grpcio"), "cores": psutil.cpu_count(),
        },
        "rounds": measured,
        "steady": median,
        "bytes": {
            "payload_up_and_down": sum(entry["bytes_up"] + entry["bytes_down"] for entry in measured),
            "loopback": wire, "ideal": ideal, "loopback_over_ideal": wire / ideal,
        },
        "memory_bytes": memory,
        "error_of_the_mean": error,
        "floors": floors,
        "ratio_to_durable_floor": median["seconds"] / floors["durable"]["seconds"],
        "ratio_to_bare_floor": median["seconds"] / floors["bare"]["seconds"],
    }  # fmt: skip


def _round(entry: dict[str, Any], events: list[dict[str, Any]], sampler: Sampler) -> dict[str, Any]:
    """One round's figures: stages at the coordinator, mean seconds by stage at the sites, CPU of both sides."""
    times = [event["unix_seconds"] for event in events if event["round"] == entry["number"]]
    window = {"since": min(times), "until": max(times)}
    stages: dict[str, list[float]] = {}
    for update in entry["updates"]:
        for stage, seconds in update["seconds"].items():
            stages.setdefault(stage, []).append(seconds)
    return {
        "number": entry["number"],
        "seconds": entry["seconds"]["total"],
        "stages": entry["seconds"],
        "site_stages": {stage: statistics.mean(values) for stage, values in stages.items()},
        "coordinator_cpu_seconds": sampler.cpu_seconds("coordinator", **window),
        "agents_cpu_seconds": sampler.cpu_seconds("agents", **window),
        "bytes_up": entry["bytes_up"],
        "bytes_down": entry["bytes_down"],
    }


def _version(federation: LocalFederation, shown: dict[str, Any], number: int) -> Path:
    out = federation.directory / f"version-{number}"
    if not out.exists():
        federation.silotune("model", "export", shown["job"]["id"], "--round", str(number), "--out", str(out))
    return out / "model.safetensors"


def _error_of_last_round(
    federation: LocalFederation, job: str, shown: dict[str, Any], names: list[str], rounds: int
) -> float:
    """Relative error (Frobenius norm) of the last version against the float64 mean, computed here once more."""
    last = next(entry for entry in shown["rounds"] if entry["number"] == rounds)
    examples = {update["site"]: int(update["examples"]) for update in last["updates"]}
    before, after = _version(federation, shown, rounds - 1), _version(federation, shown, rounds)
    layout = read_layout(after)
    old = np.fromfile(before, dtype=np.float32, offset=layout.data_start)
    mean = np.zeros(old.size)
    for name in names:
        values = _trained(old, seed=task_seed(SEED, round_number=rounds, site=name))
        mean += examples[name] / sum(examples.values()) * values
    found = np.fromfile(after, dtype=np.float32, offset=layout.data_start)
    return float(np.linalg.norm(found - mean) / np.linalg.norm(mean))


def _trained(old: np.ndarray, *, seed: int) -> np.ndarray:
    """What the synthetic trainer makes of `old`."""
    pattern = np.random.default_rng(seed).standard_normal(BLOCK_VALUES, dtype=np.float32)
    pattern *= np.float32(Synthetic(type="synthetic").noise)
    values = old.copy()
    for start in range(0, old.size, BLOCK_VALUES):
        block = values[start : start + BLOCK_VALUES]
        block += pattern[: block.size]
    return values


def _tls(federation: LocalFederation, name: str) -> floor.Tls:
    identity = federation.home(name) / "identity"
    return floor.Tls(
        ca=str(identity / "ca.pem"),
        server_certificate=str(federation.data / "server.pem"),
        server_key=str(federation.data / "server-key.pem"),
        client_certificate=str(identity / "certificate.pem"),
        client_key=str(identity / "key.pem"),
    )
