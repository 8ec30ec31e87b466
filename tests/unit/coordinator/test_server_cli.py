from __future__ import annotations

import json
import re
import signal
import socket
import stat
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
from click.testing import CliRunner, Result

from coordinator import ca, settings
from coordinator.client import OperatorClient, load_profile
from coordinator.server_cli import main
from protos.v1 import operator_pb2

COMMAND = [sys.executable, "-c", "from coordinator.server_cli import main; main()"]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def init(directory: Path, *more: str) -> Result:
    fixed = ("--listen", "127.0.0.1", "--port", "0", "--profile", f"{directory}/profile")
    return run("init", "--data", directory / "data", *fixed, *more)


@contextmanager
def serving(directory: Path, *more: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """A coordinator as a process, and the addresses that its first line of log names."""
    command = [*COMMAND, "serve", "--data", str(directory), "--log-format", "json", *more]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        yield process, first_event(process.stderr, "serving")
    finally:
        process.kill()
        process.communicate()


def first_event(stream: IO[str], name: str) -> dict[str, str]:
    for line in stream:
        event = json.loads(line)
        if event["event"] == name:
            return event
    raise AssertionError(f"the log ended without {name!r}")


def test_init_makes_keys_settings_and_a_profile_and_says_what_to_do_next(tmp_path: Path):
    result = init(tmp_path, "--host", "fl.example.org", "--host", "10.0.0.1")
    assert result.exit_code == 0, result.output
    for command in ("silotune-coordinator serve --data", "site invite", "job submit"):
        assert command in result.output
    found = settings.load(tmp_path / "data")
    assert found.certificates.hosts == ("fl.example.org", "10.0.0.1")
    assert found.public.enrollment_address == "fl.example.org:0"
    profile = tomllib.loads((tmp_path / "profile/profile.toml").read_text())
    assert profile == {"address": "fl.example.org:0"}
    for private in ("data/ca-key.pem", "profile/key.pem"):
        assert stat.S_IMODE((tmp_path / private).stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700


def test_init_overwrites_nothing(tmp_path: Path):
    init(tmp_path)
    key = (tmp_path / "data" / ca.KEY_FILE).read_bytes()
    result = init(tmp_path)
    assert (result.exit_code, "has a coordinator already" in result.output) == (5, True)
    other = run("init", "--data", tmp_path / "other", "--profile", f"{tmp_path}/profile")
    assert (other.exit_code, "profile already" in other.output) == (5, True)
    assert (tmp_path / "data" / ca.KEY_FILE).read_bytes() == key


def test_init_answers_a_program_in_json(tmp_path: Path):
    answer = json.loads(init(tmp_path, "--format", "json").output)
    assert (answer["status"], answer["exit_code"]) == ("ok", 0)
    assert answer["data"]["profile"] == f"{tmp_path}/profile"
    refused = json.loads(init(tmp_path, "--format", "json").output)
    assert (refused["status"], refused["exit_code"], refused["data"]["error"]) == ("error", 5, "AlreadyExists")


def test_a_host_that_is_none_is_refused_before_anything_is_written(tmp_path: Path):
    assert init(tmp_path, "--host", 'a"b').exit_code == 3
    assert not (tmp_path / "data").exists()


def test_config_show_prints_valid_settings_with_their_defaults(tmp_path: Path):
    init(tmp_path)
    shown = tomllib.loads(run("config", "show", "--data", tmp_path / "data").output)
    assert settings.Settings.model_validate(shown) == settings.load(tmp_path / "data")
    missing = run("config", "show", "--data", tmp_path)
    assert (missing.exit_code, "does not exist" in missing.output) == (3, True)


def test_a_coordinator_serves_the_profile_that_init_wrote_and_stops_on_sigterm(tmp_path: Path):
    init(tmp_path)
    with serving(tmp_path / "data") as (process, at):
        profile = tmp_path / "profile/profile.toml"
        profile.write_text(f'address = "{at["address"].replace("127.0.0.1", "localhost")}"\n')
        with OperatorClient(load_profile(f"{tmp_path}/profile")) as client:
            assert not client.ask("ListSites", operator_pb2.ListSitesRequest()).sites
            renewed = run("operator", "--data", tmp_path / "data", "--profile", f"{tmp_path}/second", "--name", "ann")
            assert renewed.exit_code == 0
        with urllib.request.urlopen(f"http://{at['http']}/readyz", timeout=60) as response:
            assert json.load(response) == {"ready": True, "reasons": []}
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


def test_a_second_coordinator_on_one_data_directory_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path):
    init(tmp_path)
    command = [*COMMAND, "serve", "--data", str(tmp_path / "data")]
    with serving(tmp_path / "data") as (process, _):
        second = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert second.returncode == 5
        assert f"Another coordinator (process {process.pid}) serves from" in second.stderr
        process.kill()
        process.wait()
        with serving(tmp_path / "data"):
            pass


@pytest.mark.parametrize("key", ["address", "enrollment_address", "http_address"])
def test_a_taken_port_is_one_clear_sentence(tmp_path: Path, key: str):
    init(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        file = tmp_path / "data" / settings.FILE_NAME
        file.write_text(re.sub(rf"(?m)^{key} = .*", f'{key} = "{address}"', file.read_text(), count=1))
        command = [*COMMAND, "serve", "--data", str(tmp_path / "data")]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 5
    assert f"error: Cannot listen on {address}: another program has this port" in result.stderr
    assert "Traceback" not in result.stderr


def test_no_tls_is_for_loopback_only(tmp_path: Path):
    run("init", "--data", tmp_path / "data", "--port", "0", "--profile", f"{tmp_path}/profile")
    result = run("serve", "--data", tmp_path / "data", "--insecure-loopback")
    assert (result.exit_code, "127.0.0.1 only" in result.output) == (3, True)
