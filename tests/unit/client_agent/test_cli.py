from __future__ import annotations

import asyncio
import json
import re
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from client_agent import cli, first_site_file, identity, settings
from client_agent.hold import Pause, PauseFile
from client_agent.home import Home
from client_agent.policy import Approvals
from tests.servers.proxy import ConnectProxy
from tests.unit.client_agent.coordinator_in_memory import Authority, Coordinator, changed_token
from tests.unit.client_agent.work_to_do import model_bytes, spec


def invoke(*arguments: str, home: Path | Home) -> Result:
    place = home.path if isinstance(home, Home) else home
    return CliRunner().invoke(cli.main, [*arguments, "--home", str(place)])


async def invoke_beside(*arguments: str, home: Path | Home) -> Result:
    """The same, while the test's own coordinator answers."""
    return await asyncio.to_thread(invoke, *arguments, home=home)


def facts(result: Result) -> Any:
    answer = json.loads(result.stdout)
    assert answer["schema_version"] == "1"
    assert answer["exit_code"] == result.exit_code
    return answer["data"]


def token(coordinator: Coordinator, **changes: str) -> str:
    made = coordinator.authority.token("st-olav", address=coordinator.enrollment_address)
    return changed_token(made, **changes).encode()


async def test_enroll_says_what_to_do_next_and_writes_a_site_file_that_allows_nothing(
    tmp_path: Path, coordinator: Coordinator
) -> None:
    result = await invoke_beside(
        "enroll", "--coordinator", coordinator.address, "--token", token(coordinator), home=tmp_path
    )
    assert result.exit_code == 0, result.output
    assert "Enrolled as st-olav" in result.output
    for step in ("site.toml", "silotune-agent model add", "silotune-agent check", "silotune-agent run"):
        assert step in result.output
    site = settings.load(tmp_path / "site.toml")
    assert site.policy is None
    assert site.data == {}


def test_the_examples_in_the_first_site_file_are_valid(tmp_path: Path) -> None:
    lines = [line.removeprefix("# ").removeprefix("# ") for line in first_site_file.TEXT.splitlines()]
    (tmp_path / "site.toml").write_text("\n".join(line for line in lines if re.match(r"\[|\w+ = ", line)))
    site = settings.load(tmp_path / "site.toml")
    assert site.policy is not None
    assert site.data["answers"].labels == {"T": "treatment"}


async def test_enrolling_twice_is_a_conflict_and_leaves_the_site_file_alone(
    home: Home, coordinator: Coordinator
) -> None:
    before = home.site_file.read_text()
    arguments = ("enroll", "--coordinator", coordinator.address, "--token", token(coordinator), "--format", "json")
    result = await invoke_beside(*arguments, home=home)
    assert result.exit_code == 5
    assert facts(result)["error"] == "AlreadyExists"
    assert home.site_file.read_text() == before


@pytest.mark.parametrize(
    ("changes", "code"), [({"secret": "guess"}, 6), ({"enrollment_address": "127.0.0.1:1"}, 7), ({"name": "../x"}, 3)]
)
async def test_each_failure_of_enrollment_has_its_exit_code(
    tmp_path: Path, coordinator: Coordinator, changes: dict[str, str], code: int
) -> None:
    text = token(coordinator, **changes)
    result = await invoke_beside("enroll", "--coordinator", coordinator.address, "--token", text, home=tmp_path)
    assert result.exit_code == code, result.output


async def test_the_way_that_enrollment_was_told_is_kept_in_the_site_file(
    tmp_path: Path, coordinator: Coordinator
) -> None:
    (tmp_path / "hospital.pem").write_bytes(coordinator.authority.pem)
    (tmp_path / "home").mkdir()
    written = '[policy]\ntasks = ["*"]'
    (tmp_path / "home" / "site.toml").write_text(written)
    arguments = ["enroll", "--coordinator", f"{coordinator.address},localhost:1", "--token", token(coordinator)]
    async with ConnectProxy().serving() as proxy:
        proxy.names = {coordinator.enrollment_address: coordinator.enrollment_address}
        told = ["--proxy", proxy.url, "--ca-bundle", str(tmp_path / "hospital.pem")]
        result = await invoke_beside(*arguments, *told, home=tmp_path / "home")
    assert result.exit_code == 0, result.output
    assert proxy.tunnels == 1
    assert (tmp_path / "home" / "site.toml").read_text().startswith(written)
    network = settings.load(tmp_path / "home" / "site.toml").network
    assert (network.proxy, network.ca_bundle) == (proxy.url, str(tmp_path / "hospital.pem"))
    assert identity.load(tmp_path / "home" / "identity").addresses == (coordinator.address, "localhost:1")
    again = await invoke_beside(*arguments, "--replace", "--proxy", "http://other:3128", home=tmp_path / "home")
    assert (again.exit_code, "section with another proxy" in again.output) == (5, True)


