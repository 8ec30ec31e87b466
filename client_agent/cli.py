"""The command line of a site's administrator: `silotune-agent`.

Exit codes: 0 done; 1 a check found a fault; 2 usage; 3 invalid input (token, site.toml, model); 4 not found; 5 conflict
or already there; 6 unauthenticated or forbidden; 7 coordinator unreachable; 8 out of space or corrupt data; 9 internal.
"""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from client_agent import facts, first_site_file, hold, identity, policy
from client_agent.home import Home
from client_agent.models import BaseModel, Models, check_model_name, fetch_from_hub
from client_agent.observe import StatusFile
from client_agent.terminal import command, console, format_option, home_option
from protos import errors
from protos.identity import JoinToken, check_name

FAULT = 1


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(facts.agent_version(), prog_name="silotune-agent")
def main() -> None:
    """Runs next to a hospital's data and decides what may be trained on it.

    \b
    The first day, in this order:
      silotune-agent enroll --coordinator fed.example.org:9443 --token silo1....
      edit site.toml: your data sets, and a [policy] of what may run
      silotune-agent model add minilm --path /models/all-MiniLM-L6-v2
      silotune-agent check
      silotune-agent run

    Exit codes: 0 done, 1 a check found a fault, 2 usage, 3 invalid input, 4 not found, 5 conflict or already there,
    6 unauthenticated or forbidden, 7 coordinator unreachable, 8 out of space or corrupt data, 9 internal error.
    """


@main.command()
@click.option(
    "--coordinator",
    required=True,
    metavar="HOST:PORT",
    help="Where the coordinator answers agents; several addresses with commas between.",
)
@click.option("--token", required=True, help="The line that `silotune site invite` printed.")
@click.option("--replace", is_flag=True, help="Enroll afresh although this agent is enrolled already.")
@click.option("--proxy", default="", metavar="URL", help="Go through this HTTP proxy; site.toml keeps it.")
@click.option(
    "--ca-bundle",
    default="",
    metavar="FILE",
    help="CAs in PEM that may vouch for the coordinator besides the federation's own; site.toml keeps it. Whoever has "
    "a certificate of one of them could take the token: name it only if the operator says so.",
)
@home_option
@format_option
@command
def enroll(
    *, home: Home, text: bool, coordinator: str, token: str, replace: bool, proxy: str, ca_bundle: str
) -> dict[str, Any]:
    """Joins a federation with a one-time token.

    The key is made here and stays here; only a signing request is sent. Repeating the command after a lost answer is
    safe.

    \b
    Examples:
      silotune-agent enroll --coordinator fed.example.org:9443 --token silo1.eyJuYW1lIjoi...
      silotune-agent enroll --coordinator a.example.org:9443,b.example.org:9443 --proxy http://proxy:3128 --token ...
    """
    _check_addresses(coordinator)
    parsed = JoinToken.decode(token)
    check_name(parsed.name)
    home.create()
    bundle = str(Path(ca_bundle).resolve()) if ca_bundle else ""
    with home.locked():
        network = first_site_file.network_with(home.site_file, proxy=proxy, ca_bundle=bundle)
        enrolled = identity.enroll(
            home.identity, token=parsed, coordinator=coordinator, replace=replace,
            network=network.model_copy(update={"ca_bundle": bundle}),
        )  # fmt: skip
        wrote = first_site_file.write(home.site_file, network=network)
    if text:
        console.print(f"Enrolled as [bold]{enrolled.name}[/] at {coordinator}.")
        console.print(f"The certificate is valid until {enrolled.expires:%Y-%m-%d %H:%M} UTC and renews itself.")
        console.print("\nNext:")
        what = "Edit" if wrote else "Check"
        console.print(
            f"  1. {what} {home.site_file}: your data sets, and a \\[policy] of what may run.", soft_wrap=True
        )
        console.print("  2. silotune-agent model add NAME --path DIR   for each base model that jobs may use.")
        console.print("  3. silotune-agent check")
        console.print("  4. silotune-agent run")
    return {
        "name": enrolled.name,
        "coordinator": coordinator,
        "certificate_expires": enrolled.expires.isoformat(),
        "site_file": str(home.site_file),
    }


@main.command()
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", help="Log lines for people, or JSON objects."
)
@click.option(
    "--insecure-loopback",
    is_flag=True,
    help="Without TLS, for benchmarks: only to a coordinator on 127.0.0.1 that serves with the same flag.",
)
@home_option
@command
def run(*, home: Home, text: bool, log_format: str, insecure_loopback: bool) -> None:
    """Asks the coordinator for work and does what the policy allows, until it is stopped.

    SIGTERM or Ctrl-C stops it. Finished work is kept and handed in at the next start; a training is saved at its next
    step, for which it has [device] stop_seconds (30), and goes on from there.

    \b
    Examples:
      silotune-agent run
      silotune-agent run --home /srv/silotune --log-format json
    """
    # Imported here: gRPC's event loop and the HTTP server are of no use to the other commands.
    from client_agent import main as daemon

    daemon.run(home, json_logs=log_format == "json", insecure_loopback=insecure_loopback)


