"""The federation that faults are done to: real processes, a relay for each site, and what the machine has besides.

Built once and kept warm over many seeds; what a fault killed is started again, as a service manager would. What this
machine lacks (root, network namespaces, libfaketime) is named in `missing`, with the reason.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import secrets
import shutil
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from sqlalchemy import create_engine

from deploy.local import LocalFederation, Node, free_ports
from tests.chaos.evidence import Injected
from tests.chaos.proxy import Network
from tests.chaos.scenario import COORDINATOR, HOUSE, SITE_IN_NAMESPACE, SITES, Fault, When
from tests.chaos.storing import Engine

SITE_TOML = """\
[http]
address = "{http}"

[policy]
tasks = ["synthetic", "distill"]
methods = ["full"]
"""
LEASE_SECONDS = 2
RESERVE_BYTES = 500_000
RESPAWN_SECONDS = 0.5
EXCUSED_SECONDS = 15.0
LIBRARIES = ("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1", "/usr/lib/faketime/libfaketimeMT.so.1")
COORDINATOR_DISK_MB, AGENT_DISK_MB = 700, 96
FILLER = "filler"
AGE_DAYS = 3
NAMESPACE_NET = "10.213"


@dataclass
class Down:
    """A process that a fault ended: it comes back so long after its end."""

    seconds: float
    ended: float | None = None


@dataclass
class Arena:
    """Use as a context manager."""

    directory: Path
    storage: Engine
    sites: tuple[str, ...] = SITES
    # Whether there is a house agent; without one the first site makes version 0.
    has_house: bool = True
    # Root's means: namespaces, small disks. A test may do without.
    as_root: bool = True
    missing: dict[str, str] = field(default_factory=dict)
    # Ends of processes that no fault explains, in words.
    unexplained: list[str] = field(default_factory=list)
    down: dict[str, Down] = field(default_factory=dict)
    # Nodes that may end by themselves until then, because their disk is or was full; one that began meanwhile may end
    # a little later. And how often they did so.
    excused: dict[str, float] = field(default_factory=dict)
    excused_ends: Counter[str] = field(default_factory=Counter)
    # Servers of the store that a fault has taken away.
    away: set[str] = field(default_factory=set)
    # Nodes under strace, which kills them at their n-th sync, and what it has done since the last run began.
    traced: dict[str, int] = field(default_factory=dict)
    crashed: list[Injected] = field(default_factory=list)
    # Nodes whose clock is the file in clocks/.
    clocked: set[str] = field(default_factory=set)
    # A site was revoked, and its certificate is of no use any more.
    has_lost_a_site: bool = False
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> Arena:
        try:
            self._build()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # --- building

    def _build(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.rows = create_engine(self.storage.database_url, pool_pre_ping=True)
        self._stack.callback(self.rows.dispose)
        (self.directory / "clocks").mkdir()
        self._find_out_what_is_missing()
        namespace_host = self._make_namespace()
        hosts = ["127.0.0.1", *([namespace_host] if namespace_host else [])]
        settings = {
            "tasks": {"lease_seconds": LEASE_SECONDS},
            "storage": {"reserve_bytes": RESERVE_BYTES, **self.storage.settings},
            "certificates": {"hosts": hosts},
        }
        self.federation = LocalFederation(self.directory, settings=settings, wrap=self._wrap, json_logs=True)
        self.federation.environment = self.storage.environment
        if not self.missing.get("disk"):
            self._mount(self.federation.data, megabytes=COORDINATOR_DISK_MB)
        self._stack.callback(self._stop)
        if not self.missing.get("clock"):
            # The certificates are some days old when the run begins, so that a clock may be put back without all of
            # them being of the future.
            self.federation.environment = {"FAKETIME": f"-{AGE_DAYS}d", **_preload(), **self.storage.environment}
        self.federation.init()
        addresses = [self.federation.address]
        addresses += [self.federation.add_replica(name) for name in self.replicas[1:]]
        self.network = self._stack.enter_context(Network())
        # The operator's own way in, so that with replicas he too reaches one that lives.
        ports = free_ports(len(self.agents) + 1)
        self.operator_address = self.network.add("operator", port=ports.pop(), upstreams=lambda: addresses).address
        self.federation.start_coordinator()
        for site in self.agents:
            host = namespace_host if site == SITE_IN_NAMESPACE and namespace_host else "127.0.0.1"
            link = self.network.add(site, port=ports.pop(), upstreams=lambda: addresses, host=host)
            if not self.missing.get("disk"):
                self._mount(self.federation.home(site), megabytes=AGENT_DISK_MB)
            self.federation.enroll(site, site_toml=SITE_TOML, coordinator=link.address, house=site == HOUSE)
        self.signal(COORDINATOR, signal.SIGKILL)
        self.node(COORDINATOR).process.wait()
        self.federation.environment = self.storage.environment
        for name in (*self.replicas, *self.agents):
            self.start(name)
        self.settle()

    def _find_out_what_is_missing(self) -> None:
        if not self.as_root or os.geteuid() != 0:
            self.missing["namespace"] = self.missing["disk"] = "it needs root"
        elif not shutil.which("ip"):
            self.missing["namespace"] = "the command ip is missing"
        if _clock_library() is None:
            self.missing["clock"] = "libfaketime is not installed (apt: faketime)"

    def _make_namespace(self) -> str:
        """Makes the namespace of one site, joined to this one by a cable; the address of this end, "" without."""
        number = random.randrange(20, 250)
        self.namespace, self.cable = f"silotune-{secrets.token_hex(4)}", f"silotune{number}"
        if self.missing.get("namespace"):
            return ""
        here, there = f"{NAMESPACE_NET}.{number}.1", f"{NAMESPACE_NET}.{number}.2"
        self.ends = (here, there)
        inside = ["ip", "netns", "exec", self.namespace, "ip"]
        try:
            _command("ip", "netns", "add", self.namespace)
            self._stack.callback(_command, "ip", "netns", "del", self.namespace)
            _command("ip", "link", "add", self.cable, "type", "veth", "peer", "name", "up0", "netns", self.namespace)
            _command("ip", "addr", "add", f"{here}/30", "dev", self.cable)
            _command("ip", "link", "set", self.cable, "up")
            _command(*inside, "addr", "add", f"{there}/30", "dev", "up0")
            for name in ("lo", "up0"):
                _command(*inside, "link", "set", name, "up")
        except subprocess.CalledProcessError as error:
            self.missing["namespace"] = f"`{' '.join(error.cmd[:3])}`: {error.stderr.strip()}"
            return ""
        return here

    def _mount(self, directory: Path, *, megabytes: int) -> None:
        """A small disk of its own, so that it can be filled."""
        directory.mkdir(parents=True, exist_ok=True)
        try:
            _command("mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=700", "tmpfs", str(directory))
        except subprocess.CalledProcessError as error:
            self.missing["disk"] = f"mount: {error.stderr.strip()}"
            return
        self._stack.callback(_command, "umount", "--lazy", str(directory))

    def _wrap(self, name: str, argv: list[str]) -> list[str]:
        """Nothing outlives this process, however it ends; and what a node's own world needs."""
        words: list[str] = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
        if name == SITE_IN_NAMESPACE and not self.missing.get("namespace"):
            words += ["ip", "netns", "exec", self.namespace]
        if name in self.clocked:
            preload = {"FAKETIME_TIMESTAMP_FILE": str(self.clock_file(name)), **_preload()}
            words += ["env", *(f"{name}={value}" for name, value in preload.items())]
        if name in self.traced:
            words += [
                "strace", "-f", "-D", "-qq", "-o", "/dev/null", "-e", "trace=fdatasync,fsync",
                "-e", f"inject=fdatasync,fsync:signal=SIGKILL:when={self.traced[name]}",
            ]  # fmt: skip
        return [*words, *argv]

    # --- processes

    def clock_file(self, name: str) -> Path:
        return self.directory / "clocks" / name

    def node(self, name: str) -> Node:
        return self.federation.nodes[name]

    @property
    def agents(self) -> tuple[str, ...]:
        return (*self.sites, *((HOUSE,) if self.has_house else ()))

    @property
    def replicas(self) -> tuple[str, ...]:
        return self.storage.replicas

    def signal(self, name: str, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.node(name).process.send_signal(number)

    def end(self, name: str, number: int, *, seconds: float) -> None:
        """Ends a node, which comes back `seconds` after its end."""
        self.down.setdefault(name, Down(seconds))
        self.signal(name, number)

    def children(self, name: str, *, saying: str) -> list[psutil.Process]:
        """Processes below a node whose command line holds `saying`."""
        found = []
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.node(name).pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if saying in " ".join(child.cmdline()):
                        found.append(child)
        return found

    def watch(self) -> list[str]:
        """Starts again what has ended; names of the nodes that were."""
        now, started = time.monotonic(), []
        for name, node in list(self.federation.nodes.items()):
            status = node.process.poll()
            if status is None:
                continue
            expected = self.down.get(name)
            if expected is None and self.traced.pop(name, None):
                kind = "kill coordinator" if name in self.replicas else "kill agent"
                self.crashed.append(Injected(Fault(kind, name, When(0, "at a sync")), time.time(), time.time()))
                expected = self.down[name] = Down(0.0)
            if expected is None:
                if now < self.excused.get(name, -math.inf):
                    self.excused_ends["coordinator" if name in self.replicas else "agent"] += 1
                else:
                    self.unexplained.append(f"{name} ended by itself with status {status}:\n{node.tail(30)}")
                expected = self.down[name] = Down(RESPAWN_SECONDS)
            if expected.ended is None:
                expected.ended = now
            if now - expected.ended >= expected.seconds:
                del self.down[name]
                self.start(name)
                started.append(name)
        return started

    def start(self, name: str) -> None:
        if name in self.replicas:
            self.federation.start_coordinator(name, wait=False)
        else:
            self.federation.start_agent(name, wait=False)

    def trace(self, name: str, *, sync: int) -> None:
        """Starts a node anew, to be killed at its `sync`-th sync; 0: never."""
        self.end(name, signal.SIGKILL, seconds=0.0)
        self.node(name).process.wait()
        self.crashed.clear()
        self.traced = {name: sync} if sync else {}
        self.settle()

    def use_clocks(self, names: set[str]) -> None:
        """From now on these nodes, and no others, have a clock that can be stepped; those that change start anew."""
        for name in names ^ self.clocked:
            self.clocked ^= {name}
            self.set_clock(name, 0.0)
            self.end(name, signal.SIGKILL, seconds=0.0)

    def set_clock(self, name: str, offset_seconds: float) -> None:
        path = self.clock_file(name)
        temporary = path.with_suffix(".new")
        temporary.write_text(f"{offset_seconds:+.0f}\n")
        temporary.rename(path)

    def ready(self) -> bool:
        """Whether every node is up and the coordinators say that they are ready."""
        if self.down or any(node.process.poll() is not None for node in self.federation.nodes.values()):
            return False
        try:
            return all(self.node(name).get("/readyz")[0] == 200 for name in self.replicas)
        except OSError:
            return False

    def settle(self, *, seconds: float = 120.0) -> None:
        """Returns when every node is ready and every agent connected: a job that begins now misses nobody."""
        deadline = time.monotonic() + seconds
        while not (self.ready() and all(self.network.links[site].connections for site in self.agents)):
            self.watch()
            if time.monotonic() > deadline:
                raise TimeoutError(f"the federation did not come back within {seconds:g} s\n{self.tails()}")
            time.sleep(0.05)

    def tails(self, lines: int = 40) -> str:
        return "\n".join(f"--- {node.name}\n{node.tail(lines)}" for node in self.federation.nodes.values())

    def _stop(self) -> None:
        for name in self.federation.nodes:
            self.signal(name, signal.SIGCONT)
            # What is left to see is in the store; nobody waits for the draining of streams.
            self.signal(name, signal.SIGKILL)
        self.federation.stop()

    # --- disks

    def disk_of(self, name: str) -> Path:
        return self.federation.data if name in self.replicas else self.federation.home(name)

    def fill(self, name: str, *, leaving_bytes: float) -> None:
        self.excused[name] = math.inf
        disk = self.disk_of(name)
        free = shutil.disk_usage(disk).free - int(leaving_bytes)
        if free > 0:
            with (disk / FILLER).open("wb") as file, contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, free)

    def empty(self, name: str) -> None:
        (self.disk_of(name) / FILLER).unlink(missing_ok=True)
        self.excused[name] = time.monotonic() + EXCUSED_SECONDS

    def is_worn(self) -> bool:
        """Whether a fresh federation is better: a site is revoked, or the coordinator's small disk is used up.

        A site that is enrolled again would have a certificate of today, of the future once a clock is put back.
        """
        if self.has_lost_a_site:
            return True
        return not self.missing.get("disk") and shutil.disk_usage(self.federation.data).free < 300e6

    # --- the namespace's cable

    def cable_cut(self, direction: str) -> None:
        here, there = self.ends
        if direction == "both":
            _command("ip", "link", "set", self.cable, "down")
        elif direction == "up":
            _command("ip", "netns", "exec", self.namespace, "ip", "route", "add", "blackhole", f"{here}/32")
        else:
            _command("ip", "route", "add", "blackhole", f"{there}/32")

    def cable_heal(self) -> None:
        here, there = self.ends
        _command("ip", "link", "set", self.cable, "up")
        with contextlib.suppress(subprocess.CalledProcessError):
            _command("ip", "netns", "exec", self.namespace, "ip", "route", "del", "blackhole", f"{here}/32")
        with contextlib.suppress(subprocess.CalledProcessError):
            _command("ip", "route", "del", "blackhole", f"{there}/32")


def _clock_library() -> str | None:
    return next((path for path in LIBRARIES if Path(path).exists()), None)


def _preload() -> dict[str, str]:
    """For a process whose wall clock is set by libfaketime. The monotonic clock, which times its waits, stays true."""
    return {
        "LD_PRELOAD": str(_clock_library()),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def _command(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True, timeout=30)
