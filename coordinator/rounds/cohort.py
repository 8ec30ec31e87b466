"""Who trains in a round, and what share each update has. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from coordinator.rounds.state import Contribution, Facts, Fate, Job, SiteFact, Update
from protos.recipe_robust import has_equal_weights, is_clipping


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


def accepted(facts: Facts) -> set[str]:
    """The sites whose update of the round in progress counts already: they do not train twice."""
    return {update.site for update in facts.updates if update.fate is Fate.ACCEPTED}


def patience_seconds(job: Job) -> float:
    """How long a round waits for sites that are not connected, once a quorum of them is.

    No longer than half of its time: what is left is for training.
    """
    return min(job.spec.cohort.gather_seconds, job.spec.cohort.round_deadline_seconds / 2)


def given_up(job: Job, facts: Facts) -> set[str]:
    """Sites that no round waits for any more: not connected now, and not counted in the round before.

    They are drawn again as soon as they are connected when a round begins. Where only some are drawn, a site that was
    not asked in the round before has not failed to answer.
    """
    if not facts.last_cohort:
        return set()
    asked = set(facts.last_cohort) if job.spec.cohort.size != "all" else {site.name for site in facts.sites}
    away = {site.name for site in facts.sites if not site.connected}
    return (asked & away) - facts.last_counted


def unenrolled(job: Job, facts: Facts) -> list[str]:
    """Names that the recipe wants and that are not here yet. Only the first round waits for them."""
    rules = job.spec.cohort
    if rules.sites == "all" or rules.size != "all" or facts.last_cohort:
        return []
    known = {site.name for site in facts.sites if not site.house} | set(facts.set_aside)
    return sorted(set(rules.sites) - known)


def draw(job: Job, facts: Facts, *, round_number: int, waited_seconds: float) -> tuple[str, ...] | None:
    """The cohort in name order, or None while the round should wait for sites to connect.

    Waits for the sites that are wanted first; when its patience is over, takes who is connected, down to the quorum. A
    round that is tried again keeps what was accepted, and those sites are in its cohort wherever they are now.
    """
    rules = job.spec.cohort
    order = draw_order(eligible(job, facts), seed=job.spec.seed, round_number=round_number)
    counted, gone = accepted(facts), given_up(job, facts)
    size = len(order) if rules.size == "all" else rules.size
    here = [site for site in order if site.connected or site.name in counted]
    cohort = tuple(sorted({site.name for site in here[:size]} | counted))
    first = [site for site in order if site in here or site.name not in gone][:size]
    waits = any(site not in here for site in first) or unenrolled(job, facts)
    if len(cohort) < rules.quorum or (waits and waited_seconds < patience_seconds(job)):
        return None
    return cohort


def replacement(job: Job, facts: Facts, *, round_number: int, cohort: Sequence[str]) -> str | None:
    """The next connected site in draw order that is not in the cohort yet."""
    order = draw_order(eligible(job, facts), seed=job.spec.seed, round_number=round_number)
    return next((site.name for site in order if site.connected and site.name not in cohort), None)


def contributions(job: Job, updates: Sequence[Update], *, sites: int) -> tuple[Contribution, ...]:
    """Normalised weights in site order, none above `max_share`.

    The excess of a capped site goes to the others in proportion, again and again until none exceeds the cap. Then
    fednova and scaffold make of them what they need; `sites` is the number of those that may train in the job.
    """
    chosen = sorted(updates, key=lambda update: update.site)
    robust = job.spec.aggregation.robust
    # What sites say of themselves has no part in these.
    kind = "equal" if has_equal_weights(robust) else job.spec.aggregation.weights
    raw = {
        update.site: float({"examples": update.examples, "steps": update.steps, "equal": 1}[kind]) for update in chosen
    }
    if not sum(raw.values()):
        raw = dict.fromkeys(raw, 1.0)
    # Clipping bounds how far a site reaches, and this how much it may claim to weigh.
    most = 2 / len(chosen) if is_clipping(robust) else 1.0
    cap = max(min(most, job.spec.aggregation.max_share), 1 / len(chosen))
    shares = _capped(raw, cap=cap)
    rule = job.spec.aggregation.rule
    if rule == "fednova":
        shares = _by_length(job, shares, steps={update.site: update.steps for update in chosen})
    found = [Contribution(update.site, update.digest, update.size, shares[update.site]) for update in chosen]
    if rule == "scaffold":
        took_part = len(chosen) / max(sites, len(chosen))
        found = [
            replace(part, control_weight=part.weight * took_part, steps=update.steps)
            for part, update in zip(found, chosen, strict=True)
        ]
    return tuple(found)


def path_length(steps: int, *, momentum: float) -> float:
    """How far `steps` local steps go along a gradient that stays the same, in steps without momentum.

    The l1 norm of FedNova's accumulation vector (Wang et al. 2020, arXiv:2007.07481, section 4): with momentum rho the
    gradient of step s counts (1 - rho^(steps - s + 1)) / (1 - rho) times. AdamW's steps are counted as they are: each
    has about the length of the learning rate, however many went before.
    """
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


def _by_length(job: Job, shares: dict[str, float], *, steps: dict[str, int]) -> dict[str, float]:
    """FedNova (Wang et al. 2020, arXiv:2007.07481): x + tau_eff sum p_k (x_k - x) / tau_k, where tau_k is the length of
    a site's path and tau_eff = sum p_k tau_k. So the weight is p_k tau_eff / tau_k; all are p_k where all lengths are
    the same."""
    length = {site: path_length(steps[site], momentum=job.spec.local.momentum) for site in shares}
    effective = sum(share * length[site] for site, share in shares.items())
    return {site: share * (effective / length[site]) for site, share in shares.items()}


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
