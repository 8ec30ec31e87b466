"""`silotune lab score` and `silotune lab compare` on files of answers, whole and broken."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from deploy.cli import main

# gold, first output, second output.
ANSWERS = [
    ("A", "A", "A"),
    ("B", "B. Warfarin", "The"),
    ("C", "c", "D"),
    ("D", "A", "D"),
    ("A", "The", "A"),
    ("E", "E", "E"),
    ("B", "C", "C"),
    ("B", "B", "A"),
]


def lines_of(outputs: list[tuple[str, str]]) -> str:
    return "".join(json.dumps({"gold": gold, "output": output}) + "\n" for gold, output in outputs)


def lab(*words: object) -> Result:
    return CliRunner().invoke(main, ["lab", *(str(word) for word in words)])


def facts(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    data: dict[str, Any] = json.loads(result.stdout)["data"]
    return data


@pytest.fixture
def first(tmp_path: Path) -> Path:
    path = tmp_path / "first.jsonl"
    path.write_text(lines_of([(gold, output) for gold, output, _ in ANSWERS]))
    return path


@pytest.fixture
def second(tmp_path: Path) -> Path:
    path = tmp_path / "second.jsonl.gz"
    path.write_bytes(gzip.compress(lines_of([(gold, output) for gold, _, output in ANSWERS]).encode()))
    return path


def test_a_file_is_scored(first: Path) -> None:
    data = facts(lab("score", "--benchmark", "medqa", first, "--format", "json"))
    assert (data["questions"], data["correct"], data["parseable"]) == (8, 5, 7)
    assert data["accuracy"] == 5 / 8
    assert data["unparseable"] == 1 / 8
    assert data["parseable_accuracy"] == 5 / 7
    assert data["exact_format"] == 6 / 8
    low, high = data["confidence_interval"]
    assert low < 5 / 8 < high


def test_a_person_reads_percentages(first: Path) -> None:
    text = lab("score", "--benchmark", "medqa", first).output
    assert "62.50 %  (5 of 8)" in text
    assert "12.50 %" in text
    assert "71.43 %  (5 of 7)" in text


def test_a_gzipped_file_is_known_by_what_it_holds(second: Path, tmp_path: Path) -> None:
    unnamed = tmp_path / "answers"
    unnamed.write_bytes(second.read_bytes())
    assert facts(lab("score", "--benchmark", "medqa", unnamed, "--format", "json"))["correct"] == 4


def test_blank_lines_are_no_answers(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text("\n" + lines_of([("yes", "Yes"), ("maybe", "maybe")]) + "\n \n")
    assert facts(lab("score", "--benchmark", "pubmedqa", path, "--format", "json"))["correct"] == 2


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "holds no answers."),
        (b"\n\n", "holds no answers."),
        (b'{"gold": "A", "output": "A"}\nrubbish\n', "line 2: this is not valid JSON."),
        (b"\n\xff\xfe\x00", "line 2: this is not valid JSON."),
        (b"[" * 100_000, "line 1: this is not valid JSON."),
        (b'["A", "A"]\n', "line 1: this is not a JSON object."),
        (b'{"gold": "A"}\n', "line 1: there is no 'output'."),
        (b'{"output": "A"}\n', "line 1: there is no 'gold'."),
        (b'{"gold": "A", "output": null}\n', "line 1: 'output' is None, not a text."),
        (b'{"gold": 0, "output": "A"}\n', "line 1: 'gold' is 0, not a text."),
        (b'{"gold": "yes", "output": "Yes"}\n', "line 1: the right answer is 'yes', which is no option of medqa."),
    ],
)
def test_a_broken_file_is_told_with_its_line(tmp_path: Path, content: bytes, sentence: str) -> None:
    for name, written in (("answers.jsonl", content), ("answers.jsonl.gz", gzip.compress(content))):
        path = tmp_path / name
        path.write_bytes(written)
        result = lab("score", "--benchmark", "medqa", path)
        assert result.exit_code == 3
        assert sentence in result.stderr
        assert result.stderr.startswith(f"error: {path}")


@pytest.mark.parametrize("cut", [slice(0, 10), slice(0, -12), slice(2, None)])
def test_a_gzip_file_that_is_none_or_was_cut_off_is_told(tmp_path: Path, second: Path, cut: slice) -> None:
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(second.read_bytes()[cut])
    result = lab("score", "--benchmark", "medqa", path)
    assert result.exit_code == 3
    assert f"{path} is not a whole gzip file" in result.stderr


def test_an_unknown_benchmark_is_wrong_usage(first: Path) -> None:
    result = lab("score", "--benchmark", "mmlu", first)
    assert result.exit_code == 2
    assert "'pubmedqa', 'medmcqa', 'medqa'" in result.stderr


def test_two_files_are_compared(first: Path, second: Path) -> None:
    data = facts(lab("compare", "--benchmark", "medqa", first, second, "--format", "json"))
    assert (data["gained"], data["lost"]) == (2, 3)
    assert data["change"] == pytest.approx(-1 / 8)
    # Lost one answer and found one that could not be read before; of the others two were lost and one was won.
    assert data["change_by_format"] == pytest.approx(0.0)
    assert data["change_by_knowledge"] == pytest.approx(-1 / 8)
    assert (data["both_parseable"], data["both_parseable_accuracy"]) == (6, [4 / 6, 3 / 6])
    assert data["mcnemar_p"] == 1.0


def test_a_comparison_reads_as_sentences(first: Path, second: Path) -> None:
    text = lab("compare", "--benchmark", "medqa", first, second).output
    assert "62.50 % to 50.00 %: -12.50 points" in text
    assert "gained 2 and lost 3 of 8 questions: p = 1 (McNemar, exact)" in text


def test_answers_to_other_questions_are_not_compared(first: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(lines_of([("A", "A")] * len(ANSWERS)))
    result = lab("compare", "--benchmark", "medqa", first, other)
    assert result.exit_code == 3
    assert f"The right answer is 'b' in line 2 of {first}, and 'a' in line 2 of {other}." in result.stderr
    other.write_text(lines_of([("A", "A")]))
    assert "has 8 answers and" in lab("compare", "--benchmark", "medqa", first, other).stderr
