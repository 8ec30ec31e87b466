"""What the outside may watch: Prometheus metrics, health, readiness, logs. Never samples, tensors or data paths.

What happens is counted as it happens (`Metrics`). What is the case, jobs and sites, is read from the store when it is
scraped (`StoreCollector`), so that it is right after a restart too. Labels are names from the registry, ids of current
jobs, and closed lists: their number is bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.process_collector import ProcessCollector

from coordinator.rounds.state import JobState, Phase, TaskKind
from coordinator.storage.store import Store
from coordinator.storage.views import JobRecord
from protos import update_figures
from protos.errors import SilotuneError

# Jobs that have ended stay visible this long, so that the last scrape is not the end of their graphs.
ENDED_JOBS_SHOWN = 20
_SECONDS = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 30.0, 120.0, 600.0, 3600.0)


class Metrics:
    """The counters and histograms of one coordinator, on a registry of its own."""

    def __init__(self, *, version: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        Info("silotune_build", "Version of this coordinator.", registry=self.registry).info({"version": version})
        self.rpc_seconds = Histogram(
            "silotune_rpc_seconds",
            "Calls by method and gRPC code.",
            ["method", "code"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.transfer_bytes = Counter(
            "silotune_transfer_bytes",
            "Payload bytes of blobs, up from sites or down to them.",
            ["direction"],
            registry=self.registry,
        )
        self.transfers_active = Gauge(
            "silotune_transfers_active", "Streams being served.", ["direction"], registry=self.registry
        )
        self.ready = Gauge(
            "silotune_ready", "Whether work may be sent here; /readyz says why not.", registry=self.registry
        )
        self.updates = Counter("silotune_updates", "Updates handed in, by fate.", ["fate"], registry=self.registry)
        for direction in ("up", "down"):
            self.transfer_bytes.labels(direction=direction)
            self.transfers_active.labels(direction=direction)
        for fate in ("accepted", "rejected", "discarded"):
            self.updates.labels(fate=fate)


class StoreCollector:
    """Gauges of jobs, sites, certificates and disk, from the store at the moment of a scrape."""

    def __init__(
        self,
        store: Store,
        *,
        spare_bytes: Callable[[], int],
        certificates: dict[str, float],
        unix_seconds: Callable[[], float] = time.time,
    ) -> None:
        """`certificates`: expiry in Unix seconds of what this process itself holds."""
        self._store = store
        self._spare_bytes = spare_bytes
        self._certificates = certificates
        self._unix_seconds = unix_seconds

    def describe(self) -> list[GaugeMetricFamily]:
        return []  # registering must not read the store

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """While the database or the disk is away, what they do not tell is left out: a gap, and no wrong number."""
        up = GaugeMetricFamily("silotune_store_up", "Whether the database answers.")
        expiry = GaugeMetricFamily(
            "silotune_certificate_expiry_timestamp_seconds", "When a certificate ends.", labels=["holder"]
        )
        for holder, expires in self._certificates.items():
            expiry.add_metric([holder], expires)
        try:
            found = [*self._jobs(), *self._sites(expiry)]
        except SilotuneError:
            found = []
        up.add_metric([], float(bool(found)))
        yield from (up, *found, expiry)
        with contextlib.suppress(SilotuneError, OSError):
            spare = GaugeMetricFamily("silotune_disk_spare_bytes", "Free disk above the reserve.")
            spare.add_metric([], self._spare_bytes())
            yield spare

    def _jobs(self) -> Iterator[GaugeMetricFamily]:
        state = GaugeMetricFamily("silotune_job_state", "1 for the state that a job is in.", labels=["job", "state"])
        current = GaugeMetricFamily("silotune_round_current", "Round in progress.", labels=["job"])
        waiting = GaugeMetricFamily(
            "silotune_round_waiting_sites", "Sites that the round in progress still waits for.", labels=["job"]
        )
        stages = GaugeMetricFamily(
            "silotune_round_stage_seconds", "How long the last ended round took, by stage.", labels=["job", "stage"]
        )
        aggregation = GaugeMetricFamily(
            "silotune_aggregation_seconds", "How long the last aggregation's process took.", labels=["job"]
        )
        error = GaugeMetricFamily(
            "silotune_aggregation_error",
            "How far the last aggregate is from the exact mean of products.",
            labels=["job"],
        )
        told = "Of each update in the last aggregation; see protos/update_figures.py."
        updates = {
            kind: GaugeMetricFamily(f"silotune_{kind}", told, labels=["job", "site"]) for kind in update_figures.KINDS
        }
        for job in _shown(self._store.views.jobs()):
            for name in JobState:
                state.add_metric([job.id, name.value.lower()], float(job.state is name))
            current.add_metric([job.id], job.round)
            tasks = self._store.views.tasks(job.id, round_number=job.round)
            waiting.add_metric([job.id], sum(t.state.open and t.kind is not TaskKind.EVALUATE for t in tasks))
            ended = [r for r in self._store.views.rounds(job.id, last=2) if r.phase in (Phase.COMMITTED, Phase.FAILED)]
            for stage, seconds in (ended[-1].seconds if ended else {}).items():
                if stage == "aggregation_process":
                    aggregation.add_metric([job.id], seconds)
                else:
                    stages.add_metric([job.id, stage], seconds)
            if ended and "aggregation_error" in ended[-1].metrics:
                error.add_metric([job.id], ended[-1].metrics["aggregation_error"])
            for kind in update_figures.KINDS if ended else ():
                for site, value in update_figures.by_site(ended[-1].metrics, kind).items():
                    updates[kind].add_metric([job.id, site], value)
        yield from (state, current, waiting, stages, aggregation, error, *updates.values())

    def _sites(self, expiry: GaugeMetricFamily) -> Iterator[GaugeMetricFamily]:
        up = GaugeMetricFamily("silotune_site_up", "Whether the site's agent was heard of lately.", labels=["site"])
        seen = GaugeMetricFamily(
            "silotune_site_last_seen_timestamp_seconds", "When the site's agent last called.", labels=["site"]
        )
        now = self._unix_seconds()
        for site in self._store.sites.all():
            if site.state == "ENROLLED":
                up.add_metric([site.name], float(site.connected(now_unix_seconds=now)))
                seen.add_metric([site.name], site.last_seen_unix_seconds)
                expiry.add_metric([f"site/{site.name}"], site.certificate_expires_unix_seconds)
        yield from (up, seen)


def _shown(jobs: list[JobRecord]) -> Iterator[JobRecord]:
    ended = 0
    for job in jobs:
        ended += job.state.ended
        if not job.state.ended or ended <= ENDED_JOBS_SHOWN:
            yield job


@dataclass
class Readiness:
    """Whether work may be sent here. Each check answers with a sentence when something is wrong; it may block."""

    checks: Iterable[Callable[[], str]]
    draining: bool = False
    reasons: list[str] = field(default_factory=lambda: ["nobody has looked yet"])

    async def find_out(self) -> list[str]:
        """Why the coordinator is not ready; empty when it is."""
        if self.draining:
            return ["the coordinator is shutting down"]
        self.reasons = [reason for reason in await asyncio.to_thread(self._run_checks) if reason]
        return self.reasons

    def _run_checks(self) -> list[str]:
        return [check() for check in self.checks]


def store_check(store: Store) -> Callable[[], str]:
    def check() -> str:
        try:
            store.database.probe()
        except SilotuneError as error:
            return f"the database cannot be written: {error.message}"
        return ""

    return check


def disk_check(spare_bytes: Callable[[], int]) -> Callable[[], str]:
    def check() -> str:
        try:
            spare = spare_bytes()
        except (SilotuneError, OSError) as error:
            return f"the blob store cannot be reached: {error}"
        return "" if spare >= 0 else f"the disk lacks {-spare} bytes of its reserve"

    return check


def http_app(*, metrics: Metrics, readiness: Readiness) -> web.Application:
    """/metrics, /healthz (this process answers) and /readyz (work may be sent here)."""

    async def show_metrics(_request: web.Request) -> web.Response:
        metrics.ready.set(float(not readiness.reasons and not readiness.draining))
        body = await asyncio.to_thread(generate_latest, metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    async def show_health(_request: web.Request) -> web.Response:
        return web.json_response({"healthy": True})

    async def show_readiness(_request: web.Request) -> web.Response:
        reasons = await readiness.find_out()
        return web.json_response({"ready": not reasons, "reasons": reasons}, status=503 if reasons else 200)

    app = web.Application()
    app.add_routes(
        [web.get("/metrics", show_metrics), web.get("/healthz", show_health), web.get("/readyz", show_readiness)]
    )
    return app


def configure_logs(*, format: str, level: str) -> None:
    """Structured logs on stderr: `text` for people, `json` one object a line for machines."""
    number = logging.getLevelName(level.upper())
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts")
    shape: list[structlog.typing.Processor]
    if format == "json":
        shape = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        # structlog's own choice would print the local variables of every frame: keys, tokens, values.
        plain = structlog.dev.plain_traceback
        shape = [
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), timestamp_key="ts", exception_formatter=plain)
        ]
    structlog.configure(
        processors=[structlog.processors.add_log_level, stamp, *shape],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    logging.basicConfig(stream=sys.stderr, level=max(number, logging.WARNING))
