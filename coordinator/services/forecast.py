"""What a recipe will cost, and what may stand in its way, said before it is submitted.

It rests on what the agents reported of themselves, so it warns and never refuses: a site may be invited, or fetch a
model, after the job began.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coordinator.storage.sites import SiteRow
from protos.identity import Role
from protos.jobspec import Full, JobSpec, Synthetic

VALUE_BYTES = 4
# Weights of one transformer layer, in squares of its hidden size: four attention matrices and a four-fold MLP.
LAYER_SQUARES = 12


def estimates(spec: JobSpec, *, sites: Sequence[SiteRow]) -> list[str]:
    """Sentences about bytes on the wire and on the coordinator's disk."""
    cohort, payload = _cohort_size(spec, sites), _payload_bytes(spec, sites)
    said = [f"{_count(spec.rounds, 'round')} with {_count(cohort, 'site')} each, quorum {spec.cohort.quorum}."]
    if not payload:
        return [*said, "How much will travel is not known: no enrolled site has reported the base model yet."]
    each_way = cohort * payload
    return [
        *said,
        f"About {_size(payload)} to and from each site a round: {_size(each_way)} each way a round, "
        f"{_size(each_way * spec.rounds)} each way in all.",
        f"About {_size(_disk_bytes(spec, cohort=cohort, payload=payload))} on the coordinator's disk.",
    ]


def warnings(spec: JobSpec, *, sites: Sequence[SiteRow], spare_bytes: int, now_unix_seconds: float) -> list[str]:
    """Sentences, each about one thing that the job would wait for or fail on as matters stand."""
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
        said += _lacks(spec, site)
    said += _house_warnings(spec, sites, now_unix_seconds=now_unix_seconds)
    needed = _disk_bytes(spec, cohort=_cohort_size(spec, sites), payload=_payload_bytes(spec, sites))
    if needed > spare_bytes:
        spare = _size(max(0, spare_bytes))
        said.append(f"The coordinator's disk has {spare} to spare; about {_size(needed)} are needed.")
    return said


def _lacks(spec: JobSpec, site: SiteRow) -> list[str]:
    said = []
    if spec.data and spec.data.name not in {data["name"] for data in _reported(site, "data_sets")}:
        said.append(f"{site.name} has no data set named {spec.data.name!r} in its site.toml.")
    if spec.base_model and not _models(spec, site):
        said.append(f"{site.name} does not have the base model {spec.base_model.name!r} (`silotune-agent model add`).")
    return said


def _house_warnings(spec: JobSpec, sites: Sequence[SiteRow], *, now_unix_seconds: float) -> list[str]:
    if "house" not in spec.evaluation.where and not spec.evaluation.test:
        return []
    house = [site for site in sites if site.role is Role.HOUSE and site.state == "ENROLLED"]
    if not house:
        return ["The recipe evaluates at the house agent, but none is enrolled (`silotune site invite NAME --house`)."]
    said = []
    for site in house:
        if not site.connected(now_unix_seconds=now_unix_seconds):
            said.append(f"The house agent {site.name} is not connected.")
        else:
            said += _lacks(spec, site)
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


def _payload_bytes(spec: JobSpec, sites: Sequence[SiteRow]) -> int:
    """Size of one global model; 0 when nobody has reported the base model."""
    if isinstance(spec.task, Synthetic):
        return int(spec.task.payload_mb * 1e6)
    reported = [model for site in sites for model in _models(spec, site)]
    if not reported or spec.base_model is None:
        return 0
    # protobuf's JSON writes 64-bit numbers as strings.
    parameters = int(reported[0].get("parameters", 0))
    hidden, depth = int(reported[0].get("hidden_size", 0)), int(reported[0].get("layers", 0))
    layers = min(depth, spec.base_model.layers or depth)
    head = hidden * len(spec.task.labels)
    if isinstance(spec.method, Full):
        layer = LAYER_SQUARES * hidden**2
        rest = 0 if spec.method.freeze_embeddings else parameters - depth * layer
        return VALUE_BYTES * (rest + layers * layer + head)
    return VALUE_BYTES * (2 * spec.method.rank * hidden * len(spec.method.targets) * layers + head)


def _disk_bytes(spec: JobSpec, *, cohort: int, payload: int) -> int:
    """Every version is kept, and the updates of one round."""
    return payload * (spec.rounds + 1 + cohort)


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
