"""A whole federation on this machine: the real coordinator and the real agents as processes on loopback.

It types the commands that a person would type, each with its own directories, so nothing outside `directory` is
touched. The demo, the benchmark and the tests of whole federations stand on it.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

START_SECONDS = 180.0
# More than an agent may take for saving its training: stop_seconds in client_agent/settings.py.
STOP_SECONDS = 45.0
# Below every system's range for outgoing connections: else such a connection may take the port of a node that is down
# for a moment, and the node cannot come back.
PORTS = range(15_000, 32_000)
COORDINATOR = "coordinator"
LISTENERS = ("address", "enrollment_address", "http_address")


class CommandFailed(Exception):
    """A command ended with another status than 0; `output` is what it printed."""

    def __init__(self, words: Sequence[str], status: int, output: str) -> None:
        super().__init__(f"`{' '.join(words)}` ended with status {status}:\n{output.strip()}")
        self.status = status
        self.output = output


@dataclass
class Node:
    """One long-running process and where it writes."""

    name: str
    words: list[str]
    log: Path
    http_address: str
    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return self.process.pid

    def tail(self, lines: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        if number in (signal.SIGKILL, signal.SIGTERM):
            self.process.wait(STOP_SECONDS)

    def get(self, path: str) -> tuple[int, str]:
        """(HTTP status, body) of the node's /metrics, /healthz or /readyz."""
        try:
            with urllib.request.urlopen(f"http://{self.http_address}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def peak_rss_bytes(self) -> int:
        """The largest resident set the process ever had (VmHWM)."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024


@dataclass
class LocalFederation:
    """Use as a context manager: at the end every process is stopped."""

    directory: Path
    # Without TLS, for the benchmark alone.
    insecure_loopback: bool = False
    # Called with each command as a person would type it.
    on_command: Callable[[str], None] = lambda _: None
    # Changes to coordinator.toml: {"tasks": {"lease_seconds": 2}}.
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    # What a node, named by the first argument, is really started as: words such as `env` may go before its own.
    wrap: Callable[[str, list[str]], list[str]] = lambda _, argv: argv
    json_logs: bool = False
    nodes: dict[str, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.data, self.profile = self.directory / COORDINATOR, self.directory / "operator"
        file = self.data / "coordinator.toml"
        if file.exists():
            # An earlier start: its agents know these addresses.
            listen = tomllib.loads(file.read_text())["listen"]
            self.address, self._enrollment, http = (listen[name] for name in LISTENERS)
        else:
            self.address, self._enrollment, http = (f"127.0.0.1:{port}" for port in free_ports(3))
        # The HTTP address of each coordinator; with replicas there are several.
        self._http = {COORDINATOR: http}

    def __enter__(self) -> LocalFederation:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- commands

    def run(self, *words: str, timeout_seconds: float = 120) -> str:
        """Runs one command to its end and returns its standard output. CommandFailed otherwise."""
        self.on_command(" ".join(words))
        done = subprocess.run(
            self._argv(words), capture_output=True, text=True, timeout=timeout_seconds, env=self._env()
        )
        if done.returncode != 0:
            raise CommandFailed(words, done.returncode, done.stderr + done.stdout)
        return done.stdout

    def silotune(self, *words: str, timeout_seconds: float = 120) -> Any:
        """Runs an operator's command and returns the `data` of its JSON."""
        printed = self.run(
            "silotune", *words, "--profile", str(self.profile), "--format", "json", timeout_seconds=timeout_seconds
        )
        return json.loads(printed)["data"]

    def job(self, job: str) -> dict[str, Any]:
        return self.silotune("job", "show", job)

    # --- nodes

    def init(self) -> None:
        """Makes the coordinator's data directory and the operator's profile."""
        host, port = self.address.rsplit(":", 1)
        self.run(
            "silotune-coordinator", "init", "--data", str(self.data), "--profile", str(self.profile),
            "--host", host, "--listen", host, "--port", port,
            "--enrollment-port", self._enrollment.rsplit(":", 1)[1],
            "--http-port", self._http[COORDINATOR].rsplit(":", 1)[1],
        )  # fmt: skip
        if self.insecure_loopback:
            with (self.profile / "profile.toml").open("a") as file:
                file.write("insecure_loopback = true\n")
        path = self.data / "coordinator.toml"
        text = path.read_text()
        for table, keys in self.settings.items():
            for key, value in keys.items():
                text = _set_key(text, table, key, json.dumps(value))
        path.write_text(text)

    def add_replica(self, name: str) -> str:
        """Makes the data directory of one more coordinator of the same federation; returns its main address.

        It has the first one's keys and settings, and listeners of its own. The settings must name a shared database
        and a shared blob store.
        """
        data = self.directory / name
        data.mkdir()
        for file in self.data.iterdir():
            if file.is_file() and file.name != "lock":
                shutil.copy2(file, data)
        listeners = dict(zip(LISTENERS, (f"127.0.0.1:{port}" for port in free_ports(3)), strict=True))
        path = data / "coordinator.toml"
        text = path.read_text()
        for key, address in listeners.items():
            text = _set_key(text, "listen", key, json.dumps(address))
        path.write_text(text)
        self._http[name] = listeners["http_address"]
        return listeners["address"]

    def start_coordinator(self, name: str = COORDINATOR, *, wait: bool = True) -> Node:
        """Starts `silotune-coordinator serve`; with `wait` until it is ready."""
        words = ["silotune-coordinator", "serve", "--data", str(self.directory / name)]
        if self.insecure_loopback:
            words.append("--insecure-loopback")
        return self.start(name, words, self._http[name], wait=wait)

    def home(self, name: str) -> Path:
        return self.directory / "agents" / name

    def enroll(
        self, name: str, *, site_toml: str, house: bool = False, coordinator: str = "", replace: bool = False
    ) -> None:
        """Invites and enrolls a site and writes its site.toml; `{http}` in it becomes a free address.

        `coordinator` is what the agent dials, where it is not the coordinator's own address.
        """
        token = self.silotune("site", "invite", name, *(["--house"] if house else []))["token"]
        home = self.home(name)
        self.run(
            "silotune-agent", "enroll", "--coordinator", coordinator or self.address, "--token", token,
            "--home", str(home), *(["--replace"] if replace else []),
        )  # fmt: skip
        (home / "site.toml").write_text(site_toml.replace("{http}", f"127.0.0.1:{free_ports(1)[0]}"))

    def start_agent(self, name: str, *, wait: bool = True) -> Node:
        """Starts `silotune-agent run`; with `wait` until it is connected."""
        home = self.home(name)
        words = ["silotune-agent", "run", "--home", str(home)]
        if self.insecure_loopback:
            words.append("--insecure-loopback")
        found = re.search(r'address\s*=\s*"([^"]+)"', (home / "site.toml").read_text())
        return self.start(name, words, found[1] if found else "127.0.0.1:9481", wait=wait)

    def start(self, name: str, words: list[str], http_address: str, *, wait: bool = True) -> Node:
        """Starts a long-running command as the node `name`; with `wait` until it is ready."""
        log = self.directory / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        self.on_command(" ".join(words))
        argv = self._argv([*words, *(["--log-format", "json"] if self.json_logs else [])])
        with log.open("ab") as file:
            process = subprocess.Popen(
                self.wrap(name, argv), stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=self._env(),
                start_new_session=True,
            )  # fmt: skip
        node = Node(name, words, log, http_address, process)
        self.nodes[name] = node
        if wait:
            self.wait_for(lambda: _ready(node), seconds=START_SECONDS, saying=f"{name} being ready")
        return node

    def stop(self) -> None:
        """Ends every process, agents first; what does not end in time is killed."""
        order = sorted(self.nodes.values(), key=lambda node: node.name in self._http)
        for node in order:
            if node.process.poll() is None:
                node.process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for node in order:
            try:
                node.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                node.process.kill()
                node.process.wait()

    def wait_for(self, what: Callable[[], Any], *, seconds: float, saying: str, poll_seconds: float = 0.2) -> Any:
        """The first true answer of `what`. TimeoutError with `saying` and the coordinator's log otherwise."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            answer = what()
            if answer:
                return answer
            self.check_alive()
            time.sleep(poll_seconds)
        logs = "\n".join(f"--- {node.name}\n{node.tail()}" for node in self.nodes.values())
        raise TimeoutError(f"{saying} did not happen within {seconds:g} s\n{logs}")

    def check_alive(self) -> None:
        """CommandFailed when a process has ended by itself, with its last lines."""
        for node in self.nodes.values():
            status = node.process.poll()
            if status is not None and status not in (-signal.SIGKILL, -signal.SIGTERM, 0):
                raise CommandFailed(node.words, status, node.tail())

    def _argv(self, words: Sequence[str]) -> list[str]:
        # The commands that were installed with this interpreter, whatever PATH says.
        return [str(Path(sys.executable).parent / words[0]), *words[1:]]

    def _env(self) -> dict[str, str]:
        return {**os.environ, "PYTHONUNBUFFERED": "1", **self.environment}


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on now."""
    free: list[int] = []
    while len(free) < count:
        port = random.choice(PORTS)
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in free:
            free.append(port)
    return free


def _ready(node: Node) -> bool:
    try:
        return node.get("/readyz")[0] == 200
    except OSError:
        return False


def _set_key(text: str, table: str, key: str, value: str) -> str:
    """`text` with one key of one table changed; a key that is not there is added to the table."""
    lines = text.splitlines()
    start = lines.index(f"[{table}]")
    for number in range(start + 1, len(lines)):
        if lines[number].startswith("["):
            break
        if re.match(rf"{re.escape(key)}\s*=", lines[number]):
            lines[number] = f"{key} = {value}"
            return "\n".join(lines) + "\n"
    lines.insert(start + 1, f"{key} = {value}")
    return "\n".join(lines) + "\n"
