"""What can be watched from outside: metrics, liveness, readiness, and the status file of `silotune-agent status`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from client_agent.taskdir import read_json
from protos.errors import OutOfSpace, SiteConfigInvalid

STAGES = (
    "idle",
    "approving",
    "fetching",
    "loading",
    "training",
    "evaluating",
    "uploading",
    "paused",
    "waiting_for_disk",
)
SECONDS_BUCKETS = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600)

log = structlog.get_logger()


class AgentMetrics:
    """The agent's Prometheus metrics. Labels come from closed lists: no job, round or site is a label."""

    def __init__(self, *, version: str) -> None:
        self.registry = registry = CollectorRegistry()
        info = Gauge("silotune_build_info", "The running version; always 1.", ["version"], registry=registry)
        info.labels(version).set(1)
        self.connected = Gauge("silotune_agent_connected", "1 while the coordinator answers.", registry=registry)
        self._stage = Gauge(
            "silotune_task_stage", "1 for the stage that the agent is in.", ["stage"], registry=registry
        )
        self.transfer_bytes = Counter(
            "silotune_transfer_bytes_total", "Payload bytes on the wire.", ["direction"], registry=registry
        )
        self.task_seconds = Histogram(
            "silotune_task_seconds",
            "Time of finished tasks by stage.",
            ["kind", "stage"],
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.first_step_seconds = Gauge(
            "silotune_first_step_seconds",
            "From a task's start to its first training step, last task.",
            registry=registry,
        )
        self.train_steps = Counter("silotune_train_steps_total", "Optimizer steps that were taken.", registry=registry)
        self.train_loss = Gauge("silotune_train_loss", "Training loss that was last reported.", registry=registry)
        self.certificate_expiry = Gauge(
            "silotune_certificate_expiry_timestamp_seconds", "When the agent's certificate expires.", registry=registry
        )
        self.disk_spare = Gauge("silotune_disk_spare_bytes", "Free disk where the agent's home is.", registry=registry)
        self.tasks_finished = Counter(
            "silotune_tasks_finished_total", "Tasks that were answered for.", ["kind", "outcome"], registry=registry
        )
        for direction in ("up", "down"):
            self.transfer_bytes.labels(direction)
        self.set_stage("idle")

    def set_stage(self, stage: str) -> None:
        for name in STAGES:
            self._stage.labels(name).set(name == stage)


class Disk:
    """What the agent cannot write now, in sentences; each is logged when it changes, not each time it is true."""

    def __init__(self) -> None:
        self._troubles: dict[str, str] = {}

    @property
    def sentence(self) -> str:
        return " ".join(self._troubles.values())

    @contextmanager
    def tried(self, what: str) -> Iterator[None]:
        """Takes an OSError of the block as something that passes: the daemon goes on, and tries again later."""
        try:
            yield
        except OSError as error:
            # Its text names a path; only the reason goes out.
            sentence = f"{what} failed at this machine's disk: {error.strerror or type(error).__name__}."
            if self._troubles.get(what) != sentence:
                log.error(sentence)
            self._troubles[what] = sentence
        else:
            if self._troubles.pop(what, None):
                log.info(f"{what} works again.")

    @contextmanager
    def noted(self, what: str) -> Iterator[None]:
        """Remembers that the block waits for room, and passes the error on to whoever repeats it."""
        try:
            yield
        except OutOfSpace as error:
            self._troubles[what] = f"{what} waits: {error.message}"
            raise
        else:
            self.forget(what)

    def forget(self, what: str) -> None:
        self._troubles.pop(what, None)


class StatusFile:
    """status.json: replaced whole, for a reader in another process; it need not survive a crash."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, **facts: Any) -> None:
        temporary = self._path.with_suffix(".json.new")
        temporary.write_text(json.dumps({"unix_seconds": time.time(), **facts}))
        temporary.replace(self._path)

    def read(self) -> dict[str, Any]:
        found = read_json(self._path)
        return found if isinstance(found, dict) else {}


async def serve(address: str, *, metrics: AgentMetrics, not_ready: Callable[[], str]) -> tuple[web.AppRunner, str]:
    """Serves /metrics, /healthz and /readyz; returns the runner and the address that it listens on.

    `not_ready` says in a sentence why the agent is not ready, or nothing. SiteConfigInvalid: not a usable address.
    """

    async def show_metrics(request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def health(request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def ready(request: web.Request) -> web.Response:
        reason = not_ready()
        return web.Response(text=f"{reason or 'ready'}\n", status=503 if reason else 200)

    app = web.Application()
    app.add_routes([web.get("/metrics", show_metrics), web.get("/healthz", health), web.get("/readyz", ready)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    host, _, port = address.rpartition(":")
    try:
        await web.TCPSite(runner, host.strip("[]"), int(port)).start()
    except (OSError, ValueError, OverflowError) as error:
        await runner.cleanup()
        raise SiteConfigInvalid(
            f"http.address {address!r} cannot be listened on: {error}.",
            hint="Another agent may use it; give this one another port in its site.toml.",
        ) from error
    bound = runner.addresses[0]
    return runner, f"{bound[0]}:{bound[1]}"
