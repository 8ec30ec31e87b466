"""The operator's commands about jobs: `silotune job`."""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path
from typing import Any

import click
from rich.console import Group

from coordinator import plan_view, recipe
from coordinator.cli import asks, job_argument, profile_option
from coordinator.client import OperatorClient, facts, load_profile
from coordinator.plan import plan, sites_of
from coordinator.terminal import Output, moment, table, with_output
from coordinator.watch import ENDED, details, failed_lines, house_agents, line, name_of, picture, waiting_lines, watch
from protos.errors import RecipeInvalid
from protos.v1 import operator_pb2

SUBMIT_TIMEOUT_SECONDS = 60.0
FOLLOW_SECONDS = 1.0
# As of a recipe that is wrong (protos/errors.py).
CANNOT_FIT = 3
# What `job show` asks for, and the most that a coordinator tells at once.
MOST_ROUNDS = 1000
INTERRUPTED = 130


@click.group()
def job() -> None:
    """Submit jobs, watch them, steer them. JOB is an id, or a name that only one job has.

    \b
    silotune job plan recipe.toml
    silotune job submit recipe.toml
    silotune job watch JOB
    silotune job why JOB
    """


recipe_argument = click.argument(
    "recipe_file", metavar="RECIPE", type=click.Path(exists=True, dir_okay=False, path_type=Path)
)


@job.command("plan")
@recipe_argument
@asks
def plan_job(*, client: OperatorClient, output: Output, recipe_file: Path) -> int:
    """Say what RECIPE would need at each site: memory, disk, bytes each way, hours. Nothing is submitted.

    Beside each need stands what the site's agent reports. Ends with exit code 3 when the recipe cannot fit at a site,
    and says what would. Hours are those that earlier jobs on the same base model took.

    \b
    silotune job plan recipe.toml
    silotune job plan recipe.toml --format json
    """
    spec = recipe.read(recipe_file)
    listed: operator_pb2.ListSitesResponse = client.ask("ListSites", operator_pb2.ListSitesRequest())
    made = plan(spec, sites_of(spec, listed.sites), past=plan_view.past_jobs(client))
    code = CANNOT_FIT if made.refusals else 0
    output.answer(plan_view.facts_of(made), text=plan_view.picture(spec, made), exit_code=code)
    return code


@job.command()
@recipe_argument
@click.option("--dry-run", is_flag=True, help="Check and estimate, submit nothing.")
@click.option("--submit-token", help="A text of your choice; a second submission with it answers with the first job.")
@profile_option
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
@job_argument
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
@job_argument
@asks
def why(*, client: OperatorClient, output: Output, job_name: str) -> None:
    """Say in one sentence what JOB waits for, whose turn it is, and until when.

    Of a job that has failed: why, with the reason of every site whose work did not succeed.

    \b
    silotune job why JOB
    """
    state: operator_pb2.GetJobResponse = client.ask("GetJob", operator_pb2.GetJobRequest(job=job_name, last_rounds=1))
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
@job_argument
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
    house = house_agents(client)
    output.answer(data, text=Group(picture(state, house=house), *details(state, house=house)))


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
@job_argument
@asks
def pause(*, client: OperatorClient, output: Output, job_name: str) -> None:
    """Hold JOB where it is: no deadline runs, nothing is lost.

    \b
    silotune job pause JOB
    """
    _control(client, output, job_name, operator_pb2.JOB_ACTION_PAUSE)


@job.command()
@job_argument
@asks
def resume(*, client: OperatorClient, output: Output, job_name: str) -> None:
    """Let a JOB go on that is paused or has failed.

    A failed job tries the round that failed again, with as many attempts as at first: updates that were accepted in it
    are kept and not trained again. Mend the cause first; `silotune job why JOB` has it. Sites that were set aside stay
    so until they are readmitted.

    \b
    silotune job resume JOB
    """
    _control(client, output, job_name, operator_pb2.JOB_ACTION_RESUME)


@job.command()
@job_argument
@asks
def cancel(*, client: OperatorClient, output: Output, job_name: str) -> None:
    """End JOB for good, also one that has failed; its committed versions can still be exported.

    \b
    silotune job cancel JOB
    """
    _control(client, output, job_name, operator_pb2.JOB_ACTION_CANCEL)


@job.command()
@job_argument
@click.argument("site_name", metavar="[SITE]", default="")
@asks
def readmit(*, client: OperatorClient, output: Output, job_name: str, site_name: str) -> None:
    """Let SITE, or all sites that JOB has set aside, take part again, from the next round on at the latest.

    A site is set aside when it declines, or fails three times in a row; `silotune job why JOB` has the reasons. Mend
    the cause at the site first. A job that has failed goes on with `silotune job resume JOB` then.

    \b
    silotune job readmit JOB
    silotune job readmit JOB st-olav
    """
    _control(client, output, job_name, operator_pb2.JOB_ACTION_READMIT, site=site_name)


def _control(
    client: OperatorClient, output: Output, job_name: str, action: operator_pb2.JobAction, *, site: str = ""
) -> None:
    request = operator_pb2.ControlJobRequest(job=job_name, action=action, site=site)
    answer: operator_pb2.ControlJobResponse = client.ask("ControlJob", request)
    output.answer(facts(answer.job), text=line(operator_pb2.GetJobResponse(job=answer.job)))


@job.command()
@job_argument
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