@main.command()
@home_option
@format_option
@command
def status(*, home: Home, text: bool) -> dict[str, Any]:
    """Shows what the agent does now and what it waits for."""
    enrolled = identity.load(home.identity)
    running = home.is_locked()
    now = StatusFile(home.status_file).read() if running else {}
    shown = {
        "name": enrolled.name,
        "coordinator": enrolled.coordinator,
        "certificate_expires": enrolled.expires.isoformat(),
        "running": running,
        "connected": bool(now.get("connected")),
        "not_ready": now.get("not_ready", ""),
        "waits_for": now.get("waits_for", ""),
        "hold": now.get("hold", "") if running else _pause_sentence(home),
        "tasks": now.get("tasks", []),
    }
    if text:
        console.print(f"{enrolled.name} at {enrolled.coordinator}: {'running' if running else 'not running'}")
        if running:
            age = time.time() - now.get("unix_seconds", 0)
            console.print(f"  {'connected' if shown['connected'] else 'not connected'}, {age:.0f} s ago")
        for line in dict.fromkeys((shown["hold"], shown["not_ready"], shown["waits_for"])):
            if line:
                console.print(f"  {line}", markup=False)
        for task in shown["tasks"]:
            part = f" {100 * task['done'] / task['total']:.0f} %" if task["total"] else ""
            console.print(f"  job {task['job']}, round {task['round']}, {task['kind']}: {task['stage']}{part}")
    return shown


def _pause_sentence(home: Home) -> str:
    return hold.reason(hold.PauseFile(home.pause_file).read(), (), now=datetime.now())


@main.command()
@click.option("--for", "for_", metavar="TIME", help='Such as "90m", "2h" or "1d" [default: until `resume`].')
@home_option
@format_option
@command
def pause(*, home: Home, text: bool, for_: str | None) -> dict[str, Any]:
    """Gives this machine's device back at the trainer's next step, and keeps it free.

    The training's state is saved and goes on later from there, bit for bit as if it had not been paused. A step and
    saving may take 120 s together, and the disk must have room; else it goes on from its last checkpoint (the recipe's
    checkpoint_seconds) or from the beginning, and the agent's log says so.

    The task stays this site's; the coordinator is told that it is paused, and closes its round by the round's own
    rules. Holds over restarts of the agent.

    \b
    Example:
      silotune-agent pause --for 2h
    """
    identity.load(home.identity)
    until = None if for_ is None else time.time() + hold.duration_seconds(for_)
    hold.PauseFile(home.pause_file).write(hold.Pause(until))
    if text:
        console.print(_pause_sentence(home), soft_wrap=True)
    return {"paused": True, "until_unix_seconds": until}


@main.command()
@home_option
@format_option
@command
def resume(*, home: Home, text: bool) -> dict[str, Any]:
    """Ends a pause."""
    identity.load(home.identity)
    hold.PauseFile(home.pause_file).remove()
    if text:
        console.print("This site is not paused; it works within its hours.")
    return {"paused": False}


@main.command()
@home_option
@format_option
@command
def check(*, home: Home, text: bool) -> tuple[dict[str, Any], int]:
    """Looks at data, device, models, policy, certificate and network, and says what is wrong.

    Nothing is sent but a TLS handshake. Exit code 1 when a fault was found.

    \b
    Example:
      silotune-agent check && silotune-agent run
    """
    from client_agent import checks

    findings = []
    for finding in checks.all_findings(home):
        findings.append(finding)
        if text:
            mark = "[green]ok   [/]" if finding.ok else "[red]fault[/]"
            console.print(mark, end=" ")
            console.print(f"{finding.subject}: {finding.sentence}", markup=False, soft_wrap=True)
    faults = sum(not finding.ok for finding in findings)
    if text:
        console.print(f"\n{faults} fault{'' if faults == 1 else 's'} found." if faults else "\nAll is well.")
    listed = [{"subject": f.subject, "ok": f.ok, "sentence": f.sentence} for f in findings]
    return {"findings": listed, "faults": faults}, FAULT if faults else 0


@main.group()
def model() -> None:
    """The base models that this site holds."""


