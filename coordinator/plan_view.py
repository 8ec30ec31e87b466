"""`silotune job plan` for people: what it asks the coordinator, and the plan as a table and sentences."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from coordinator.client import OperatorClient
from coordinator.plan import Done, Past, Plan, SitePlan
from coordinator.terminal import duration, size, table
from protos import jobspec
from protos.errors import RecipeInvalid
from protos.v1 import operator_pb2

# Of earlier jobs, the newest are asked about, and their last rounds.
PAST_JOBS, PAST_ROUNDS = 20, 10
MEBIBYTE = 1 << 20


def past_jobs(client: OperatorClient) -> list[Past]:
    """Earlier jobs, the newest first, with what their updates took."""
    listed: operator_pb2.ListJobsResponse = client.ask("ListJobs", operator_pb2.ListJobsRequest())
    found = []
    for view in listed.jobs[:PAST_JOBS]:
        request = operator_pb2.GetJobRequest(job=view.id, last_rounds=PAST_ROUNDS)
        state: operator_pb2.GetJobResponse = client.ask("GetJob", request)
        updates = [update for each in state.rounds for update in each.updates if update.steps]
        try:
            spec = jobspec.from_json(state.spec_json)
        except RecipeInvalid:
            continue  # Of a later release.
        if updates:
            found.append(Past(spec, tuple(Done(each.site, each.steps, each.metrics, each.seconds) for each in updates)))
    return found


def facts_of(made: Plan) -> dict[str, Any]:
    """For programs: all of it in bytes and seconds."""
    book = made.ledger
    return {
        "sites": [
            {
                "name": each.site.name,
                "house": each.site.house,
                "device": each.site.device,
                "has": {
                    "gpu_memory_bytes": each.site.gpu_memory_bytes,
                    "memory_bytes": each.site.memory_bytes,
                    "free_disk_bytes": each.site.free_disk_bytes,
                },
                "needs": None if each.needs is None else {**asdict(each.needs), "device": each.needs.device},
                "micro_batch": each.micro_batch,
                **asdict(each.traffic),
                "seconds": each.seconds,
                "refusal": each.refusal,
            }
            for each in made.sites
        ],
        "up_bytes": book.up_bytes if book else None,
        "down_bytes": book.down_bytes if book else None,
        "evaluation_bytes": book.evaluation_bytes if book else None,
        "distillation_bytes": book.distillation_bytes if book else None,
        "flower_bytes": book.numpy_bytes if book else None,
        "seconds": made.seconds,
        "unmeasured": list(made.unmeasured),
        "refusals": made.refusals,
    }


def picture(spec: jobspec.JobSpec, made: Plan) -> RenderableType:
    return Group(_sites(made), *(f"\n{line}" if first else line for line, first in _lines(spec, made)))


def _sites(made: Plan) -> Table:
    shown = table(
        "site", "device", "memory", "disk", "rounds", "up, a round", "down, a round", "up", "down", "training"
    )
    for each in made.sites:
        site, needs, traffic = each.site, each.needs, each.traffic
        rounds = traffic.rounds or 1
        if made.ledger is None:
            shown.add_row(f"{site.name} (house)" if site.house else site.name, _device(each))
            continue
        shown.add_row(
            f"{site.name} (house)" if site.house else site.name,
            _device(each),
            "" if needs is None else _of(needs.host if site.on_gpu else needs.device + needs.host, site.memory_bytes),
            "" if needs is None else _of(needs.disk, site.free_disk_bytes),
            "" if site.house else str(traffic.rounds),
            "" if site.house else size(round(traffic.up_bytes / rounds)),
            "" if site.house else size(round(traffic.down_bytes / rounds)),
            size(traffic.up_bytes + traffic.distillation_up_bytes),
            size(traffic.down_bytes + traffic.evaluation_bytes + traffic.distillation_down_bytes),
            "" if site.house else "not measured yet" if each.seconds is None else duration(each.seconds),
        )
    return shown


def _device(each: SitePlan) -> str:
    name = each.site.device.partition(" ")[0]
    if each.needs is None or not each.site.on_gpu:
        return name
    return f"{name}: {_of(each.needs.device, each.site.gpu_memory_bytes)}"


def _of(needed: int, there: int) -> str:
    return f"{size(needed)} of {size(there) if there else 'unknown'}"


def _lines(spec: jobspec.JobSpec, made: Plan) -> list[tuple[str, bool]]:
    """Sentences, and whether a paragraph begins with it."""
    book = made.ledger
    if book is None:
        what = spec.base_model.name if spec.base_model else ""
        return [
            (f"Nothing can be planned: no enrolled site has reported the layers of base model {what!r}.", True),
            ("`silotune-agent model add` at one of the sites does it.", False),
            *([(made.missing, False)] if made.missing else []),
        ]
    both = book.up_bytes + book.down_bytes
    said = [
        (
            f"Training: {_mib(book.up_bytes)} up and {_mib(book.down_bytes)} down in {spec.rounds} rounds, "
            f"{_mib(both)} in all; as numpy arrays, which is how Flower sends them: {_mib(book.numpy_bytes)}.",
            True,
        )
    ]
    if "svd" in (spec.encoding.up, spec.encoding.down):
        said.append(
            (
                "With svd these are the most that it can be: how few directions hold the rest, only training shows.",
                False,
            )
        )
    if spec.local.mentor:
        said.append(("What a mentor needs of a site's memory and disk is not in the estimates.", False))
    if book.evaluation_bytes:
        said.append((f"Evaluation: {_mib(book.evaluation_bytes)} down besides.", False))
    if book.distillation_bytes:
        said.append((f"Distillation: {_mib(book.distillation_bytes)} to and from the house agent besides.", False))
    whole = [each.site.name for each in made.sites if each.site.fetches_whole]
    if whole and spec.encoding.down != "raw":
        said.append((f"Several processes train at {', '.join(whole)}, so versions are fetched whole there.", False))
    if made.seconds is None:
        said.append(("Time: not measured yet; no earlier job was like this one.", False))
    else:
        slowest = f" (taken to be as slow as the slowest: {', '.join(made.unmeasured)})" if made.unmeasured else ""
        said.append((f"Time: about {made.seconds / 3600:.1f} hours of rounds at measured speeds{slowest}.", False))
    smaller = [each for each in made.sites if each.needs and each.site.on_gpu and not each.site.house]
    asked = spec.local.micro_batch_size or spec.local.batch_size
    for each in smaller:
        if each.micro_batch < asked and not each.refusal:
            said.append((f"{each.site.name} will train about {each.micro_batch} rows at a time, not {asked}.", False))
    said += [(made.missing, True)] if made.missing else []
    cannot = [each.refusal for each in made.sites if each.refusal]
    said += [(f"Cannot fit: {refusal}", not number) for number, refusal in enumerate(cannot)]
    return [*said, ("Memory and disk are estimates.", not made.refusals)]


def _mib(count: int) -> str:
    return f"{count / MEBIBYTE:,.1f} MiB" if count >= MEBIBYTE else size(count)
