"""The operator's commands: `silotune site`, `silotune job`, `silotune model`.

They are clients of OperatorService and nothing else, so they run on any machine that has an operator profile.
"""

from __future__ import annotations

import functools
import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Group

from coordinator import export, recipe
from coordinator.client import OperatorClient, facts, load_profile
from coordinator.terminal import Duration, Output, moment, table, with_output
from coordinator.watch import ENDED, details, failed_lines, house_agents, line, name_of, picture, waiting_lines, watch
from protos.errors import InvalidInput, RecipeInvalid
from protos.identity import JoinToken, check_name
from protos.v1 import operator_pb2

SUBMIT_TIMEOUT_SECONDS = 60.0
FOLLOW_SECONDS = 1.0
# What `job show` asks for, and the most that a coordinator tells at once.
MOST_ROUNDS = 1000
INTERRUPTED = 130

_profile = click.option(
    "--profile", default="default", show_default=True, help="Operator profile: a name, or the path of its folder."
)
_job = click.argument("job_name", metavar="JOB")


def asks(function: Callable[..., int | None]) -> Callable[..., None]:
    """Gives a command `--profile` and `--format`, and what follows from them: its `client` and its `output`."""

    @_profile
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
    host = JoinToken.decode(invitation.token).enrollment_address.rpartition(":")[0]
    coordinator = f"{host}:{client.profile.address.rpartition(':')[2]}"
    output.answer({"name": name, "coordinator": coordinator, **facts(invitation)}, text=invitation.token)
    output.note(f"\n{name} can use it once, until {moment(invitation.expires_unix_seconds)}. At the site:")
    output.note(f"\n  silotune-agent enroll --coordinator {coordinator} --token TOKEN")


