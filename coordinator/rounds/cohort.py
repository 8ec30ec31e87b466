"""Who trains in a round, and what share each update has. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from coordinator.rounds.state import Contribution, Facts, Job, SiteFact, Update


def eligible(job: Job, facts: Facts) -> list[SiteFact]:
    """The sites that may train in this job, in name order: enrolled, wanted by the recipe, not set aside."""
    wanted = job.spec.cohort.sites
    return [
        site
        for site in sorted(facts.sites, key=lambda site: site.name)
        if not site.house and (wanted == "all" or site.name in wanted) and site.name not in facts.set_aside
    ]


def possible(job: Job, facts: Facts) -> set[str]:
    """Names that may yet train in this job: the eligible, and those that the recipe names and that may still enroll."""
    named = () if job.spec.cohort.sites == "all" else job.spec.cohort.sites
    return {site.name for site in eligible(job, facts)} | {name for name in named if name not in facts.set_aside}


def draw_order(sites: Sequence[SiteFact], *, seed: int, round_number: int) -> list[SiteFact]:
    """A random order that depends on (seed, round) and each name alone: who else is there changes no one's place."""

    def place(site: SiteFact) -> bytes:
        return hashlib.sha256(f"{seed}\0{round_number}\0{site.name}".encode()).digest()

    return sorted(sites, key=place)


def draw(job: Job, facts: Facts, *, round_number: int, waited_seconds: float) -> tuple[str, ...] | None:
    """The cohort in name order, or None while the round should wait for sites to connect.

    Waits for the sites that are wanted first; when `gather_seconds` have passed, takes who is connected, down to the
    quorum.
    """
    rules = job.spec.cohort
    order = draw_order(eligible(job, facts), seed=job.spec.seed, round_number=round_number)
    size = len(order) if rules.size == "all" else rules.size
    missing_names = (
        [name for name in rules.sites if name not in {site.name for site in order} and name not in facts.set_aside]
        if rules.sites != "all"
        else []
    )
    if len(order) < rules.quorum:
        return None
    first = order[:size]
    if all(site.connected for site in first) and not (missing_names and rules.size == "all"):
        return tuple(sorted(site.name for site in first))
    connected = [site for site in order if site.connected][:size]
    if waited_seconds >= rules.gather_seconds and len(connected) >= rules.quorum:
        return tuple(sorted(site.name for site in connected))
    return None


def replacement(job: Job, facts: Facts, *, round_number: int, cohort: Sequence[str]) -> str | None:
    """The next connected site in draw order that is not in the cohort yet."""
    order = draw_order(eligible(job, facts), seed=job.spec.seed, round_number=round_number)
    return next((site.name for site in order if site.connected and site.name not in cohort), None)


def contributions(job: Job, updates: Sequence[Update]) -> tuple[Contribution, ...]:
    """Normalised weights in site order, none above `max_share`.

    The excess of a capped site goes to the others in proportion, again and again until none exceeds the cap.
    """
    chosen = sorted(updates, key=lambda update: update.site)
    kind = job.spec.aggregation.weights
    raw = {
        update.site: float({"examples": update.examples, "steps": update.steps, "equal": 1}[kind]) for update in chosen
    }
    if not sum(raw.values()):
        raw = dict.fromkeys(raw, 1.0)
    cap = max(job.spec.aggregation.max_share, 1 / len(chosen))
    shares = _capped(raw, cap=cap)
    return tuple(Contribution(update.site, update.digest, update.size, shares[update.site]) for update in chosen)


def _capped(raw: dict[str, float], *, cap: float) -> dict[str, float]:
    shares = {site: value / sum(raw.values()) for site, value in raw.items()}
    capped: set[str] = set()
    while over := [site for site, share in shares.items() if share > cap * (1 + 1e-12) and site not in capped]:
        capped.update(over)
        rest = sum(raw[site] for site in raw if site not in capped)
        left = 1 - cap * len(capped)
        equal = 1 / (len(raw) - len(capped)) if len(raw) > len(capped) else 0.0
        shares = {site: cap if site in capped else left * (raw[site] / rest if rest else equal) for site in raw}
    return shares
