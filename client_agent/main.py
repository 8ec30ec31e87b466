"""Composition root of the site daemon: home -> settings -> session -> stages -> loop; signals; logs."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Awaitable
from dataclasses import dataclass

import structlog

from client_agent import facts, identity, settings
from client_agent.hold import Hold, PauseFile
from client_agent.home import Home
from client_agent.loop import Daemon
from client_agent.observe import AgentMetrics, StatusFile, serve
from client_agent.runner import Runner
from client_agent.session import Session, Waiting
from client_agent.settings import SiteSettings
from client_agent.stages import Stages

log = structlog.get_logger()


def configure_logs(*, json_format: bool) -> None:
    """Text for people, or one JSON object a line. Both go to standard error."""
    renderer = (
        structlog.processors.JSONRenderer()
        if json_format
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            pad_event_to=0,
            # The default prints the local variables of every frame: keys, tokens, samples.
            exception_formatter=structlog.dev.plain_traceback,
        )
    )
    trace = [structlog.processors.format_exc_info] if json_format else []
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *trace,
            renderer,
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
    )


def run(home: Home, *, json_logs: bool, insecure_loopback: bool = False) -> None:
    """Runs the daemon until SIGTERM or SIGINT.

    SiteConfigInvalid, Unauthenticated (not enrolled), Conflict (another agent runs in this home).
    """
    configure_logs(json_format=json_logs)
    # Before anything is written: on a machine that is not enrolled, or with a misspelt --home, nothing is left behind.
    identity.load(home.identity)
    home.create()
    with home.locked():
        asyncio.run(_serve(home, insecure_loopback=insecure_loopback))


@dataclass(frozen=True)
class Agent:
    """The parts of a daemon, put together."""

    daemon: Daemon
    runner: Runner
    session: Session
    metrics: AgentMetrics


def compose(
    home: Home,
    site: SiteSettings,
    *,
    gpu: str,
    rows: dict[str, int],
    insecure_loopback: bool = False,
    runner: Runner | None = None,
    device: asyncio.Lock | None = None,
) -> Agent:
    """Unauthenticated when this agent has not been enrolled.

    Agents of several sites in one process share a trainer, `runner`, and the right to use it, `device`.
    """
    waiting = Waiting()
    session = Session(home, waiting=waiting, network=site.network, insecure_loopback=insecure_loopback)
    metrics = AgentMetrics(version=facts.agent_version())
    runner = runner or Runner(log_directory=home.log, idle_seconds=site.device.idle_seconds)
    hold = Hold(PauseFile(home.pause_file), windows=site.schedule.hours)
    stages = Stages(
        home=home, settings=site, session=session, runner=runner, metrics=metrics, hold=hold, gpu=gpu, rows=rows
    )
    status = StatusFile(home.status_file)
    daemon = Daemon(stages=stages, session=session, waiting=waiting, status=status, device=device or asyncio.Lock())
    return Agent(daemon, runner, session, metrics)


async def _serve(home: Home, *, insecure_loopback: bool) -> None:
    site = settings.load(home.site_file)
    gpu = await asyncio.to_thread(facts.gpu_name)
    rows = await asyncio.to_thread(facts.count_rows, home, site)
    agent = compose(home, site, gpu=gpu, rows=rows, insecure_loopback=insecure_loopback)
    me = agent.session.identity
    http, address = await serve(site.http.address, metrics=agent.metrics, not_ready=agent.daemon.not_ready)
    device = facts.choose_device(site.device, gpu=gpu)
    log.info("The agent runs.", site=me.name, coordinator=me.coordinator, device=device, http=address)
    if site.policy is None:
        log.warning("site.toml has no [policy]: nothing will run here.")
    try:
        await until_stopped(agent.daemon.run(), runner=agent.runner, within_seconds=site.device.stop_seconds)
    finally:
        await agent.runner.close()
        await http.cleanup()
        await agent.session.close()


async def until_stopped(work: Awaitable[object], *, runner: Runner, within_seconds: float) -> None:
    """Until SIGTERM or SIGINT; the trainer then has `within_seconds` to save what it does."""
    working = asyncio.ensure_future(work)

    def stop() -> None:
        runner.shut_down(within_seconds=within_seconds)
        working.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    try:
        await working
    except asyncio.CancelledError:
        log.info("The agent stops; unfinished work is kept and goes on at the next start.")
