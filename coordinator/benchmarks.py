"""What a job's questions say about its model: how good it is, and why it became worse after its best round.

An answer is wrong because the model does not know, or because what it writes is none of the options. The second is no
loss of knowledge, and another prompt or a few steps mend it: so a fall is parted into the two.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from protos.jobspec import Evaluation
from protos.proportions import mcnemar, wilson
from protos.v1.operator_pb2 import EvaluationView


@dataclass(frozen=True)
class Measured:
    """One benchmark's figures for one version, over all who asked it."""

    questions: float
    correct: float
    parseable: float
    # Against version 0; None where somebody could not tell.
    gained: float | None
    lost: float | None

    @property
    def accuracy(self) -> float:
        return self.correct / self.questions

    @property
    def parseable_accuracy(self) -> float:
        return self.correct / self.parseable if self.parseable else 0.0

    @property
    def unparseable(self) -> float:
        return 1 - self.parseable / self.questions


def lines(
    views: Sequence[EvaluationView], *, evaluation: Evaluation, version: int | None, house: Collection[str]
) -> list[str]:
    """For each benchmark: how good `version`, the best or exported one, is, and why the last measured one is worse.

    As the best round is picked: the house agent's figures where it evaluates, else those of all sites together.
    """
    found = [view for view in views if view.split == "validation"]
    if "house" in evaluation.where and house:
        found = [view for view in found if view.site in house]
    said = []
    for name in evaluation.benchmarks:
        by_version = measured(found, benchmark=name)
        if version not in by_version:
            continue
        said.append(how_good(by_version[version], benchmark=name, version=version))
        last = max(by_version)
        if last > version and by_version[last].accuracy < by_version[version].accuracy:
            said.append(why_worse(by_version[version], by_version[last], benchmark=name, version=last))
    return said


def measured(views: Sequence[EvaluationView], *, benchmark: str) -> dict[int, Measured]:
    """By version, in order."""
    found: dict[int, Measured] = {}
    for version in sorted({view.version for view in views if f"{benchmark}_questions" in view.metrics}):
        told = [
            {key.removeprefix(f"{benchmark}_"): value for key, value in view.metrics.items()}
            for view in views
            if view.version == version and f"{benchmark}_questions" in view.metrics
        ]
        compared = all("gained" in each and "lost" in each for each in told)
        found[version] = Measured(
            questions=sum(each["questions"] for each in told),
            correct=sum(each["questions"] * each["accuracy"] for each in told),
            parseable=sum(each["questions"] * (1 - each["unparseable"]) for each in told),
            gained=sum(each["gained"] for each in told) if compared else None,
            lost=sum(each["lost"] for each in told) if compared else None,
        )
    return found


def parts(before: Measured, after: Measured) -> tuple[float, float]:
    """The change of the accuracy, in a part that is format and one that is knowledge; they add up to it.

    Accuracy is the parseable share times the accuracy on it. Each factor's change counts at the mean of the other, so
    that neither comes first (Shapley's value of two players).
    """
    shares = [1 - before.unparseable, 1 - after.unparseable]
    # Of whom nothing can be read, nothing is known: then it is all format.
    orders = ((before, after), (after, before))
    rights = [(each if each.parseable else other).parseable_accuracy for each, other in orders]
    return (shares[1] - shares[0]) * sum(rights) / 2, (rights[1] - rights[0]) * sum(shares) / 2


def how_good(found: Measured, *, benchmark: str, version: int) -> str:
    low, high = wilson(found.correct, found.questions)
    text = (
        f"{benchmark}, version {version}: {100 * found.accuracy:.2f} % of {found.questions:.0f} answers are right "
        f"(95 % interval {100 * low:.2f} to {100 * high:.2f} %)"
    )
    if version and found.gained is not None and found.lost is not None:
        chance = mcnemar(round(found.gained), round(found.lost))
        text += f"; since version 0 it gained {found.gained:.0f} and lost {found.lost:.0f} (McNemar's p = {chance:.2g})"
    return text + "."


def why_worse(best: Measured, last: Measured, *, benchmark: str, version: int) -> str:
    """One sentence on a fall from the best version to a later one."""
    drift, knowledge = parts(best, last)
    return (
        f"{benchmark}, version {version}: {100 * last.accuracy:.2f} %, {100 * (best.accuracy - last.accuracy):.2f} "
        f"points fewer. Format makes {-100 * drift:.2f} of them: {100 * last.unparseable:.2f} % of the answers are "
        f"none of the options, {100 * best.unparseable:.2f} % before. Knowledge makes {-100 * knowledge:.2f}: of the "
        f"others {100 * last.parseable_accuracy:.2f} % are right, {100 * best.parseable_accuracy:.2f} % before."
    )
