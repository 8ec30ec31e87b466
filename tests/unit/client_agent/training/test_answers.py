"""The study's rule for reading an answer, and the statistics of right and wrong."""

from __future__ import annotations

import pytest

from client_agent.training.answers import FORMS, KINDS, Answer, Change, Score, extract, judge
from protos.metrics import BENCHMARKS

RIGHT, WRONG, UNREADABLE = Answer(True, True, True), Answer(False, True, True), Answer(False, False, False)


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("B", "b"),
        ("b", "b"),
        ("B. Warfarin", "b"),
        ("(C)", "c"),
        ("  d\n", "d"),
        ("E", "e"),
        ("Aspirin", "a"),  # whatever begins with a letter of an option is that option
        ("F", "f"),
        ("The", "the"),
        ("1", "1"),
        ("", ""),
        ("...", "..."),
        ("yes", "yes"),  # the first character of it is no option
        ("I think\n## B: because\nC", "b"),  # what stands after the mark, up to the line's end
        ("### C", "c"),  # the mark counts only at the start of a later line
        ("so\n### C\n", "c"),
        ("so\n##\nC", "so\n##\nc"),  # nothing on that line
        ("\n## A\n## B", "a"),
        ("ÄB", "b"),  # letters beyond ASCII are blanks
    ],
)
def test_a_letter_is_read_by_the_studys_rule(output: str, answer: str) -> None:
    assert extract(output, kind="mcq") == answer


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("Yes", "yes"),
        (" no.", "no"),
        ("maybe", "maybe"),
        ("Maybe.", "maybe."),  # compared as it was written: not equal to maybe
        ("yesyes", "yes"),
        ("nono", "no"),
        ("yesno", "yes"),
        ("noyes", "no"),
        ("yesyesyes", "yesyesyes"),  # one doubling is taken away, two are not
        ("yes yes", "yes yes"),
        ("yes, it is", "yes, it is"),
        ("A", "a"),  # the rule knows letters here too
        ("because\n## No\nyes", "no"),
    ],
)
def test_a_word_is_read_by_the_studys_rule(output: str, answer: str) -> None:
    assert extract(output, kind="boolean") == answer


def test_maybe_is_right_only_when_nothing_else_was_said() -> None:
    assert judge("Maybe", gold="maybe", kind="boolean") == Answer(right=True, parseable=True, exact=True)
    assert judge("maybe so", gold="maybe", kind="boolean") == Answer(right=False, parseable=False, exact=False)


def test_a_letter_is_no_answer_to_a_question_of_yes_or_no() -> None:
    assert judge("A", gold="yes", kind="boolean") == Answer(right=False, parseable=False, exact=False)


def test_a_right_answer_need_not_be_in_the_exact_form() -> None:
    assert judge("B. Warfarin", gold="B", kind="mcq") == Answer(right=True, parseable=True, exact=False)


def test_every_benchmark_has_a_kind_of_answer() -> None:
    assert set(KINDS) == set(BENCHMARKS)
    assert set(KINDS.values()) == set(FORMS)


def test_the_shares_follow_from_the_counts() -> None:
    score = Score.of([RIGHT, RIGHT, WRONG, UNREADABLE])
    assert (score.accuracy, score.unparseable, score.exact_format) == (0.5, 0.25, 0.75)
    assert score.parseable_accuracy == pytest.approx(2 / 3)


def test_nothing_readable_is_no_division_by_nothing() -> None:
    assert Score.of([UNREADABLE]).parseable_accuracy == 0.0


def test_a_change_is_parted_into_format_and_knowledge() -> None:
    before = [RIGHT, RIGHT, RIGHT, WRONG, UNREADABLE, WRONG, RIGHT, RIGHT]
    after = [RIGHT, WRONG, UNREADABLE, RIGHT, RIGHT, UNREADABLE, UNREADABLE, RIGHT]
    change = Change.between(before, after)
    assert (change.gained, change.lost) == (2, 3)
    assert (change.gained_by_format, change.lost_by_format) == (1, 2)
    assert change.total == pytest.approx(-1 / 8)
    assert change.format == pytest.approx(-1 / 8)
    assert change.knowledge == pytest.approx(0.0)
    assert (change.both_parseable, change.both_correct) == (4, (3, 3))
