"""A whole federation on this machine: the real coordinator and the real agents as processes on loopback.

It types the commands that a person would type, each with its own directories, so nothing outside `directory` is
touched. The demo, the benchmark and the tests of whole federations stand on it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

START_SECONDS = 60.0
STOP_SECONDS = 15.0


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
    nodes: dict[str, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.data, self.profile = self.directory / "coordinator", self.directory / "operator"
        ports = free_ports(3)
        self.address = f"127.0.0.1:{ports[0]}"
        self._enrollment, self._http = (f"127.0.0.1:{port}" for port in ports[1:])

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
            "--enrollment-port", self._enrollment.rsplit(":", 1)[1], "--http-port", self._http.rsplit(":", 1)[1],
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

    def start_coordinator(self) -> Node:
        """Starts `silotune-coordinator serve` and waits until it is ready."""
        words = ["silotune-coordinator", "serve", "--data", str(self.data)]
        if self.insecure_loopback:
            words.append("--insecure-loopback")
        return self._start("coordinator", words, self._http)

    def home(self, name: str) -> Path:
        return self.directory / "agents" / name

    def enroll(self, name: str, *, site_toml: str, house: bool = False) -> None:
        """Invites and enrolls a site and writes its site.toml; `{http}` in it becomes a free address."""
        token = self.silotune("site", "invite", name, *(["--house"] if house else []))["token"]
        home = self.home(name)
        self.run(
            "silotune-agent", "enroll", "--coordinator", self.address, "--token", token, "--home", str(home)
        )  # fmt: skip
        (home / "site.toml").write_text(site_toml.replace("{http}", f"127.0.0.1:{free_ports(1)[0]}"))

    def start_agent(self, name: str, *, wait: bool = True) -> Node:
        """Starts `silotune-agent run`; with `wait` until it is connected."""
        home = self.home(name)
        words = ["silotune-agent", "run", "--home", str(home)]
        if self.insecure_loopback:
            words.append("--insecure-loopback")
        found = re.search(r'address\s*=\s*"([^"]+)"', (home / "site.toml").read_text())
        return self._start(name, words, found[1] if found else "127.0.0.1:9481", wait=wait)

    def stop(self) -> None:
        """Ends every process, agents first; what does not end in time is killed."""
        order = sorted(self.nodes.values(), key=lambda node: node.name == "coordinator")
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

    def _start(self, name: str, words: list[str], http_address: str, *, wait: bool = True) -> Node:
        log = self.directory / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        self.on_command(" ".join(words))
        with log.open("ab") as file:
            process = subprocess.Popen(
                self._argv(words), stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=self._env(),
                start_new_session=True,
            )  # fmt: skip
        node = Node(name, words, log, http_address, process)
        self.nodes[name] = node
        if wait:
            self.wait_for(lambda: _ready(node), seconds=START_SECONDS, saying=f"{name} being ready")
        return node

    def _argv(self, words: Sequence[str]) -> list[str]:
        # The commands that were installed with this interpreter, whatever PATH says.
        return [str(Path(sys.executable).parent / words[0]), *words[1:]]

    def _env(self) -> dict[str, str]:
        return {**os.environ, "PYTHONUNBUFFERED": "1", **self.environment}


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


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