@model.command("add")
@click.argument("name")
@click.option("--path", "path", type=click.Path(path_type=Path), help="A directory with the model's files.")
@click.option("--hub", metavar="ID", help="A repository of the Hugging Face hub, to be downloaded.")
@click.option("--revision", help="With --hub: a commit, tag or branch.")
@home_option
@format_option
@command
def model_add(
    *, home: Home, text: bool, name: str, path: Path | None, hub: str | None, revision: str | None
) -> dict[str, Any]:
    """Makes a base model known here under NAME, the name that recipes use.

    This is the only command that ever downloads anything, and only safetensors and text files. Without network, --hub
    takes what Hugging Face's cache on this machine (HF_HOME) holds of that revision.

    \b
    Examples:
      silotune-agent model add minilm --path /models/all-MiniLM-L6-v2
      silotune-agent model add minilm --hub sentence-transformers/all-MiniLM-L6-v2 --revision c9745ed
    """
    if (path is None) == (hub is None):
        raise click.UsageError("Give either --path DIR or --hub ID.")
    if revision and not hub:
        raise click.UsageError("--revision goes with --hub.")
    home.create()
    if hub:
        check_model_name(name)
        path = fetch_from_hub(hub, revision=revision, cache=home.models)
    assert path is not None
    with console.status("Reading the model ...") as shown:
        on_file = (lambda file: shown.update(f"Reading {file} ...")) if text else (lambda file: None)
        # A folder of a hub cache is named after the commit.
        commit = path.name if hub else ""
        added = Models(home.models_file).add(name, path, hub=hub or "", revision=commit, on_file=on_file)
    if text:
        console.print(f"{added.name}: {added.parameters:,} parameters, {added.size_bytes / 1e6:,.1f} MB")
        console.print(f"digest {added.digest}", soft_wrap=True)
        if added.hub:
            console.print(f"{added.hub} at {added.revision}", markup=False, soft_wrap=True)
    return _model_facts(added)


@model.command("list")
@home_option
@format_option
@command
def model_list(*, home: Home, text: bool) -> dict[str, Any]:
    """Lists the base models of this site."""
    models = Models(home.models_file).all()
    if text:
        table = Table("name", "parameters", "MB", "layers", "digest", "directory")
        for entry in models:
            table.add_row(
                entry.name, f"{entry.parameters:,}", f"{entry.size_bytes / 1e6:,.1f}", str(entry.layers or "?"),
                entry.digest[:12], entry.directory,
            )  # fmt: skip
        console.print(table if models else "No base models yet: silotune-agent model add NAME --path DIR")
    return {"models": [_model_facts(entry) for entry in models]}


def _model_facts(model: BaseModel) -> dict[str, Any]:
    names = ("name", "directory", "digest", "parameters", "size_bytes", "hidden_size", "layers", "hub", "revision")
    return {name: getattr(model, name) for name in names}


@main.command()
@click.option("--show", metavar="HASH", help="Print the whole job spec that begins with this hash.")
@home_option
@format_option
@command
def approvals(*, home: Home, text: bool, show: str | None) -> dict[str, Any]:
    """Lists the jobs that wait for your approval, and those that you have settled.

    They are asked about when the policy says approval = "ask".
    """
    found = policy.Approvals(home.approvals).all()
    if show:
        found = [approval for approval in found if approval.spec_hash.startswith(show)]
        if not found:
            raise errors.NotFound(f"No job spec with the hash {show[:64]} has asked.")
    if text and show:
        click.echo(json.dumps(json.loads(found[0].spec_json), indent=2))
    elif text:
        table = Table("hash", "job", "asked", "verdict")
        for approval in found:
            asked = time.strftime("%Y-%m-%d %H:%M", time.localtime(approval.asked_unix_seconds))
            table.add_row(approval.spec_hash[:12], approval.job_name, asked, approval.verdict)
        console.print(table if found else "No job has asked.")
    return {
        "approvals": [
            {
                "spec_hash": approval.spec_hash,
                "job_name": approval.job_name,
                "asked_unix_seconds": approval.asked_unix_seconds,
                "verdict": approval.verdict,
                "spec": json.loads(approval.spec_json),
            }
            for approval in found
        ]
    }


@main.command()
@click.argument("spec_hash", metavar="HASH")
@home_option
@format_option
@command
def approve(*, home: Home, text: bool, spec_hash: str) -> dict[str, Any]:
    """Lets the job whose spec has this HASH run here; its first digits are enough.

    The approval holds for this exact spec: a job that differs in one setting asks again.
    """
    return _settle(home, spec_hash, approved=True, text=text)


@main.command()
@click.argument("spec_hash", metavar="HASH")
@home_option
@format_option
@command
def deny(*, home: Home, text: bool, spec_hash: str) -> dict[str, Any]:
    """Refuses the job whose spec has this HASH; the operator is told so."""
    return _settle(home, spec_hash, approved=False, text=text)


def _settle(home: Home, spec_hash: str, *, approved: bool, text: bool) -> dict[str, Any]:
    approval = policy.Approvals(home.approvals).settle(spec_hash, approved=approved)
    if text:
        console.print(f"{approval.job_name} ({approval.spec_hash[:12]}) is {approval.verdict}.")
    return {"spec_hash": approval.spec_hash, "job_name": approval.job_name, "verdict": approval.verdict}


def _check_addresses(coordinator: str) -> None:
    for address in coordinator.split(","):
        host, _, port = address.strip().rpartition(":")
        if not host or not port.isdigit():
            raise click.UsageError(f"--coordinator {coordinator!r} is not HOST:PORT, like fed.example.org:9443.")


if __name__ == "__main__":
    main()
