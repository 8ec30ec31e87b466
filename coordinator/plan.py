"""Plan before run: what a recipe will ask of each site, beside what its agent reports, and whether it can fit.

Pure. Bytes come from coordinator/traffic.py, memory from coordinator/footprint.py, and time from what earlier jobs on
the same base model took at the same site; where there was none, nothing is said of time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from coordinator.footprint import Footprint, footprint
from coordinator.traffic import (
    Ledger,
    Linear,
    Shapes,
    SiteTraffic,
    at_house,
    ledger,
    update_bytes,
    version_bytes,
    version_tensors,
)
from protos.jobspec import JobSpec, Lora, Synthetic
from protos.tensors import make_header
from protos.v1.operator_pb2 import SiteView

SHORTEST_LENGTH = 64
NO_DISTILLER = (
    "No house agent is enrolled, so every aggregate would become a version without the distillation that the recipe "
    "asks for; `silotune site invite NAME --house` invites one."
)


@dataclass(frozen=True)
class Site:
    """What an agent reports that a plan rests on; 0 is not known."""

    name: str
    house: bool
    device: str
    # Of one of its GPUs, and how many of them train together.
    gpu_memory_bytes: int
    gpus: int
    memory_bytes: int
    free_disk_bytes: int
    rows: int
    # Of the recipe's base model; None: it does not hold it, or is too old to say.
    shapes: Shapes | None

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def fetches_whole(self) -> bool:
        """Several processes do not each make a version from a difference."""
        return self.gpus > 1


@dataclass(frozen=True)
class Done:
    """One update of an earlier job: what it took."""

    site: str
    steps: int
    metrics: Mapping[str, float]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Past:
    """An earlier job."""

    spec: JobSpec
    updates: tuple[Done, ...]


@dataclass(frozen=True)
class Speed:
    """At one site: a step of this recipe, what a round takes besides, and bytes on the wire a second (0: no figure)."""

    step_seconds: float
    other_seconds: float
    bytes_per_second: float


@dataclass(frozen=True)
class SitePlan:
    site: Site
    traffic: SiteTraffic
    needs: Footprint | None
    # Rows at a time with which it fits.
    micro_batch: int
    # Of training, in the whole job; None: not measured yet.
    seconds: float | None
    # Why it cannot fit, and what would; empty when it fits, or nothing is known that speaks against it.
    refusal: str


@dataclass(frozen=True)
class Plan:
    sites: tuple[SitePlan, ...]
    # None where no site has reported the base model's shapes.
    ledger: Ledger | None
    # If each round waits for its slowest site; None: no site was measured.
    seconds: float | None
    unmeasured: tuple[str, ...]
    # Who is missing, where no site is at fault.
    missing: str = ""

    @property
    def refusals(self) -> list[str]:
        return [why for why in (self.missing, *(site.refusal for site in self.sites)) if why]


def sites_of(spec: JobSpec, views: Iterable[SiteView]) -> list[Site]:
    """The enrolled sites that may train, and the house agent, if the recipe has work for one."""
    named = spec.cohort.sites
    wanted = [
        view
        for view in views
        if view.state == "ENROLLED" and (at_house(spec) if view.house else named == "all" or view.name in named)
    ]
    return [_site(spec, view) for view in sorted(wanted, key=lambda view: (view.house, view.name))]


def _site(spec: JobSpec, view: SiteView) -> Site:
    agent = view.agent
    rows = [data.rows for data in agent.data_sets if spec.data and data.name == spec.data.name]
    base = spec.base_model
    shapes = [
        Shapes(
            model.parameters,
            model.hidden_size,
            model.layers,
            model.vocabulary,
            tuple(Linear(each.name, each.out_features, each.in_features, each.count) for each in model.linear),
        ).cut(base.layers)
        for model in agent.base_models
        if base and model.name == base.name and base.digest in (None, model.digest) and model.linear
    ]
    return Site(
        view.name,
        view.house,
        agent.device,
        agent.gpu_memory_bytes,
        agent.gpus or 1,
        agent.memory_bytes,
        agent.free_disk_bytes,
        rows[0] if rows else 0,
        shapes[0] if shapes else None,
    )


def shapes_of(sites: Sequence[Site]) -> Shapes | None:
    return next((site.shapes for site in sites if site.shapes is not None), None)


def plan(spec: JobSpec, sites: Sequence[Site], *, past: Sequence[Past] = ()) -> Plan:
    """The plan for these sites. `past` are earlier jobs, the newest first; those that are not alike are passed over."""
    shapes = shapes_of(sites)
    house = next((site.name for site in sites if site.house), "")
    missing = NO_DISTILLER if spec.distillation and not house else ""
    if shapes is None and not isinstance(spec.task, Synthetic):
        nothing = SiteTraffic(0, 0, 0, 0)
        return Plan(tuple(SitePlan(site, nothing, None, 0, None, "") for site in sites), None, None, (), missing)
    trainers = _trainers(spec, sites)
    book = ledger(spec, shapes, sites=trainers, house=house, whole=[site.name for site in sites if site.fetches_whole])
    speeds = _speeds(spec, shapes, past=past)
    times = {
        site.name: _round_seconds(spec, site, speeds[site.name], traffic=book.sites[site.name])
        for site in sites
        if site.name in speeds and not site.house
    }
    plans = []
    for site in sites:
        traffic = book.sites.get(site.name, SiteTraffic(0, 0, 0, 0))
        seconds = times[site.name] * traffic.rounds if site.name in times else None
        plans.append(_site_plan(spec, site, shapes, traffic=traffic, seconds=seconds, fold=book.fold_rank))
    unmeasured = tuple(name for name in trainers if name not in times)
    slowest = max(times.values(), default=0.0)
    in_all = sum(max((times.get(name, slowest) for name in cohort), default=0.0) for cohort in book.cohorts)
    total = in_all * spec.rounds / len(book.cohorts) if times else None
    return Plan(tuple(plans), book, total, unmeasured, missing)


def _trainers(spec: JobSpec, sites: Sequence[Site]) -> list[str]:
    """Names of those that train, the recipe's own and enough without a name for a whole cohort included."""
    named = () if spec.cohort.sites == "all" else spec.cohort.sites
    names = sorted({*named, *(site.name for site in sites if not site.house)})
    wanted = spec.cohort.quorum if spec.cohort.size == "all" else spec.cohort.size
    return names + [f"site {number} to come" for number in range(1, wanted - len(names) + 1)]


