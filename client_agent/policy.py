"""May this job run here? A pure function of the site's policy and the exact job spec, on the site's machine.

Absence refuses: no [policy], or a list that does not name the thing, means no. The verdict is bound to the spec's hash,
so that a spec that differs in one character is asked about again.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from client_agent.settings import Policy
from client_agent.taskdir import read_json, write_json
from protos.digests import DIGEST, digest_of
from protos.errors import InvalidInput, NotFound
from protos.jobspec import BaseModelRef, JobSpec, Synthetic, from_json

EVERYTHING = "*"
# Under `tasks`: distilling what the sites' updates were aggregated to, which only a house agent is asked for.
DISTILL = "distill"
MINIMUM_PREFIX = 6


class Answer(Enum):
    ALLOW = "allow"
    ASK = "ask"
    DENY = "deny"


@dataclass(frozen=True)
class Verdict:
    answer: Answer
    reason: str


def decide(
    policy: Policy | None, spec: JobSpec, *, base_digest: str, data_rows: int | None,
    distills: bool = False, teacher: BaseModelRef | None = None, teacher_digest: str = "",
) -> Verdict:  # fmt: skip
    """The policy's verdict on a job; with `distills` on distilling its aggregates. `teacher` is what the task trains
    beside the job's model.

    `base_digest` is that of the base model as this site holds it, empty when it holds none or needs none, and
    `teacher_digest` the same of the teacher; `data_rows` the rows of the named data set here, None when the task reads
    no data.
    """
    if policy is None:
        return Verdict(Answer.DENY, "This site has no [policy] in its site.toml, so nothing runs here.")
    reason = _objection(policy, spec, base_digest=base_digest, data_rows=data_rows, distills=distills)
    if distills and not reason:
        reason = _objection_to_distilling(policy, spec)
    if teacher and not reason and not _listed(policy.base_models, teacher.name, teacher_digest):
        reason = f"base_models names neither {teacher.name!r} nor its digest"
    if reason:
        return Verdict(Answer.DENY, f"The policy of this site does not allow it: {reason}.")
    if policy.approval == "ask":
        return Verdict(Answer.ASK, "The policy allows it once the site's administrator has approved this exact job.")
    return Verdict(Answer.ALLOW, "The policy allows it.")


def _objection(
    policy: Policy, spec: JobSpec, *, base_digest: str, data_rows: int | None, distills: bool
) -> str:  # fmt: skip
    """The first thing about the job that the policy does not allow, or nothing."""
    if not _listed(policy.tasks, spec.task.type):
        return f"tasks does not name {spec.task.type!r}"
    if isinstance(spec.task, Synthetic) or spec.base_model is None or spec.data is None:
        return ""  # It reads no data and no model of the site.
    if not _listed(policy.methods, spec.method.type):
        return f"methods does not name {spec.method.type!r}"
    if not _listed(policy.base_models, spec.base_model.name, base_digest):
        return f"base_models names neither {spec.base_model.name!r} nor its digest"
    data = spec.proxy_data if distills else spec.data.name
    if not _listed(policy.data_sets, data):
        return f"data_sets does not name {data!r}"
    if spec.local.epochs is not None and spec.local.epochs > policy.max_epochs and not distills:
        return f"{spec.local.epochs:g} epochs a round are more than max_epochs = {policy.max_epochs:g}"
    if data_rows is None:
        return ""
    if data_rows < policy.min_rows:
        return f"data set {data!r} has fewer rows than min_rows = {policy.min_rows}"
    if distills:
        return ""
    if spec.local.steps is not None and data_rows:
        epochs = spec.local.steps * spec.local.batch_size / data_rows
        # At least one pass is always within reach: a step count says nothing about a small data set.
        if epochs > max(policy.max_epochs, 1):
            return (
                f"{spec.local.steps} steps are {epochs:.1f} epochs here, more than max_epochs = {policy.max_epochs:g}"
            )
    return ""


def _objection_to_distilling(policy: Policy, spec: JobSpec) -> str:
    how = spec.distillation
    if how is None:
        return "the recipe asks for no distillation"
    if not _listed(policy.tasks, DISTILL):
        return f"tasks does not name {DISTILL!r}"
    epochs = how.epochs + (how.teacher_epochs if how.teacher else 0)
    if epochs > policy.max_epochs and spec.data is not None:
        return f"{epochs:g} epochs of distillation a round are more than max_epochs = {policy.max_epochs:g}"
    return ""


def may_read(policy: Policy | None, data_set: str) -> bool:
    return policy is not None and _listed(policy.data_sets, data_set)


def _listed(allowed: tuple[str, ...], *names: str) -> bool:
    return EVERYTHING in allowed or any(name and name in allowed for name in names)


def in_words(policy: Policy | None) -> str:
    """What may run here, in sentences for the administrator."""
    if policy is None:
        return "no [policy] in site.toml: nothing will run here"
    lists = {
        "tasks": policy.tasks,
        "methods": policy.methods,
        "base models": policy.base_models,
        "data sets": policy.data_sets,
    }
    empty = [name for name, allowed in lists.items() if not allowed]
    if empty:
        return f"the policy names no {' and no '.join(empty)}: nothing but what needs none will run here"
    parts = [f"{name}: {'any' if EVERYTHING in allowed else ', '.join(allowed)}" for name, allowed in lists.items()]
    if policy.fetch_base_models:
        parts.append("such a base model is fetched from the coordinator where it is missing")
    parts.append(f"at most {policy.max_epochs:g} epochs a round")
    if policy.min_rows:
        parts.append(f"only data sets of {policy.min_rows} rows or more")
    parts.append("each new job waits for `silotune-agent approve`" if policy.approval == "ask" else "nobody is asked")
    return "; ".join(parts)


@dataclass(frozen=True)
class Approval:
    """A job spec that the policy wants a person to see, and that person's verdict."""

    spec_hash: str
    job_name: str
    asked_unix_seconds: float
    verdict: str  # "waiting" | "approved" | "denied"
    spec_json: str


