"""How each kind of fault is done to an arena, and how it is undone."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

import psutil

from tests.chaos.proxy import Direction, Weather
from tests.chaos.scenario import BY_NAME, Fault
from tests.chaos.storing import Servers

if TYPE_CHECKING:
    from tests.chaos.arena import Arena

TRAINER, AGGREGATION = "client_agent.tether", "coordinator.aggregation.worker"
CUTS: dict[str, set[Direction]] = {
    "cut": {"up", "down"},
    "cut towards coordinator": {"up"},
    "cut towards agent": {"down"},
}
NAMESPACE_CUTS = {
    "namespace cut": "both",
    "namespace cut towards coordinator": "up",
    "namespace cut towards agent": "down",
}
Undo = Callable[[], None]


class NotNow(Exception):
    """The fault finds nothing to do, such as no trainer to kill; it is tried again."""


def missing(fault: Fault, arena: Arena) -> str:
    """Why this machine cannot do this fault; empty when it can."""
    needs = {"namespace": "namespace", "full disk": "disk", "clock": "clock"}
    return next((arena.missing.get(means, "") for start, means in needs.items() if fault.kind.startswith(start)), "")


def inject(fault: Fault, arena: Arena) -> Undo | None:
    """Does it; what is to be called after `fault.seconds`, if anything. NotNow."""
    kind, target = fault.kind, fault.target
    if kind in ("kill coordinator", "kill agent"):
        return _end(arena, target, signal.SIGKILL, seconds=fault.seconds)
    if kind in ("restart coordinator", "restart agent"):
        return _end(arena, target, signal.SIGTERM, seconds=fault.seconds)
    if kind in ("stop coordinator", "stop agent"):
        if target in arena.down:
            raise NotNow
        arena.signal(target, signal.SIGSTOP)
        return lambda: arena.signal(target, signal.SIGCONT)
    if kind in ("kill trainer", "stop trainer", "kill aggregation"):
        children = arena.children(target, saying=AGGREGATION if kind == "kill aggregation" else TRAINER)
        if not children:
            raise NotNow
        _signal_all(children, signal.SIGSTOP if kind == "stop trainer" else signal.SIGKILL)
        return (lambda: _signal_all(children, signal.SIGCONT)) if kind == "stop trainer" else None
    if kind == "kill agent and trainer":
        _signal_all(arena.children(target, saying=TRAINER), signal.SIGKILL)
        return _end(arena, target, signal.SIGKILL, seconds=fault.seconds)
    if kind in NAMESPACE_CUTS:
        arena.cable_cut(NAMESPACE_CUTS[kind])
        return arena.cable_heal
    if kind.startswith("full disk"):
        arena.fill(target, leaving_bytes=fault.amount)
        return lambda: arena.empty(target)
    if BY_NAME[kind].target in ("postgres", "s3"):
        return _storage(arena, fault)
    if kind.startswith("clock"):
        # It is not put right before the end of the run: a wrong clock is a state, not an event.
        arena.set_clock(target, fault.amount)
        return None
    if BY_NAME[kind].target == "site":
        return _weather(arena, fault)
    raise NotImplementedError(kind)


def _end(arena: Arena, name: str, number: int, *, seconds: float) -> None:
    if name in arena.down:
        raise NotNow
    arena.end(name, number, seconds=seconds)


def _signal_all(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def _storage(arena: Arena, fault: Fault) -> Undo:
    """A server of the store goes away; a coordinator that starts meanwhile waits for it."""
    engine = arena.storage
    assert isinstance(engine, Servers)
    do, undo = {
        "restart postgres": (engine.postgres.stop_immediately, engine.postgres.start),
        "kill postgres": (engine.postgres.kill, engine.postgres.start),
        "stop postgres": (
            lambda: _signal_all(_family(engine.postgres.pid), signal.SIGSTOP),
            lambda: _signal_all(_family(engine.postgres.pid), signal.SIGCONT),
        ),
        "s3 away": (engine.s3.stop, engine.s3.start),
    }[fault.kind]
    if arena.away & {fault.target}:
        raise NotNow
    arena.away.add(fault.target)
    do()

    def back() -> None:
        undo()
        arena.away.discard(fault.target)

    return back


def _family(pid: int) -> list[psutil.Process]:
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def _weather(arena: Arena, fault: Fault) -> Undo | None:
    link = arena.network.links[fault.target]
    kind = fault.kind
    if kind == "reset":
        link.reset()
        return None
    if kind == "corrupt":
        link.set(Weather(corrupt={"up" if fault.when.moment == "uploading" else "down"}))
        return None
    if kind == "refuse":
        link.set(Weather(refuse=True))
        link.reset()
    elif kind == "delay":
        link.set(Weather(delay_seconds=fault.amount))
    elif kind == "slow link":
        link.set(Weather(bytes_a_second=fault.amount))
    else:
        link.set(Weather(cut=set(CUTS[kind])))
    return link.heal
