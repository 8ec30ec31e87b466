"""The judge: pure rules over what a run left behind. It never looks at a process, a file or a clock.

Each rule is a promise of the README; what breaks one is a Violation with a sentence that says where. Rules ask for what
a scenario makes certain and no more: a round whose quorum is smaller than its cohort may close without anyone, but
whoever it counted, it counted once and as he was.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tests.chaos.evidence import Evidence, Injected
from tests.chaos.history import Fact
from tests.chaos.recompute import Made

LOST, TWICE, DIGEST, BACK, REPEATED, HANGING = (
    "lost", "counted twice", "digest difference", "went back", "trained again", "left hanging",
)  # fmt: skip
RULES = (LOST, TWICE, DIGEST, BACK, REPEATED, HANGING)
WEIGHT_TOLERANCE = 1e-12
REFERENCE_TOLERANCE = 1e-6
ENDED = ("COMPLETED", "FAILED", "CANCELLED")
# A round may have begun so long before the runner saw it.
SEEN_LATE_SECONDS = 1.0
# A trainer may begin its task anew after one of these at its site.
ENDS_A_TRAINER = (
    "kill agent", "restart agent", "kill trainer", "kill agent and trainer", "full disk of agent", "clock of agent",
)  # fmt: skip
# Why a job may have failed, in the words of coordinator/rounds.
BELOW_QUORUM = ("updates it needs", "cannot reach its quorum", "version 0")


@dataclass(frozen=True)
class Violation:
    rule: str
    text: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.text}"


Found = Iterator[Violation]


def check(evidence: Evidence, made: Mapping[int, Made]) -> list[Violation]:
    """Everything that is wrong. `made`: the versions as they must be, from recompute.py."""
    found: list[Violation] = []
    for rule in (
        acknowledged_is_stored, counted_once, distilled, never_goes_back, trained_once, ended_for_a_reason,
    ):  # fmt: skip
        found.extend(rule(evidence))
    for judge in (made_of_its_contributors, as_undisturbed):
        found.extend(judge(evidence, made))
    return found


def acknowledged_is_stored(evidence: Evidence) -> Found:
    """What a site was told is accepted is in the store for good, with the same bytes; so is what was committed."""
    damaged = _damaged(evidence)
    updates = {(update.round, update.site): update for update in evidence.updates}
    for fact in evidence.of_agents("acknowledged"):
        key = (fact["round"], fact.actor)
        if fact["fate"] != "accepted" or key in damaged:
            continue
        found = updates.get(key)
        what = f"the update of {fact.actor} for round {fact['round']}, which was acknowledged,"
        if found is None:
            yield Violation(LOST, f"{what} is not in the store")
        elif found.fate != "ACCEPTED":
            yield Violation(LOST, f"{what} is {found.fate}: {found.reason}")
        elif fact["digest"] and found.digest != fact["digest"]:
            yield Violation(LOST, f"{what} is stored with another digest")
    for version in evidence.versions:
        if not version.deleted and not version.stored_digest:
            yield Violation(LOST, f"version {version.number} is committed and its bytes are gone")
        elif not version.deleted and version.stored_digest != version.digest:
            yield Violation(DIGEST, f"the stored bytes of version {version.number} are not those of its digest")
    if not evidence.state and any(fact.kind == "submit" for fact in evidence.facts):
        yield Violation(LOST, "the job was acknowledged and is not in the store")


def counted_once(evidence: Evidence) -> Found:
    """One accepted update a site and round, and a version is made of exactly those of its round."""
    for (number, site), count in Counter((update.round, update.site) for update in evidence.updates).items():
        if count > 1:
            yield Violation(TWICE, f"{site} has {count} updates in round {number}")
    for number, count in Counter(version.number for version in evidence.versions).items():
        if count > 1:
            yield Violation(TWICE, f"there are {count} versions {number}")
    for version in evidence.versions:
        if version.number == 0:
            continue
        parts = Counter(part.site for part in version.parts)
        for site, count in parts.items():
            if count > 1:
                yield Violation(TWICE, f"{site} is in version {version.number} {count} times")
        accepted = {
            update.site: update.digest
            for update in evidence.updates
            if update.round == version.number and update.fate == "ACCEPTED"
        }
        counted = {part.site: part.digest for part in version.parts}
        for site in sorted(accepted.keys() - counted.keys()):
            yield Violation(LOST, f"the accepted update of {site} is not in version {version.number}")
        for site in sorted(counted.keys() - accepted.keys()):
            yield Violation(TWICE, f"version {version.number} has a part of {site}, whose update was not accepted")
        for site in sorted(counted.keys() & accepted.keys()):
            if counted[site] != accepted[site]:
                yield Violation(DIGEST, f"version {version.number} was made of another update of {site}")


def distilled(evidence: Evidence) -> Found:
    """What was distilled and acknowledged is the version, and no round goes without where everyone is waited for."""
    digests = {version.number: version.digest for version in evidence.versions}
    for fact in evidence.of_agents("acknowledged", task="distill"):
        if fact["fate"] == "accepted" and digests.get(fact["round"]) != fact["digest"]:
            yield Violation(LOST, f"the distillation of round {fact['round']}, which was acknowledged, is no version")
    for number, why in evidence.undistilled.items():
        if evidence.scenario.patient or not evidence.scenario.distills:
            yield Violation(LOST, f"round {number} was not distilled: {why}")


def never_goes_back(evidence: Evidence) -> Found:
    """What the operator saw only ever went on, and versions have no gaps."""
    seen_head, seen_round, ended = -1, 0, ""
    for fact in evidence.facts:
        if fact.actor != "operator" or fact.kind != "shown" or fact["job"] != evidence.job:
            continue
        head = -1 if fact["head"] is None else fact["head"]
        if head < seen_head or fact["round"] < seen_round:
            yield Violation(
                BACK, f"version {seen_head}, round {seen_round} was shown, and later {head}, {fact['round']}"
            )
        if ended and fact["state"] != ended:
            yield Violation(BACK, f"the job was shown as {ended} and later as {fact['state']}")
        seen_head, seen_round = max(seen_head, head), max(seen_round, fact["round"])
        if fact["state"] in ENDED:
            ended = fact["state"]
    numbers = sorted(version.number for version in evidence.versions)
    if numbers != list(range(len(numbers))):
        yield Violation(BACK, f"the versions are {numbers}")
    if numbers and evidence.head != numbers[-1]:
        yield Violation(BACK, f"the head is version {evidence.head}, and the last one is {numbers[-1]}")
    if seen_head > (-1 if evidence.head is None else evidence.head):
        yield Violation(BACK, f"version {seen_head} was shown as the head, which is version {evidence.head}")


def trained_once(evidence: Evidence) -> Found:
    """Training that was finished is not done again, and what was begun is begun anew only if something ended it."""
    damaged = _damaged(evidence)
    attempts = {round_.number: round_.attempt for round_ in evidence.rounds}
    begun: Counter[tuple[int, str]] = Counter()
    sealed: set[tuple[int, str]] = set()
    for fact in (*evidence.of_agents("begun", "sealed"), *evidence.of_agents("begun", "sealed", task="distill")):
        key = (fact["round"], fact.actor)
        if fact.kind == "sealed":
            sealed.add(key)
            continue
        if key in sealed and key not in damaged:
            yield Violation(REPEATED, f"{fact.actor} had finished its training of round {key[0]} and did it again")
        if not fact["resumed_step"]:
            begun[key] += 1
    for (number, site), count in begun.items():
        ends = sum(
            done.fault.kind in ENDS_A_TRAINER and done.fault.target == site and _touches(done, number, evidence)
            for done in evidence.injected
        )
        allowed = 1 + ends + (attempts.get(number, 1) - 1)
        if count > allowed:
            yield Violation(
                REPEATED, f"{site} began its training of round {number} {count} times; {ends} faults ended it there"
            )


def ended_for_a_reason(evidence: Evidence) -> Found:
    """The job is over: complete, or failed as its scenario makes possible."""
    for trouble in evidence.troubles:
        yield Violation(HANGING, trouble)
    for fact in evidence.facts:
        if fact.actor == "operator" and fact.kind == "refused" and not _came_too_late(fact):
            yield Violation(HANGING, f"the operator's order `{fact['order']}` was refused: {fact['reason']}")
    if evidence.state == "COMPLETED":
        if evidence.head != evidence.scenario.rounds:
            yield Violation(HANGING, f"the job is complete with version {evidence.head}")
        open_tasks = [task for task in evidence.tasks if task.state in ("QUEUED", "LEASED", "RUNNING")]
        for task in open_tasks:
            yield Violation(HANGING, f"the job is complete, and {task.kind} of {task.site} is {task.state}")
    elif evidence.state == "FAILED":
        revoked = {done.fault.target for done in evidence.injected if done.fault.kind == "revoke site"}
        possible = len(evidence.scenario.sites) - len(revoked) >= evidence.scenario.quorum
        # No other fault lasts for as long as all attempts of a round together.
        if possible or not any(words in evidence.sentence for words in BELOW_QUORUM):
            yield Violation(HANGING, f"the job failed: {evidence.sentence}")
    else:
        yield Violation(HANGING, f"the job is {evidence.state or 'unknown'}: {evidence.sentence}")


def made_of_its_contributors(evidence: Evidence, made: Mapping[int, Made]) -> Found:
    """Each version is what its contributors' formula gives, bit for bit, and what float64 arithmetic gives nearly."""
    for version in evidence.versions:
        must = made[version.number]
        for part in version.parts:
            if version.number and part.digest != must.updates[part.site]:
                yield Violation(DIGEST, f"the update of {part.site} in version {version.number} is not its training")
        if version.digest != must.digest:
            yield Violation(DIGEST, f"version {version.number} is not what its contributors make")
        if must.off_by > REFERENCE_TOLERANCE:
            yield Violation(DIGEST, f"version {version.number} is off by {must.off_by:.1e} from plain arithmetic")
        total = sum(must.examples.values())
        for part in version.parts if version.number else ():
            if abs(part.weight - must.examples[part.site] / total) > WEIGHT_TOLERANCE:
                yield Violation(DIGEST, f"{part.site} has the weight {part.weight} in version {version.number}")


