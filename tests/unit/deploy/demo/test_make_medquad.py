from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from deploy.data import make_medquad
from deploy.data.make_medquad import MASK, TEST, VALIDATION, passage, site_name


def answer(number: int, *, focus: str, qtype: str, client: str = "GARD", output: str = "") -> dict[str, Any]:
    text = output or f"Text number {number} about {focus} says enough to be told from the others."
    return {"id": f"{number:07}-1", "client": client, "qtype": qtype, "focus": focus, "output": text}


def write(directory: Path, *, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> Path:
    for name, rows in (("train", train), ("test", test)):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), directory / f"{name}.parquet")
    return directory


@pytest.fixture
def source(tmp_path: Path) -> Path:
    train = [
        answer(number, focus=f"disease {number}", qtype=f"type {number % 9}", client=("GARD", "CDC")[number % 2])
        for number in range(90)
    ]
    # The ninth type is the rarest.
    train = [row for row in train if row["qtype"] != "type 8" or int(row["id"][:7]) < 40]
    test = [answer(number, focus=f"syndrome {number}", qtype=f"type {number % 9}") for number in range(100, 190)]
    return write(tmp_path, train=train, test=test)


def read(out: Path, file: str) -> list[dict[str, str]]:
    return pyarrow.parquet.read_table(out / file).to_pylist()


def test_the_condition_is_masked_in_any_case_and_across_line_breaks():
    assert passage("Marfan\nSyndrome is rare; MARFAN SYNDROME runs in families.", focus="Marfan syndrome") == (
        f"{MASK} is rare; {MASK} runs in families."
    )


def test_a_name_with_its_abbreviation_in_brackets_is_masked_without_it_too():
    text = passage("Attention deficit disorder (ADD) begins early.", focus="Attention deficit disorder (ADD)")
    assert text == f"{MASK} begins early."
    assert MASK in passage("Attention deficit disorder begins.", focus="Attention deficit disorder (ADD)")


def test_a_name_with_signs_that_mean_something_to_a_pattern_is_taken_literally():
    assert passage("Type 1+ (a.b) disease hurts.", focus="Type 1+ (a.b) disease") == f"{MASK} hurts."


def test_questions_that_an_answer_opens_with_are_dropped():
    text = passage("What causes Gout? Is it the food? Uric acid does. Why? Nobody knows.", focus="Gout")
    assert text == "Uric acid does. Why? Nobody knows."


def test_an_answer_without_a_named_condition_is_only_cut():
    assert passage("one " * 500, focus="") == " ".join(["one"] * make_medquad.WORDS)


def test_institutes_become_site_names():
    assert site_name("MPlusHealthTopics") == "mplushealthtopics"
    assert site_name("St. Olav (North)") == "st-olav-north"


def test_the_eight_most_frequent_kinds_are_kept(source: Path, tmp_path: Path):
    counts = make_medquad.make(source, out=tmp_path / "out")
    assert set(counts) == {"sites/cdc.parquet", "sites/gard.parquet", VALIDATION, TEST}
    labels = {row["label"] for file in counts for row in read(tmp_path / "out", file)}
    assert labels == {f"type {number}" for number in range(8)}


def test_the_same_source_gives_the_same_bytes(source: Path, tmp_path: Path):
    first, second = (make_medquad.make(source, out=tmp_path / name) for name in ("a", "b"))
    assert first == second
    for file in first:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_an_institute_gives_at_most_so_many_rows(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(make_medquad, "MOST_ROWS", 7)
    counts = make_medquad.make(source, out=tmp_path / "out")
    assert counts["sites/gard.parquet"] == counts["sites/cdc.parquet"] == 7


def test_a_stock_sentence_that_a_site_holds_is_no_test(tmp_path: Path):
    stock = "These resources address the diagnosis or management of Zed: a list."
    source = write(
        tmp_path,
        train=[answer(1, focus="Zed", qtype="t", output=stock)],
        test=[
            answer(2, focus="Ypsilon", qtype="t", output=stock.replace("Zed", "Ypsilon")),
            answer(3, focus="Xi", qtype="t", output="Xi is treated with rest."),
            answer(4, focus="Chi", qtype="t", output="Chi is treated with rest."),
        ],
    )
    counts = make_medquad.make(source, out=tmp_path / "out")
    assert counts[VALIDATION] + counts[TEST] == 1


def test_rows_of_one_condition_stay_on_one_side(tmp_path: Path):
    test = [answer(number, focus=f"Disease {number % 60}", qtype="t") for number in range(240)]
    source = write(tmp_path, train=[answer(900, focus="other", qtype="t")], test=test)
    counts = make_medquad.make(source, out=tmp_path / "out")
    assert counts[VALIDATION] > 0 and counts[TEST] > counts[VALIDATION]
    sides = [{row["focus"] for row in read(tmp_path / "out", file)} for file in (VALIDATION, TEST)]
    assert not sides[0] & sides[1]