@site.command("list")
@asks
def list_sites(*, client: OperatorClient, output: Output) -> None:
    """Show every site: whether it is connected, on what device, with which data sets.

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
            "connected" if found.connected else found.state.lower(),
            moment(found.last_seen_unix_seconds),
            moment(found.certificate_expires_unix_seconds)[:10],
            found.agent.device,
            data_sets,
            found.agent.version,
        )
    text = shown if answer.sites else "No site is invited yet; `silotune site invite NAME` invites one."
    output.answer(facts(answer), text=text)


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


# --- job


@click.group()
def job() -> None:
    """Submit jobs, watch them, steer them. JOB is an id, or a name that only one job has.

    \b
    silotune job submit recipe.toml
    silotune job watch JOB
    silotune job why JOB
    """


@job.command()
@click.argument("recipe_file", metavar="RECIPE", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--dry-run", is_flag=True, help="Check and estimate, submit nothing.")
@click.option("--submit-token", help="A text of your choice; a second submission with it answers with the first job.")
@_profile
@with_output
def submit(*, output: Output, recipe_file: Path, dry_run: bool, submit_token: str | None, profile: str) -> None:
    """Check RECIPE whole, then submit it; prints the job and what it will cost.

    What is wrong is said with its line: `recipe.toml:12: local.learning_rat is not a known key.`

    \b
    silotune job submit recipe.toml --dry-run
    silotune job submit recipe.toml
    silotune job submit recipe.toml --submit-token nightly-2026-11-21
    """
    spec = recipe.read(recipe_file)
    token = submit_token or uuid.uuid4().hex
    request = operator_pb2.SubmitJobRequest(spec_json=spec.canonical_json, dry_run=dry_run, submit_token=token)
    with OperatorClient(load_profile(profile)) as client:
        try:
            answer: operator_pb2.SubmitJobResponse = client.ask(
                "SubmitJob", request, timeout_seconds=SUBMIT_TIMEOUT_SECONDS
            )
        except RecipeInvalid as error:
            raise recipe.located(error, file=recipe_file) from None
    lines = [f"{spec.name}: the recipe is valid; nothing was submitted." if dry_run else answer.job_id]
    lines += ["", "What it will cost:", *(f"  {sentence}" for sentence in answer.estimates)] if answer.estimates else []
    lines += ["", "Note:", *(f"  {sentence}" for sentence in answer.warnings)] if answer.warnings else []
    output.answer({**facts(answer), "name": spec.name, "spec_hash": spec.hash}, text="\n".join(lines))
    if not dry_run:
        output.note(f"\nNext: silotune job watch {answer.job_id}")


@job.command("watch")
@_job
@asks
def watch_job(*, client: OperatorClient, output: Output, job_name: str) -> int:
    """Show JOB live until it ends: rounds, sites, curve, time to go.

    Ends with exit code 0 when the job completed and 1 when it failed or was cancelled. Ctrl-C ends only the watching.
    Without a terminal it prints a line when something changes.

    \b
    silotune job watch JOB
    silotune job watch JOB && silotune model export JOB --out model
    """
    try:
        return watch(client, job=job_name, output=output)
    except KeyboardInterrupt:
        output.note(f"\nThe job goes on; `silotune job watch {job_name}` shows it again.")
        return INTERRUPTED


@job.command()
@_job
@asks
def why(*, client: OperatorClient, output: Output, job_name: str) -> None:
    """Say in one sentence what JOB waits for, whose turn it is, and until when.

    Of a job that has failed: why, with the reason of every site whose work did not succeed.

    \b
    silotune job why JOB
    """
    state: operator_pb2.GetJobResponse = client.ask("GetJob", operator_pb2.GetJobRequest(job=job_name))
    waiting = waiting_lines(state.tasks)
    failed = failed_lines(state.tasks)
    data = {
        "job": state.job.id,
        "state": name_of(operator_pb2.JobState, state.job.state),
        "sentence": state.job.sentence,
        "waiting": waiting,
        "failed": failed,
    }
    output.answer(data, text="\n".join([state.job.sentence, *(f"  {each}" for each in (*waiting, *failed))]))


@job.command()
@_job
@asks
def show(*, client: OperatorClient, output: Output, job_name: str) -> None:
    """Show everything about JOB: its rounds, who was counted and who was not, every evaluation.

    \b
    silotune job show JOB
    silotune job show JOB --format json
    """
    request = operator_pb2.GetJobRequest(job=job_name, last_rounds=MOST_ROUNDS)
    state: operator_pb2.GetJobResponse = client.ask("GetJob", request)
    data = facts(state)
    data["spec"] = json.loads(data.pop("spec_json"))
    output.answer(data, text=Group(picture(state, house=house_agents(client)), *details(state)))


@job.command("list")
@asks
def list_jobs(*, client: OperatorClient, output: Output) -> None:
    """Show all jobs, the newest first.

    \b
    silotune job list
    silotune job list --format json
    """
    answer: operator_pb2.ListJobsResponse = client.ask("ListJobs", operator_pb2.ListJobsRequest())
    shown = table("job", "name", "state", "round", "best", "created", "now")
    for found in answer.jobs:
        shown.add_row(
            found.id,
            found.name,
            name_of(operator_pb2.JobState, found.state).lower(),
            f"{found.round} of {found.rounds}",
            f"version {found.best_version}" if found.HasField("best_version") else "",
            moment(found.created_unix_seconds),
            found.sentence,
        )
    text = shown if answer.jobs else "There is no job yet; `silotune job submit recipe.toml` submits one."
    output.answer(facts(answer), text=text)


@job.command()
@_job
@asks
def pause(*, client: OperatorClient, output: Output, job_name: str) -> None:
    """Hold JOB where it is: no deadline runs, nothing is lost.

    \b
    silotune job pause JOB
    """
    _control(client, output, job_name, operator_pb2.JOB_ACTION_PAUSE)


@job.command()
@_job
@asks
def resume(*, client: OperatorClient, output: Output, job_name: str) -> None:
    """Let a paused JOB go on.

    \b
    silotune job resume JOB
    """
    _control(client, output, job_name, operator_pb2.JOB_ACTION_RESUME)


@job.command()
@_job
@asks
def cancel(*, client: OperatorClient, output: Output, job_name: str) -> None:
    """End JOB for good; its committed versions can still be exported.

    \b
    silotune job cancel JOB
    """
    _control(client, output, job_name, operator_pb2.JOB_ACTION_CANCEL)


@job.command()
@_job
@asks
def readmit(*, client: OperatorClient, output: Output, job_name: str) -> None:
    """Let the sites that JOB has set aside take part again, from the next round on.

    A site is set aside when it declines, or fails three times in a row; `silotune job why JOB` has the reasons. Mend
    the cause at the site first. A job that has ended cannot be changed: submit its recipe again.

    \b
    silotune job readmit JOB
    """
    _control(client, output, job_name, operator_pb2.JOB_ACTION_READMIT)


def _control(client: OperatorClient, output: Output, job_name: str, action: operator_pb2.JobAction) -> None:
    request = operator_pb2.ControlJobRequest(job=job_name, action=action)
    answer: operator_pb2.ControlJobResponse = client.ask("ControlJob", request)
    output.answer(facts(answer.job), text=line(operator_pb2.GetJobResponse(job=answer.job)))


@job.command()
@_job
@click.option("--follow", is_flag=True, help="Go on with new ones until the job ends.")
@asks
def events(*, client: OperatorClient, output: Output, job_name: str, follow: bool) -> int | None:
    """Show every decision about JOB, oldest first, each with its sentence.

    \b
    silotune job events JOB
    silotune job events JOB --follow
    """
    after_id = 0
    found: list[dict[str, Any]] = []
    while True:
        request = operator_pb2.ListEventsRequest(job=job_name, after_id=after_id)
        answer: operator_pb2.ListEventsResponse = client.ask("ListEvents", request)
        for event in answer.events:
            after_id = event.id
            found.append(facts(event))
            if follow or not output.as_json:
                text = f"{moment(event.unix_seconds)}  round {event.round}  {event.sentence}"
                output.answer(found[-1], text=text)
        if answer.events:
            continue
        if not follow:
            if output.as_json:
                output.answer({"events": found})
            return None
        state: operator_pb2.GetJobResponse = client.ask("GetJob", operator_pb2.GetJobRequest(job=job_name))
        if state.job.state in ENDED:
            return None
        time.sleep(FOLLOW_SECONDS)


# --- model


@click.group()
def model() -> None:
    """Take a finished model home.

    \b
    silotune model export JOB --out DIR
    """


@model.command("export")
@_job
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
