"""Many sites in one process: `python -m deploy.lab.sites AGENTS HTTP_ADDRESS`.

AGENTS holds a home for each site, enrolled and described as at a real one. Their daemons are the real ones, each with
its own certificate, journal and cache, and speak with the coordinator over sockets of their own; but they share one
trainer, whose base model stays loaded, and take turns on the device. So 32 sites need one model, not 32. Some may be
there to attack the others: see attack.py.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import structlog

from client_agent import facts, settings
from client_agent.home import Home
from client_agent.loop import Daemon
from client_agent.main import Agent, compose, configure_logs, until_stopped
from client_agent.observe import AgentMetrics, serve
from client_agent.runner import Runner
from client_agent.taskdir import read_json
from deploy.lab import attack as attacks
from deploy.lab.attack import Attack, Attacker

# The base model is not to be loaded again, however long the coordinator is away.
IDLE_SECONDS = 24 * 3600.0
STOP_SECONDS = 30.0

log = structlog.get_logger()


async def run(agents: Path, *, http_address: str) -> None:
    """Every site below `agents`, until SIGTERM or SIGINT."""
    homes = [Home(path) for path in sorted(agents.iterdir()) if (path / "site.toml").exists()]
    runner = Runner(log_directory=agents.parent / "logs", idle_seconds=IDLE_SECONDS)
    with ExitStack() as locks:
        for home in homes:
            home.create()
            locks.enter_context(home.locked())
        found = await _composed(homes, runner=runner)

        def not_ready() -> str:
            return next((f"{name}: {said}" for name, agent in found.items() if (said := agent.daemon.not_ready())), "")

        metrics = AgentMetrics(version=facts.agent_version())
        http, address = await serve(http_address, metrics=metrics, not_ready=not_ready)
        log.info("The sites run.", sites=len(found), http=address)
        working = asyncio.gather(*(_work(name, agent.daemon) for name, agent in found.items()))
        try:
            await until_stopped(working, runner=runner, within_seconds=STOP_SECONDS)
        finally:
            await runner.close()
            await http.cleanup()
            for agent in found.values():
                await agent.session.close()


async def _composed(homes: list[Home], *, runner: Runner) -> dict[str, Agent]:
    device = asyncio.Lock()
    gpu = await asyncio.to_thread(facts.gpu_name)
    found = {}
    for home in homes:
        site = settings.load(home.site_file)
        rows = await asyncio.to_thread(facts.count_rows, home, site)
        attack = read_json(home.path / attacks.FILE)
        own = Attacker(runner, Attack(**attack)) if attack else runner
        found[home.path.name] = compose(home, site, gpu=gpu, rows=rows, runner=cast(Runner, own), device=device)
    return found


async def _work(name: str, daemon: Daemon) -> None:
    structlog.contextvars.bind_contextvars(site=name)
    await daemon.run()


if __name__ == "__main__":
    configure_logs(json_format=False)
    asyncio.run(run(Path(sys.argv[1]), http_address=sys.argv[2]))
