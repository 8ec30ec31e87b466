"""Tables of questions: each benchmark's prompt word for word, in every format, and every fault in one sentence."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from client_agent.settings import DataSet
from client_agent.training.data import read
from client_agent.training.questions import INSTRUCTIONS, Question, read_questions
from protos.errors import SiteConfigInvalid
from protos.metrics import BENCHMARKS

LETTERS: dict[str, Any] = {
    "question": "Which vitamin prevents scurvy",
    "context": "",
    "options": ["A", "B12", "C", "D"],
    "answer": 2,
}
WORDS: dict[str, Any] = {
    "question": "Is it safe?",
    "context": "We asked 12.\nAll were well.",
    "options": ["yes", "no", "maybe"],
    "answer": 1,
}


def write(path: Path, rows: list[dict[str, Any]]) -> DataSet:
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        case ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]))
                writer.writeheader()
                writer.writerows({**row, "options": json.dumps(row["options"])} for row in rows)
    return DataSet(path=str(path), question="question")


def questions(directory: Path, *rows: dict[str, Any], name: str = "medqa") -> list[Question]:
    return read_questions(write(directory / "rows.jsonl", list(rows)), name=name, split="validation")


def test_a_question_with_letters_is_put_as_the_study_puts_it(tmp_path: Path) -> None:
    (found,) = questions(tmp_path, LETTERS)
    assert found.prompt == (
        "<|im_start|>question\n"
        "You are a medical doctor taking the US Medical Licensing Examination. You need to demonstrate your "
        "understanding of basic and clinical science, medical knowledge, and mechanisms underlying health, disease, "
        "patient care, and modes of therapy. Show your ability to apply the knowledge essential for medical practice. "
        "For the following multiple-choice question, select one correct answer from A to E. Base your answer on the "
        "current and standard practices referenced in medical guidelines.\n"
        "Question: Which vitamin prevents scurvy?\n\n"
        "Options:\nA. A\nB. B12\nC. C\nD. D\n"
        "The answer is:\n<|im_end|>\n<|im_start|>answer\n"
    )
    assert (found.options, found.gold) == (("A", "B", "C", "D"), "C")


def test_a_question_of_yes_or_no_is_put_with_its_context(tmp_path: Path) -> None:
    (found,) = questions(tmp_path, WORDS, name="pubmedqa")
    assert found.prompt == (
        "<|im_start|>question\n"
        "As an expert doctor in clinical science and medical knowledge, can you tell me if the following statement is "
        "correct? Answer yes, no, or maybe.\n"
        "We asked 12.\nAll were well.\nIs it safe?\n"
        "The answer is:\n<|im_end|>\n<|im_start|>answer\n"
    )
    assert (found.options, found.gold) == (("yes", "no", "maybe"), "no")


@pytest.mark.parametrize(("ending", "added"), [("?", ""), (".", ""), (":", "?"), ("", "?")])
def test_a_question_without_an_end_gets_a_question_mark(tmp_path: Path, ending: str, added: str) -> None:
    (found,) = questions(tmp_path, {**LETTERS, "question": f"It is{ending}"}, name="medmcqa")
    assert f"Question: It is{ending}{added}\n\nOptions:" in found.prompt


def test_every_benchmark_has_its_instruction() -> None:
    assert set(INSTRUCTIONS) == set(BENCHMARKS)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".csv"])
def test_all_formats_hold_the_same_questions(tmp_path: Path, ending: str) -> None:
    data_set = write(tmp_path / f"rows{ending}", [WORDS, {**WORDS, "answer": 2}])
    assert read(data_set, name="pubmedqa", split="train") == questions(
        tmp_path, WORDS, {**WORDS, "answer": 2}, name="pubmedqa"
    )


def test_columns_have_the_names_that_the_site_gives(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"q": "Which?", "choices": ["x", "y"], "right": 1}))
    data_set = DataSet(path=str(path), question="q", options="choices", answer="right")
    (found,) = read_questions(data_set, name="medqa", split="validation")
    assert (found.options, found.gold) == (("A", "B"), "B")


def test_nothing_is_parted_off_for_validation_and_test_is_another_file(tmp_path: Path) -> None:
    data_set = write(tmp_path / "rows.jsonl", [LETTERS] * 50)
    assert len(read_questions(data_set, name="medqa", split="validation")) == 50
    with pytest.raises(SiteConfigInvalid, match="has no test rows"):
        read_questions(data_set, name="medqa", split="test")
    other = write(tmp_path / "test.jsonl", [LETTERS])
    both = data_set.model_copy(update={"test": other.path})
    assert len(read_questions(both, name="medqa", split="test")) == 1


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("medqa", {"question": " "}, "row 2: there is no question."),
        ("medqa", {"question": 7}, "row 2: column 'question' holds int values"),
        ("medqa", {"options": "A or B"}, "row 2: column 'options' does not hold a list of two texts or more."),
        ("medqa", {"options": ["only"]}, "row 2: column 'options' does not hold a list of two texts or more."),
        ("medqa", {"options": [1, 2]}, "row 2: column 'options' does not hold a list of two texts or more."),
        ("medqa", {"options": list("abcdef")}, "row 2: these are not the options of this benchmark, a, b, c, d, e."),
        ("pubmedqa", {"options": ["yes", "perhaps"]}, "row 2: these are not the options of this benchmark, yes, no,"),
        ("medqa", {"answer": 4}, "row 2: the answer '4' in column 'answer' is not the place of an option, 0 to 3."),
        ("medqa", {"answer": -1}, "is not the place of an option"),
        ("medqa", {"answer": "B"}, "row 2: the answer 'B' in column 'answer' is not the place of an option, 0 to 3."),
        ("medqa", {"answer": True}, "is not the place of an option"),
        ("medqa", {"answer": None}, "is not the place of an option"),
    ],
)
def test_a_wrong_row_is_told_with_its_number(tmp_path: Path, name: str, change: dict[str, Any], sentence: str) -> None:
    sound = WORDS if name == "pubmedqa" else LETTERS
    with pytest.raises(SiteConfigInvalid) as caught:
        questions(tmp_path, sound, {**sound, **change}, name=name)
    assert sentence in caught.value.message


def test_an_empty_table_has_no_questions(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n")
    with pytest.raises(SiteConfigInvalid, match="'medqa' has no questions"):
        read_questions(DataSet(path=str(path), question="question"), name="medqa", split="train")


def test_questions_belong_to_a_benchmark(tmp_path: Path) -> None:
    with pytest.raises(SiteConfigInvalid, match="'quiz' holds questions, but no benchmark has its name"):
        questions(tmp_path, LETTERS, name="quiz")


def test_another_kind_of_table_holds_no_questions(tmp_path: Path) -> None:
    data_set = write(tmp_path / "rows.jsonl", [LETTERS])
    with pytest.raises(SiteConfigInvalid, match="'medqa' is no table of questions"):
        read_questions(data_set.model_copy(update={"question": None}), name="medqa", split="train")
