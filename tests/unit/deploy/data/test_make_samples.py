from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from deploy.data import make_samples
from deploy.data.make_samples import ALPACA, QUESTION_ROWS, QUESTIONS, cut, write

SHIPPED = Path(make_samples.__file__).parent


def read(path: Path) -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(path).to_pylist()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows = [
        {
            "instruction": "Answer", "input": f"What is {number}?", "output": f"What is it? It is number {number}.",
            "client": ("GARD", "CDC")[number % 2], "qtype": "t", "focus": f"Disease {number % 200}", "id": f"{number}",
        }
        for number in range(1200)
    ]  # fmt: skip
    held_out = [{**row, "focus": f"Held {row['focus']}", "output": f"Held out. {row['output']}"} for row in rows]
    # A stock sentence that stands in a training row word for word.
    held_out[0]["output"] = rows[5]["output"]
    columns = tuple(rows[0])
    write(tmp_path / "source" / "medquad" / "train.parquet", rows, columns=columns)
    write(tmp_path / "source" / "medquad" / "test.parquet", held_out, columns=columns)
    question = {"question": "Q", "context": "", "options": ["yes", "no"], "answer": 0, "answer_text": "yes"}
    for name in QUESTION_ROWS:
        questions = [{"id": str(number), **question} for number in range(300)]
        write(tmp_path / "source" / name / "test.parquet", questions, columns=tuple(questions[0]))
    return tmp_path / "source"


def test_an_answer_is_cut_after_a_whole_sentence_and_loses_the_questions_at_its_head() -> None:
    assert cut("What is Zed? Zed is rare. It runs in families") == "Zed is rare."
    assert cut("One. " + "word " * 100) == "One."
    assert cut("word " * 100) == "" and cut("What are the signs of Zed?") == ""


def test_no_condition_is_in_two_files_and_no_stock_answer_is_a_test(source: Path, tmp_path: Path) -> None:
    make_samples.make(source, out=tmp_path / "out")
    names = ("train", "base", "validation", "test")
    files = {name: read(tmp_path / "out" / ALPACA / f"{name}.parquet") for name in names}
    conditions = [{row["focus"] for row in rows} for rows in files.values()]
    assert all(conditions) and sum(map(len, conditions)) == len(set.union(*conditions))
    learnt = {row["output"] for name in ("train", "base") for row in files[name]}
    assert not learnt & {row["output"] for name in ("validation", "test") for row in files[name]}


def test_the_same_source_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    first, second = (make_samples.make(source, out=tmp_path / name) for name in ("a", "b"))
    assert first == second
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in first)


def test_what_is_shipped_is_what_its_page_says() -> None:
    page = (SHIPPED / ALPACA / "README.md").read_text() + (SHIPPED / QUESTIONS / "README.md").read_text()
    for path in (*(SHIPPED / ALPACA).glob("*.parquet"), *(SHIPPED / QUESTIONS).glob("*.parquet")):
        assert f"| `{path.name}` | {len(read(path))} |" in page
    assert sum(path.stat().st_size for path in (SHIPPED / ALPACA).glob("*.parquet")) < 1_000_000
    for folder in (ALPACA, QUESTIONS):
        assert (SHIPPED / folder / "LICENSE").exists()