async def test_enrollment_believes_a_bundle_only_when_it_is_named_with_the_token(tmp_path: Path) -> None:
    coordinator = Coordinator()
    coordinator.server_authority = Authority("Hospital Root CA")
    bundle = tmp_path / "hospital.pem"
    bundle.write_bytes(coordinator.server_authority.pem)
    site = f'[network]\nca_bundle = "{bundle}"\n'
    (tmp_path / "site.toml").write_text(site)
    async with coordinator.serving():
        arguments = ("enroll", "--coordinator", coordinator.address, "--token", token(coordinator))
        refused = await invoke_beside(*arguments, home=tmp_path)
        assert (refused.exit_code, "those of --ca-bundle" in " ".join(refused.output.split())) == (7, True)
        assert not coordinator.enrolled_keys, "the token was not shown"
        enrolled = await invoke_beside(*arguments, "--ca-bundle", str(bundle), home=tmp_path)
    assert enrolled.exit_code == 0, enrolled.output
    assert (tmp_path / "site.toml").read_text() == site


async def test_a_site_file_with_the_proxys_password_is_its_owners_alone(
    tmp_path: Path, coordinator: Coordinator
) -> None:
    arguments = ["enroll", "--coordinator", coordinator.address, "--token", token(coordinator)]
    file = tmp_path / "home" / "site.toml"
    file.parent.mkdir()
    file.write_text("")
    file.chmod(0o644)
    async with ConnectProxy().serving() as proxy:
        proxy.names = {coordinator.enrollment_address: coordinator.enrollment_address}
        proxy.login = "st-olav:secret"
        for home in (file.parent, tmp_path / "new"):
            result = await invoke_beside(*arguments, "--proxy", proxy.url, home=home)
            assert result.exit_code == 0, result.output
            assert "st-olav:secret" in (home / "site.toml").read_text()
            assert stat.S_IMODE((home / "site.toml").stat().st_mode) == 0o600
            coordinator.enrolled_keys.clear()


def test_a_proxy_that_is_no_url_is_refused_without_showing_it(tmp_path: Path) -> None:
    secret = "https://me:secret@proxy:3128"
    made = Authority().token("st-olav", address="localhost:1").encode()
    result = invoke("enroll", "--coordinator", "localhost:1", "--token", made, "--proxy", secret, home=tmp_path)
    assert result.exit_code == 3
    assert "secret" not in result.output
    (tmp_path / "site.toml").write_text(f'[network]\nproxy = "{secret}"\n')
    result = invoke("enroll", "--coordinator", "localhost:1", "--token", made, home=tmp_path)
    assert (result.exit_code, "network.proxy" in result.output, "secret" in result.output) == (3, True, False)


def test_half_a_token_and_a_bad_address_are_told_apart(tmp_path: Path) -> None:
    result = invoke("enroll", "--coordinator", "localhost:9443", "--token", "silo1.abc", home=tmp_path)
    assert (result.exit_code, "not a join token" in result.output) == (3, True)
    result = invoke("enroll", "--coordinator", "localhost", "--token", "silo1.abc", home=tmp_path)
    assert (result.exit_code, "HOST:PORT" in result.output) == (2, True)


async def test_check_prints_a_line_for_each_finding_and_fails_on_a_fault(home: Home) -> None:
    result = await invoke_beside("check", home=home)
    assert result.exit_code == 0, result.output
    assert "ok    network:" in result.output
    home.site_file.write_text("")
    result = await invoke_beside("check", "--format", "json", home=home)
    assert result.exit_code == 1
    assert {"subject": "policy", "ok": False, "sentence": "no [policy] in site.toml: nothing will run here"} in facts(
        result
    )["findings"]