# --- whether it fits


def _site_plan(
    spec: JobSpec, site: Site, shapes: Shapes | None, *, traffic: SiteTraffic, seconds: float | None, fold: int
) -> SitePlan:
    rows = 1 if site.house else spec.local.micro_batch_size or spec.local.batch_size
    if shapes is None:
        return SitePlan(site, traffic, None, rows, seconds, "")

    def needs(variant: Variant) -> Footprint:
        found = footprint(
            variant.spec, shapes, on_gpu=site.on_gpu, gpus=site.gpus, site=site.name,
            micro_batch=variant.micro_batch, rows=site.rows, fold=fold,
        )  # fmt: skip
        # At the least: the model, and nothing of what training keeps beside it.
        return replace(found, trained=0, activations=0, logits=0) if site.house else found

    variant = Variant(spec, rows)
    if site.on_gpu:
        # The trainer halves what does not fit by itself.
        while variant.micro_batch > 1 and _shortage(site, needs(variant)):
            variant = replace(variant, micro_batch=variant.micro_batch // 2)
    needed, refusal = needs(variant), ""
    if shortage := _shortage(site, needed):
        at_a_time = "" if site.house else f", {variant.micro_batch} row{'s' * (variant.micro_batch > 1)} at a time"
        fits = lambda changed: not _shortage(site, needs(changed))  # noqa: E731
        refusal = f"{site.name} {shortage}{at_a_time}. {_remedy(variant, fits=fits)}"
    elif site.free_disk_bytes and needed.disk > site.free_disk_bytes:
        sizes = f"{needed.disk / 1e9:.1f} GB of disk and has {site.free_disk_bytes / 1e9:.1f} GB free"
        refusal = f"{site.name} needs about {sizes}. Make room there."
    return SitePlan(site, traffic, needed, variant.micro_batch, seconds, refusal)


def _shortage(site: Site, needs: Footprint) -> str:
    device, memory = (needs.device, needs.host) if site.on_gpu else (0, needs.device + needs.host)
    for wanted, there, what in (
        (device, site.gpu_memory_bytes, "of its GPU's memory"),
        (memory, site.memory_bytes, "of memory"),
    ):
        if there and wanted > there:
            return f"needs about {wanted / 1e9:.1f} GB {what} and has {there / 1e9:.1f} GB"
    return ""


@dataclass(frozen=True)
class Variant:
    """A recipe that differs in what memory depends on."""

    spec: JobSpec
    micro_batch: int

    def changed(self, table: str, **keys: Any) -> Variant:
        part = getattr(self.spec, table).model_copy(update=keys)
        return replace(self, spec=self.spec.model_copy(update={table: part}))


# What was changed, and the recipe with it; from the mildest change of its kind to the strongest.
Changes = Iterator[tuple[str, Variant]]


def _fewer_rows(variant: Variant) -> Changes:
    for rows in _halves(variant.micro_batch, least=1):
        yield f"local.micro_batch_size = {rows}", replace(variant, micro_batch=rows)


def _checkpointing(variant: Variant) -> Changes:
    if not variant.spec.local.gradient_checkpointing:
        yield "local.gradient_checkpointing = true", variant.changed("local", gradient_checkpointing=True)


def _smaller_weights(variant: Variant) -> Changes:
    base = variant.spec.base_model
    if base is None or base.quantization != "none" or not isinstance(variant.spec.method, Lora):
        return
    if base.dtype == "float32":
        yield 'base_model.dtype = "bfloat16"', variant.changed("base_model", dtype="bfloat16")
    yield 'base_model.quantization = "nf4"', variant.changed("base_model", quantization="nf4")


def _shorter_rows(variant: Variant) -> Changes:
    for length in _halves(getattr(variant.spec.task, "max_length", 0), least=SHORTEST_LENGTH):
        yield f"task.max_length = {length}", variant.changed("task", max_length=length)


def _lower_rank(variant: Variant) -> Changes:
    method = variant.spec.method
    if isinstance(method, Lora):
        for rank in _halves(method.rank, least=1):
            ranks = {site: min(rank, lower) for site, lower in method.ranks.items()}
            yield f"method.rank = {rank}", variant.changed("method", rank=rank, ranks=ranks)


def _halves(number: int, *, least: int) -> Iterator[int]:
    while number // 2 >= least:
        number //= 2
        yield number


CHANGES: tuple[Callable[[Variant], Changes], ...] = (
    _fewer_rows, _checkpointing, _smaller_weights, _shorter_rows, _lower_rank,
)  # fmt: skip


def _remedy(variant: Variant, *, fits: Callable[[Variant], bool]) -> str:
    """Which one change of the recipe would do, or which together."""
    alone = [next((said for said, changed in change(variant) if fits(changed)), "") for change in CHANGES]
    if any(alone):
        return f"It would fit with {' or '.join(filter(None, alone))}."
    together: list[str] = []
    for change in CHANGES:
        options = list(change(variant))
        for said, changed in options:
            if fits(changed):
                return f"It would fit with {', '.join([*together, said])} together."
        if options:
            together.append(options[-1][0])
            variant = options[-1][1]
    return "No setting would make it fit: choose a smaller base model, or leave this site out."


# --- how long it takes


def _speeds(spec: JobSpec, shapes: Shapes | None, *, past: Sequence[Past]) -> dict[str, Speed]:
    """By site, from its updates of the newest job that is alike; steps of more or longer rows take as much longer."""
    found: dict[str, Speed] = {}
    for job in past:
        if not _alike(job.spec, spec):
            continue
        work = _row_tokens(spec) * spec.local.batch_size / (_row_tokens(job.spec) * job.spec.local.batch_size)
        version = make_header(version_tensors(job.spec, shapes))[1]
        for name in {done.site for done in job.updates} - found.keys():
            updates = [done for done in job.updates if done.site == name and done.metrics.get("steps_per_second")]
            if not updates:
                continue
            steps = sum(1 / done.metrics["steps_per_second"] for done in updates) / len(updates)
            wire = sum(done.seconds.get(stage, 0.0) for done in updates for stage in ("fetch", "upload"))
            other = sum(done.seconds.get(stage, 0.0) for done in updates for stage in ("load", "save"))
            sent = update_bytes(job.spec, version, round_number=1, site=name)
            both_ways = (sent + version_bytes(job.spec, version, number=1)) * len(updates)
            found[name] = Speed(work * steps, other / len(updates), both_ways / wire if wire else 0.0)
    return found


def _alike(one: JobSpec, other: JobSpec) -> bool:
    """Whether a step of one takes as long as one of the other, but for how many rows it has and of which length."""

    def key(spec: JobSpec) -> tuple[object, ...]:
        base = spec.base_model and spec.base_model.model_copy(update={"digest": None, "revision": None})
        local = spec.local
        return spec.task.type, base, spec.method.type, local.gradient_checkpointing, local.compile, local.mentor

    return key(one) == key(other)


def _row_tokens(spec: JobSpec) -> int:
    return getattr(spec.task, "max_length", 1)


def _round_seconds(spec: JobSpec, site: Site, speed: Speed, *, traffic: SiteTraffic) -> float:
    local = spec.local
    steps = local.steps or math.ceil((local.epochs or 0) * math.ceil(site.rows / local.batch_size))
    wire = (traffic.up_bytes + traffic.down_bytes) / max(1, traffic.rounds)
    transfer = wire / speed.bytes_per_second if speed.bytes_per_second else 0.0
    return steps * speed.step_seconds + speed.other_seconds + transfer