def as_undisturbed(evidence: Evidence, made: Mapping[int, Made]) -> Found:
    """With the whole cohort as quorum faults change nothing: every site is in every version.

    Version 0 and each update are a formula of the recipe, so the last digest is then that of the undisturbed run.
    """
    if evidence.scenario.whole_cohort and not evidence.scenario.revokes:
        for version in evidence.versions:
            sites = tuple(part.site for part in version.parts)
            if version.number and sites != evidence.scenario.sites:
                yield Violation(DIGEST, f"version {version.number} is made of {', '.join(sites)} alone")


def _damaged(evidence: Evidence) -> set[tuple[int, str]]:
    """Round and site of each stored update that a fault destroyed: these alone may be rejected and made again."""
    return {(done.round, done.fault.target) for done in evidence.injected if done.fault.kind == "damage update"}


def _touches(done: Injected, number: int, evidence: Evidence) -> bool:
    """Whether a fault was on at some time of a round."""
    begins = evidence.round_begins.get(number, -math.inf)
    over = min((when for later, when in evidence.round_begins.items() if later > number), default=math.inf)
    return done.unix_seconds <= over and begins <= done.ended_unix_seconds + SEEN_LATE_SECONDS


def _came_too_late(order: Fact) -> bool:
    """Whether an order was refused because the job had ended, as it may between a look and the order."""
    return any(f" is {state.lower()}: it cannot be told to" in order["reason"] for state in ENDED)