async def test_status_tells_who_this_is_and_that_nothing_runs(home: Home) -> None:
    result = invoke("status", "--format", "json", home=home)
    assert (result.exit_code, facts(result)["name"], facts(result)["running"]) == (0, "st-olav", False)
    assert "st-olav" in invoke("status", home=home).output


async def test_a_pause_is_written_shown_and_ended(home: Home) -> None:
    file = PauseFile(home.pause_file)
    assert facts(invoke("pause", "--format", "json", home=home)) == {"paused": True, "until_unix_seconds": None}
    assert "until `silotune-agent resume`" in facts(invoke("status", "--format", "json", home=home))["hold"]
    before = time.time()
    until = facts(invoke("pause", "--for", "2h", "--format", "json", home=home))["until_unix_seconds"]
    assert before + 7200 <= until <= time.time() + 7200
    assert file.read() == Pause(until)
    assert "paused by its administrator until" in invoke("status", home=home).output
    file.remove()
    for text in ("soon", "99999d"):
        assert invoke("pause", "--for", text, home=home).exit_code == 3
        assert file.read() is None
    assert facts(invoke("resume", "--format", "json", home=home)) == {"paused": False}
    assert file.read() is None
    assert facts(invoke("status", "--format", "json", home=home))["hold"] == ""


def test_status_of_an_agent_that_is_not_enrolled_is_unauthenticated(tmp_path: Path) -> None:
    result = invoke("status", home=tmp_path)
    assert result.exit_code == 6
    assert "silotune-agent enroll" in result.output


def test_models_are_added_and_listed(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    result = invoke("model", "add", "minilm", "--path", str(directory), home=tmp_path / "home")
    assert result.exit_code == 3
    assert "holds no .safetensors weights" in result.output
    (directory / "model.safetensors").write_bytes(model_bytes())
    added = facts(
        invoke("model", "add", "minilm", "--path", str(directory), "--format", "json", home=tmp_path / "home")
    )
    listed = facts(invoke("model", "list", "--format", "json", home=tmp_path / "home"))
    assert listed == {"models": [added]}
    assert "minilm" in invoke("model", "list", home=tmp_path / "home").output


def test_a_model_comes_from_one_place(tmp_path: Path) -> None:
    assert invoke("model", "add", "minilm", home=tmp_path).exit_code == 2
    assert invoke("model", "add", "minilm", "--path", "x", "--hub", "y", home=tmp_path).exit_code == 2


def test_approvals_are_listed_shown_and_settled(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.create()
    Approvals(home.approvals).ask(spec().canonical_json, spec_hash=spec().hash, job_name="questions")
    listed = facts(invoke("approvals", "--format", "json", home=home))["approvals"]
    assert [(entry["job_name"], entry["verdict"]) for entry in listed] == [("questions", "waiting")]
    assert listed[0]["spec"] == json.loads(spec().canonical_json)
    assert '"payload_mb"' in invoke("approvals", "--show", spec().hash[:12], home=home).output
    assert invoke("approve", spec().hash[:12], home=home).exit_code == 0
    assert Approvals(home.approvals).verdict(spec().hash) == "approved"
    assert invoke("deny", spec().hash[:12], home=home).exit_code == 0
    assert Approvals(home.approvals).verdict(spec().hash) == "denied"
    assert invoke("approve", "0123456789", home=home).exit_code == 4


def test_run_refuses_beside_another_agent_and_before_enrollment(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.create()
    home.site_file.write_text("")
    assert invoke("run", home=home).exit_code == 6
    (home.identity / identity.FACTS).write_text('{"name": "st-olav", "coordinator": "localhost:1"}')
    for name in (identity.KEY, identity.CERTIFICATE, identity.CA):
        (home.identity / name).touch()
    with home.locked():
        assert invoke("run", home=home).exit_code == 5


def test_every_command_teaches(tmp_path: Path) -> None:
    for name, command in cli.main.commands.items():
        assert command.help, name
    result = CliRunner().invoke(cli.main, ["--help"])
    assert "The first day, in this order" in result.output
    assert "silo1." in CliRunner().invoke(cli.main, ["enroll", "--help"]).output
