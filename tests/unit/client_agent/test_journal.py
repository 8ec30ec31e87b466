from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from client_agent.journal import Journal, Work, check_work, work_of
from client_agent.taskdir import FILES, UPDATE, Checkpoint, TaskResult, checkpoint_step, write_checkpoint, write_result
from protos.digests import digest_of
from protos.errors import InvalidInput
from tests.unit.client_agent.work_to_do import task

WORK = work_of(task())


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path)


def finish(journal: Journal, work: Work, content: bytes = b"tensors") -> None:
    """What a trainer leaves."""
    (journal.path(work) / UPDATE).write_bytes(content)
    write_result(journal.path(work), TaskResult(examples=5))


@pytest.mark.parametrize("text", ["", "{", "[]", "\0\0\0", '{"work": {}}', '{"blobs": null}'])
def test_a_journal_that_cannot_be_understood_begins_anew(journal: Journal, text: str) -> None:
    journal.open(WORK, generation=1)
    finish(journal, WORK)
    (journal.path(WORK) / "journal.json").write_text(text)
    assert journal.adopt(journal.open(WORK, generation=2)) is None


def test_a_checkpoint_is_found_by_the_next_grant_and_goes_when_the_result_is_there(journal: Journal) -> None:
    path = journal.path(WORK)
    journal.restart(journal.open(WORK, generation=1))
    write_checkpoint(path, Checkpoint("work", 3))
    entry = journal.restart(journal.open(WORK, generation=2))
    assert checkpoint_step(path) == 3
    finish(journal, WORK)
    journal.adopt(entry)
    assert checkpoint_step(path) == 0
    write_checkpoint(path, Checkpoint("work", 3))
    journal.open(replace(WORK, seed=8), generation=3)
    assert checkpoint_step(path) == 0, "other work does not even see it"


def test_new_work_has_no_result(journal: Journal) -> None:
    assert journal.adopt(journal.open(WORK, generation=1)) is None


def test_a_result_is_adopted_by_the_next_grant_of_the_same_work(journal: Journal) -> None:
    journal.open(WORK, generation=1)
    finish(journal, WORK)
    entry, result = journal.adopt(journal.open(WORK, generation=2))
    assert (entry.generation, result.examples) == (2, 5)
    assert [(blob.file, blob.digest) for blob in entry.blobs] == [(UPDATE, digest_of(b"tensors"))]
    again, _ = journal.adopt(journal.open(WORK, generation=3))
    assert again.blobs == entry.blobs


@pytest.mark.parametrize("change", ["spec_hash", "base_digest", "model_digest"])
def test_other_work_in_the_same_round_does_not_adopt_it(journal: Journal, change: str) -> None:
    journal.open(WORK, generation=1)
    finish(journal, WORK)
    other = replace(WORK, **{change: "f" * 64})
    assert journal.adopt(journal.open(other, generation=2)) is None


def test_a_result_that_the_disk_has_damaged_is_trained_again(journal: Journal) -> None:
    journal.open(WORK, generation=1)
    finish(journal, WORK)
    journal.adopt(journal.open(WORK, generation=1))
    (journal.path(WORK) / UPDATE).write_bytes(b"tensorz")
    assert journal.adopt(journal.open(WORK, generation=2)) is None


def test_a_trainer_that_runs_again_leaves_no_old_result_behind(journal: Journal) -> None:
    entry = journal.open(WORK, generation=1)
    finish(journal, WORK)
    assert journal.adopt(journal.restart(entry)) is None


def test_the_files_of_a_version_are_sealed_beside_its_tensors(journal: Journal) -> None:
    work = work_of(task("init", round=0))
    entry = journal.open(work, generation=1)
    (journal.path(work) / FILES).mkdir()
    (journal.path(work) / FILES / "config.json").write_bytes(b"{}")
    finish(journal, work)
    entry, _ = journal.adopt(entry)
    assert [blob.file for blob in entry.blobs] == [UPDATE, "files/config.json"]


def test_evaluations_of_two_versions_do_not_share_a_directory(journal: Journal) -> None:
    first = work_of(task("evaluate", version=1, split="validation"))
    assert first.directory_name == "j1-1-evaluate-1-validation"
    assert first.directory_name != replace(first, version=2).directory_name != WORK.directory_name


def test_pruning_spares_what_is_in_hand_and_the_newest_few_whatever_the_clock_says(
    journal: Journal, tmp_path: Path
) -> None:
    works = [work_of(task(job_id=f"job-{number}")) for number in range(7)]
    for number, work in enumerate(works):
        journal.open(work, generation=1)
        # The clock is set back all the time.
        os.utime(journal.path(work), (10_000 - number, 10_000 - number))
    journal.open(works[1], generation=2)
    (tmp_path / "nobody-knows-what").mkdir()
    journal.prune(held=[works[0]], seen=WORK)
    assert [journal.path(work).exists() for work in works] == [True, True, False, False, True, True, True]
    assert len(list(tmp_path.iterdir())) == 5


def test_a_result_is_kept_until_it_is_answered_for_or_its_job_goes_on(journal: Journal) -> None:
    kept = [work_of(task(job_id=f"job-{number}")) for number in range(9)]
    evaluation = work_of(task("evaluate", job_id="job-1"))
    for number, work in enumerate((*kept, evaluation)):
        entry = journal.open(work, generation=1)
        finish(journal, work)
        if number:  # of the first the agent was killed before it had sealed it
            journal.adopt(entry)
        os.utime(journal.path(work), (0, 0))  # half a century ago
    journal.prune(held=[], seen=WORK)
    journal.prune(held=[], seen=replace(kept[0], kind="evaluate", round=2))
    assert all(journal.path(work).exists() for work in (*kept, evaluation))
    # Round 1 of this job is over, however it ended here.
    journal.prune(held=[], seen=replace(kept[1], round=2))
    assert [work.job_id for work in kept if not journal.path(work).exists()] == ["job-1"]
    assert journal.path(evaluation).exists()


def test_the_results_that_are_kept_are_bounded(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client_agent.journal.KEPT_FINISHED", 2)
    works = [work_of(task(job_id=f"job-{number}")) for number in range(4)]
    for work in works:
        journal.open(work, generation=1)
        finish(journal, work)
    journal.prune(held=[], seen=WORK)
    assert [journal.path(work).exists() for work in works] == [False, False, True, True]


@pytest.mark.parametrize(
    "changes",
    [
        {"split": "/../../../victim"}, {"split": "..", "kind": "train"}, {"job_id": "/etc"}, {"job_id": "../.."},
        {"job_id": "a\0b"}, {"job_id": "x" * 5000},
    ],
)  # fmt: skip
def test_whatever_a_task_is_called_its_directory_is_one_of_ours(
    journal: Journal, tmp_path: Path, changes: dict[str, str]
) -> None:
    work = replace(WORK, **{"kind": "evaluate", **changes})
    journal.open(work, generation=1)
    assert [path.resolve() for path in tmp_path.iterdir()] == [journal.path(work).resolve()]


def test_a_task_from_no_sound_coordinator_is_refused() -> None:
    check_work(WORK)
    for changes in ({"job_id": "/etc"}, {"job_id": ""}, {"split": "train"}, {"split": "/../../../victim"}):
        with pytest.raises(InvalidInput):
            check_work(replace(WORK, **changes))