class Approvals:
    """Verdicts of the administrator, one directory for each spec hash.

    The daemon writes `asked.json`, the command line `verdict.json`: two processes, no shared file.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def ask(self, spec_json: str, *, spec_hash: str, job_name: str, now_unix_seconds: float | None = None) -> None:
        directory = self._directory / spec_hash
        if not (directory / "asked.json").exists():
            directory.mkdir(parents=True, exist_ok=True)
            now = time.time() if now_unix_seconds is None else now_unix_seconds
            write_json(
                directory / "asked.json",
                {"job_name": job_name, "asked_unix_seconds": now, "spec_json": spec_json},
            )

    def verdict(self, spec_hash: str) -> str:
        """ "waiting" | "approved" | "denied"."""
        match read_json(self._directory / spec_hash / "verdict.json"):
            case {"verdict": "approved" | "denied" as verdict}:
                return verdict
        return "waiting"

    def settle(self, hash_prefix: str, *, approved: bool) -> Approval:
        """NotFound when no spec that was asked about begins with the prefix; InvalidInput when several do."""
        if len(hash_prefix) < MINIMUM_PREFIX:
            raise InvalidInput(f"Give at least {MINIMUM_PREFIX} digits of the hash.")
        found = [approval for approval in self.all() if approval.spec_hash.startswith(hash_prefix)]
        if not found:
            raise NotFound(
                f"No job spec with the hash {hash_prefix[:64]} has asked.",
                hint="`silotune-agent approvals` lists them.",
            )
        if len(found) > 1:
            raise InvalidInput(f"{len(found)} job specs begin with {hash_prefix}; give more digits.")
        directory = self._directory / found[0].spec_hash
        write_json(directory / "verdict.json", {"verdict": "approved" if approved else "denied"})
        return self._read(directory)

    def all(self) -> list[Approval]:
        """Oldest question first."""
        found = [self._read(path) for path in self._directory.glob("*") if DIGEST.fullmatch(path.name)]
        return sorted(found, key=lambda approval: approval.asked_unix_seconds)

    def _read(self, directory: Path) -> Approval:
        asked = json.loads((directory / "asked.json").read_text())
        return Approval(spec_hash=directory.name, verdict=self.verdict(directory.name), **asked)


def parse_spec(spec_json: str, *, spec_hash: str) -> JobSpec:
    """The spec of a task. InvalidInput when it does not have the hash that it came with."""
    if digest_of(spec_json.encode()) != spec_hash:
        raise InvalidInput("The job spec does not have the hash that came with it.")
    return from_json(spec_json)
