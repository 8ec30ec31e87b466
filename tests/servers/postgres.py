"""A real PostgreSQL server for tests: its own processes, port and data, killed and started again at will.

The system's own PostgreSQL is taken where there is one, else the one inside the package pgserver. PostgreSQL refuses to
run as root, so root's server runs as nobody, in a directory that nobody can reach.

    with postgres(directory) as server:
        store = Store.open(server.create("silotune"))
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import psycopg

from deploy.local import free_ports

USER = "silotune"
START_SECONDS = 120
PACKAGED = Path("pgserver", "pginstall")
AS_NOBODY: dict = {"user": "nobody", "group": "nogroup", "extra_groups": []}


@contextmanager
def postgres(directory: Path, *, durable: bool = True, binaries: Path | None = None) -> Iterator[Postgres]:
    """A server that runs until the block ends; its log goes to `directory`. Not `durable`: faster, a kill may lose."""
    with tempfile.TemporaryDirectory(prefix="silotune-postgres-") as home:
        server = Postgres(Path(home), log=directory / "postgres.log", durable=durable, binaries=binaries)
        try:
            server.start()
            yield server
        finally:
            server.stop_immediately()


class Postgres:
    def __init__(self, home: Path, *, log: Path, durable: bool, binaries: Path | None) -> None:
        self._home = home
        self._log = log
        self._as: dict = AS_NOBODY if os.geteuid() == 0 else {}
        if self._as:
            shutil.chown(home, "nobody", "nogroup")
        self._binaries = _readable(binaries or find_binaries(), home=home, run_as=self._as)
        self._settings = ["max_connections=100", "shared_buffers=32MB", "listen_addresses=127.0.0.1"]
        self._settings += ["unix_socket_directories=", "logging_collector=off"]
        if not durable:
            self._settings += ["fsync=off", "full_page_writes=off", "synchronous_commit=off"]
        self._process: subprocess.Popen[bytes] | None = None
        # It is still free after a stop, and no client that waits for the server to come back ever connects to itself.
        (self.port,) = free_ports(1)
        self._run("initdb", "--pgdata", home / "data", "--username", USER, "--auth=trust", "--no-sync", "-E", "UTF8")

    @property
    def pid(self) -> int:
        """Of the postmaster."""
        assert self._process is not None, "the server has not been started"
        return self._process.pid

    def url(self, database: str) -> str:
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{database}"

    def create(self, database: str, *, template: str = "template1") -> str:
        """The URL of a new database: a copy of `template`, which nobody may be connected to. One of this name goes."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f'DROP DATABASE IF EXISTS "{database}" WITH (FORCE)'.encode())
            connection.execute(f'CREATE DATABASE "{database}" TEMPLATE "{template}"'.encode())
        return self.url(database)

    def start(self) -> None:
        """Returns when the server answers."""
        command = [str(self._binaries / "postgres"), "-D", str(self._home / "data"), "-p", str(self.port)]
        for setting in self._settings:
            command += ["-c", setting]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self._home,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **self._as,
            )
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=5).close()
                return
            except psycopg.OperationalError as error:
                ended = self._process.poll() is not None
                if ended or time.monotonic() > until:
                    said = self._log.read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"PostgreSQL does not start: {error}\n{said}") from error
                time.sleep(0.05)

    def stop_immediately(self) -> None:
        """Ends it without a checkpoint, as a crash of the machine would that keeps what was synced."""
        self._end(signal.SIGQUIT)

    def kill(self) -> None:
        """SIGKILL to every process of the server at once."""
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        # A child lives on for a moment without its parent, and a new server would refuse to start beside it.
        family = psutil.Process(self.pid).children(recursive=True)
        self._process.send_signal(number)
        self._process.send_signal(signal.SIGCONT)
        if number is signal.SIGKILL:
            for child in family:
                _kill(child)
        self._process.wait(START_SECONDS)
        until = time.monotonic() + START_SECONDS
        while not all(map(_is_gone, family)):
            assert time.monotonic() < until, f"processes of PostgreSQL live on: {family}"
            time.sleep(0.01)

    def _run(self, program: str, *arguments: str | Path) -> None:
        command = [str(self._binaries / program), *map(str, arguments)]
        done = subprocess.run(
            command, cwd=self._home, env=self._environment, capture_output=True, text=True, **self._as
        )
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stderr}")

    @property
    def _environment(self) -> dict[str, str]:
        return {"PATH": os.environ.get("PATH", ""), "HOME": str(self._home), "LC_ALL": "C", "TZ": "UTC"}


def find_binaries() -> Path:
    """The directory with initdb and postgres."""
    on_path = shutil.which("initdb")
    if on_path and shutil.which("postgres"):
        return Path(on_path).resolve().parent
    if shutil.which("pg_config"):
        said = subprocess.run(["pg_config", "--bindir"], capture_output=True, text=True, check=True).stdout
        # Only the client's part of PostgreSQL may be installed.
        if (Path(said.strip()) / "postgres").exists():
            return Path(said.strip())
    return packaged_binaries()


def packaged_binaries() -> Path:
    """Those of the package pgserver; importing it would do work."""
    for place in map(Path, sys.path):
        if (place / PACKAGED / "bin" / "postgres").exists():
            return place / PACKAGED / "bin"
    raise RuntimeError("There is no PostgreSQL: neither the system's nor the package pgserver of the extra `dev`.")


def _readable(binaries: Path, *, home: Path, run_as: dict) -> Path:
    """The same binaries where the server's user can run them: site-packages may lie in a private directory."""
    try:
        subprocess.run([str(binaries / "postgres"), "--version"], capture_output=True, check=True, cwd="/", **run_as)
    except PermissionError:
        # They look for the package's other files by relative paths.
        for part in binaries.parents[2].glob("pgserver*"):
            shutil.copytree(part, home / part.name, symlinks=True)
        subprocess.run(["chmod", "-R", "a+rX", str(home)], check=True)
        return home / PACKAGED / "bin"
    return binaries


def _is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return
