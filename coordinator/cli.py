"""The operator's commands: `silotune site` and `silotune model` here, `silotune job` in job_cli.py.

They are clients of OperatorService and nothing else, so they run on any machine that has an operator profile.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import click

from coordinator import base_model, export
from coordinator.client import OperatorClient, facts, load_profile
from coordinator.terminal import Duration, Output, duration, moment, size, table, with_output
from protos.errors import InvalidInput
from protos.identity import JoinToken, at_port, check_name
from protos.v1 import operator_pb2

profile_option = click.option(
    "--profile", default="default", show_default=True, help="Operator profile: a name, or the path of its folder."
)
job_argument = click.argument("job_name", metavar="JOB")


def asks(function: Callable[..., int | None]) -> Callable[..., None]:
    """Gives a command `--profile` and `--format`, and what follows from them: its `client` and its `output`."""

    @profile_option
    @functools.wraps(function)
    def command(*, profile: str, **arguments: object) -> int | None:
        with OperatorClient(load_profile(profile)) as client:
            return function(client=client, **arguments)

    return with_output(command)


# --- site


@click.group()
def site() -> None:
    """Invite sites, see who is there, revoke them.

    \b
    silotune site invite st-olav
    silotune site list
    """


@site.command()
@click.argument("name")
@click.option("--house", is_flag=True, help="Your own agent beside the coordinator: makes version 0, evaluates.")
@click.option("--valid", type=Duration(), default="1h", show_default=True, help="How long the token may be used.")
@asks
def invite(*, client: OperatorClient, output: Output, name: str, house: bool, valid: float) -> None:
    """Make a one-time token with which the site NAME joins.

    The token alone goes to stdout. It also carries the fingerprint of this federation's CA, so the site needs nothing
    else; hand it over by a channel that you trust, because whoever uses it first is NAME.

    \b
    silotune site invite st-olav
    silotune site invite house --house --valid 10m
    silotune site invite st-olav > token.txt
    """
    request = operator_pb2.InviteSiteRequest(name=check_name(name), house=house, valid_seconds=valid)
    invitation: operator_pb2.InviteSiteResponse = client.ask("InviteSite", request)
    # The site dials the public name, which the operator's own profile may not have.
    public = JoinToken.decode(invitation.token).enrollment_address
    coordinator = at_port(public, client.profile.address.rpartition(":")[2])
    output.answer({"name": name, "coordinator": coordinator, **facts(invitation)}, text=invitation.token)
    output.note(f"\n{name} can use it once, until {moment(invitation.expires_unix_seconds)}. At the site:")
    output.note(f"\n  silotune-agent enroll --coordinator {coordinator} --token TOKEN")


@site.command("list")
@asks
def list_sites(*, client: OperatorClient, output: Output) -> None:
    """Show every site: whether it is connected or paused, or silent since when, its device, its data sets.

    \b
    silotune site list
    silotune site list --format json
    """
    answer: operator_pb2.ListSitesResponse = client.ask("ListSites", operator_pb2.ListSitesRequest())
    shown = table("site", "state", "last seen", "certificate until", "device", "data sets", "agent")
    for found in answer.sites:
        data_sets = ", ".join(
            f"{data.name} ({data.rows})" if data.rows else data.name for data in found.agent.data_sets
        )
        shown.add_row(
            f"{found.name} (house)" if found.house else found.name,
            _presence(found),
            moment(found.last_seen_unix_seconds),
            moment(found.certificate_expires_unix_seconds)[:10],
            found.agent.device,
            data_sets,
            found.agent.version,
        )
    text = shown if answer.sites else "No site is invited yet; `silotune site invite NAME` invites one."
    output.answer(facts(answer), text=text)


def _presence(found: operator_pb2.SiteView) -> str:
    if found.connected:
        return "connected, paused" if found.paused else "connected"
    if found.state != "ENROLLED" or not found.last_seen_unix_seconds:
        return found.state.lower()
    return f"silent for {duration(time.time() - found.last_seen_unix_seconds)}"


@site.command()
@click.argument("name")
@asks
def revoke(*, client: OperatorClient, output: Output, name: str) -> None:
    """Shut the site NAME out within a second; what it is sending or loading is cut.

    Its certificate stays refused for ever. A new invitation under the same name lets it in again.

    \b
    silotune site revoke st-olav
    """
    client.ask("RevokeSite", operator_pb2.RevokeSiteRequest(name=name))
    output.answer({"name": name, "state": "REVOKED"}, text=f"{name} is revoked.")


# --- model


@click.group()
def model() -> None:
    """Take a finished model home; give a base model to sites that lack it.

    \b
    silotune model export JOB --out DIR
    silotune model add org/model DIR
    silotune model list
    silotune model remove org/model
    """


@model.command("add")
@click.argument("name")
@click.argument("directory", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@asks
def add_model(*, client: OperatorClient, output: Output, name: str, directory: Path) -> None:
    """Upload the base model in DIR, so that sites may fetch it under NAME for a job of theirs.

    Only safetensors weights, configuration and tokenizer go. A site fetches it while it has a task of a job with that
    base model, if its policy allows the model and has fetch_base_models = true; it checks the digest, and keeps it for
    other jobs. An interrupted upload goes on when the command is repeated.

    \b
    silotune model add ContactDoctor/Bio-Medical-Llama-3-8B ./Bio-Medical-Llama-3-8B
    """
    with output.console.status("Reading the model ...") if output.is_live else nullcontext() as shown:

        def on_file(file: str, done: int) -> None:
            if shown:
                shown.update(f"{file}: {size(done)}")

        digest, total = base_model.add(client, name=name, directory=directory, on_file=on_file)
    output.answer({"name": name, "digest": digest, "size_bytes": total}, text=f"{name}: {size(total)}, {digest}")


@model.command("list")
@asks
def list_models(*, client: OperatorClient, output: Output) -> None:
    """Show the base models that sites may fetch.

    \b
    silotune model list
    """
    answer: operator_pb2.ListBaseModelsResponse = client.ask("ListBaseModels", operator_pb2.ListBaseModelsRequest())
    shown = table("name", "size", "digest", "state")
    for found in answer.models:
        state = "ready" if found.complete else "incomplete: repeat `silotune model add`"
        shown.add_row(found.name, size(sum(file.blob.size for file in found.files)), found.digest[:12], state)
    text = shown if answer.models else "No base model is served; `silotune model add NAME DIR` adds one."
    output.answer(facts(answer), text=text)


@model.command("remove")
@click.argument("name")
@asks
def remove_model(*, client: OperatorClient, output: Output, name: str) -> None:
    """Serve the base model NAME no longer; its files are deleted with the garbage, an hour or two later.

    Sites keep the copies that they have. Refused while a job that is under way names it.

    \b
    silotune model remove org/model
    """
    client.ask("RemoveBaseModel", operator_pb2.RemoveBaseModelRequest(name=name))
    output.answer({"name": name}, text=f"{name} is no longer served.")


@model.command("export")
@job_argument
@click.option("--out", "directory", required=True, type=click.Path(file_okay=False, path_type=Path), help="Where to.")
@click.option("--round", "round_number", type=click.IntRange(min=0), help="Default: the best round, else the latest.")
@click.option("--force", is_flag=True, help="Replace an earlier export in the same directory.")
@asks
def export_model(
    *, client: OperatorClient, output: Output, job_name: str, directory: Path, round_number: int | None, force: bool
) -> None:
    """Write a version of JOB's model as a Hugging Face directory with a model card.

    An interrupted export goes on where it stopped when the command is repeated. Every file is checked against the
    digest that the coordinator committed.

    \b
    silotune model export JOB --out model
    silotune model export JOB --out model-3 --round 3
    """
    if directory.exists() and not directory.is_dir():
        raise InvalidInput(f"{directory} is a file.")
    exported = export.export(
        client, job=job_name, version=round_number, directory=directory, force=force, show_progress=output.is_live
    )
    output.answer(exported.facts, text=exported.sentence)
    output.note(f"\nUse it:\n\n{exported.usage}")
