"""What a recipe will cost, and what may stand in its way, said before it is submitted.

It rests on what the agents reported of themselves, so it warns and never refuses: a site may be invited, or fetch a
model, after the job began. The arithmetic is that of `silotune job plan` (coordinator/plan.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coordinator.plan import Plan, plan, sites_of
from coordinator.services import views
from coordinator.storage.sites import SiteRow
from coordinator.traffic import at_house
from protos.identity import Role
from protos.jobspec import JobSpec


def estimates(spec: JobSpec, *, sites: Sequence[SiteRow]) -> list[str]:
    """Sentences about bytes on the wire and on the coordinator's disk."""
    book = _plan(spec, sites).ledger
    rounds, cohort = _count(spec.rounds, "round"), _count(_cohort_size(spec, sites), "site")
    said = [f"{rounds} with {cohort} each, quorum {spec.cohort.quorum}."]
    if book is None:
        return [*said, "How much will travel is not known: no enrolled site has reported the base model's layers yet."]
    turns = max(1, sum(site.rounds for site in book.sites.values()))
    said.append(
        f"About {_size(book.down_bytes / turns)} to and {_size(book.up_bytes / turns)} from each site a round: "
        f"{_size(book.down_bytes)} down and {_size(book.up_bytes)} up in all."
    )
    if book.evaluation_bytes:
        said.append(f"About {_size(book.evaluation_bytes)} down besides, for evaluations.")
    if book.distillation_bytes:
        said.append(f"About {_size(book.distillation_bytes)} to and from the house agent besides, for distillations.")
    return [*said, f"About {_size(_disk_bytes(spec, sites))} on the coordinator's disk."]


def warnings(
    spec: JobSpec, *, sites: Sequence[SiteRow], spare_bytes: int, now_unix_seconds: float, is_served: bool = False
) -> list[str]:
    """Sentences, each about one thing that the job would wait for or fail on as matters stand.

    `is_served`: the coordinator has the base model for sites that lack it.
    """
    enrolled = _enrolled(spec, sites)
    names = {site.name for site in enrolled}
    said: list[str] = []
    if spec.cohort.sites != "all":
        said += [f"{name} is not enrolled." for name in spec.cohort.sites if name not in names]
    wanted = max(spec.cohort.quorum, 0 if spec.cohort.size == "all" else spec.cohort.size)
    if len(enrolled) < wanted:
        said.append(f"Only {_count(len(enrolled), 'site')} of this job enrolled; a round needs {wanted}.")
    for site in enrolled:
        if not site.connected(now_unix_seconds=now_unix_seconds):
            said.append(f"{site.name} is not connected.")
            continue
        said += _lacks(spec, site, is_served=is_served)
    said += _house_warnings(spec, sites, now_unix_seconds=now_unix_seconds, is_served=is_served)
    said += _plan(spec, sites).refusals
    needed = _disk_bytes(spec, sites)
    if needed > spare_bytes:
        spare = _size(max(0, spare_bytes))
        said.append(f"The coordinator's disk has {spare} to spare; about {_size(needed)} are needed.")
    return said


def _lacks(spec: JobSpec, site: SiteRow, *, is_served: bool, reads_data: bool = True) -> list[str]:
    said = []
    if reads_data and spec.data and spec.data.name not in {data["name"] for data in _reported(site, "data_sets")}:
        said.append(f"{site.name} has no data set named {spec.data.name!r} in its site.toml.")
    if spec.base_model and not _models(spec, site):
        remedy = "its policy must have fetch_base_models = true" if is_served else "`silotune-agent model add`"
        said.append(f"{site.name} does not have the base model {spec.base_model.name!r} ({remedy}).")
    return said


def _lacks_for_distilling(spec: JobSpec, site: SiteRow, *, data_sets: set[str]) -> list[str]:
    said, teacher = [], spec.distillation and spec.distillation.teacher
    if spec.proxy_data and spec.proxy_data not in {spec.data and spec.data.name, *data_sets}:
        said.append(f"{site.name} has no data set named {spec.proxy_data!r} to distil on.")
    if teacher and teacher.name not in {model.get("name") for model in _reported(site, "base_models")}:
        said.append(f"{site.name} does not have the teacher {teacher.name!r} (`silotune-agent model add`).")
    return said


def _house_warnings(
    spec: JobSpec, sites: Sequence[SiteRow], *, now_unix_seconds: float, is_served: bool
) -> list[str]:  # fmt: skip
    wanted = "house" in spec.evaluation.where
    if not at_house(spec):
        return []
    house = [site for site in sites if site.role is Role.HOUSE and site.state == "ENROLLED"]
    measures = wanted or spec.evaluation.test
    if not house:
        if not measures:
            return []  # That nobody distils is among the plan's refusals.
        return ["The recipe evaluates at the house agent, but none is enrolled (`silotune site invite NAME --house`)."]
    said = []
    for site in house:
        if not site.connected(now_unix_seconds=now_unix_seconds):
            said.append(f"The house agent {site.name} is not connected.")
        else:
            # One that only distils may do so on other data than the sites'.
            reads_data = measures or spec.proxy_data == (spec.data and spec.data.name)
            said += _lacks(spec, site, is_served=is_served, reads_data=reads_data)
            there = {data["name"] for data in _reported(site, "data_sets")}
            said += _lacks_for_distilling(spec, site, data_sets=there)
            missing = [name for name in spec.evaluation.benchmarks if wanted and name not in there]
            said += [f"{site.name} has no data set named {name!r}: it is not measured there." for name in missing]
    return said


def _enrolled(spec: JobSpec, sites: Sequence[SiteRow]) -> list[SiteRow]:
    wanted = spec.cohort.sites
    return [
        site
        for site in sites
        if site.role is Role.SITE and site.state == "ENROLLED" and (wanted == "all" or site.name in wanted)
    ]


def _cohort_size(spec: JobSpec, sites: Sequence[SiteRow]) -> int:
    if spec.cohort.size != "all":
        return spec.cohort.size
    return len(spec.cohort.sites) if spec.cohort.sites != "all" else len(_enrolled(spec, sites))


def _plan(spec: JobSpec, sites: Sequence[SiteRow]) -> Plan:
    return plan(spec, sites_of(spec, [views.site(row, paused=False, now_unix_seconds=0) for row in sites]))


def _disk_bytes(spec: JobSpec, sites: Sequence[SiteRow]) -> int:
    """Every version is kept, with its encoded form beside it, and the updates of one round. 0: not known."""
    book = _plan(spec, sites).ledger
    if book is None:
        return 0
    versions = (spec.rounds + 1) * (book.first_version_bytes + book.last_version_bytes) // 2
    encoded = spec.rounds * book.encoded_version_bytes
    return versions + encoded + len(book.cohorts[0]) * book.first_version_bytes


def _models(spec: JobSpec, site: SiteRow) -> list[dict[str, Any]]:
    wanted = spec.base_model
    if wanted is None:
        return []
    return [
        model
        for model in _reported(site, "base_models")
        if model.get("name") == wanted.name and wanted.digest in (None, model.get("digest"))
    ]


def _reported(site: SiteRow, what: str) -> list[dict[str, Any]]:
    return list(site.agent.get(what, ()))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
