"""Public data sets in the forms in which they are published, each a few rows long."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from deploy.recipes.prepare import SETS, prepare
from protos.errors import InvalidInput


def read(path: Path) -> list[tuple[str, str]]:
    return [(row["text"], row["label"]) for row in pyarrow.parquet.read_table(path).to_pylist()]


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_the_hub_s_tables_are_taken_with_all_their_parts_and_numbers_become_words(tmp_path: Path) -> None:
    for part in (0, 1):
        rows = [{"text": f"Film {part} {number}", "label": number % 2} for number in range(100)]
        parquet(tmp_path / "in" / "plain_text" / f"train-0000{part}-of-00002.parquet", rows)
    parquet(tmp_path / "in" / "plain_text" / "test-00000-of-00001.parquet", [{"text": "A joy", "label": 1}])
    parquet(tmp_path / "in" / "plain_text" / "unsupervised-00000-of-00001.parquet", [{"text": "?", "label": -1}])
    made = prepare("imdb", source=tmp_path / "in", out=tmp_path / "out", validation_share=0.1)
    assert made["train.parquet"] + made["validation.parquet"] == 200 and made["validation.parquet"] > 5
    assert read(tmp_path / "out" / "test.parquet") == [("A joy", "positive")]
    assert ("Film 1 0", "negative") in {
        *read(tmp_path / "out/train.parquet"),
        *read(tmp_path / "out/validation.parquet"),
    }
    # The same rows are held out wherever it is made.
    again = prepare("imdb", source=tmp_path / "in", out=tmp_path / "again", validation_share=0.1)
    assert again == made
    assert read(tmp_path / "again" / "validation.parquet") == read(tmp_path / "out" / "validation.parquet")
    assert "validation.parquet" not in prepare("imdb", source=tmp_path / "in", out=tmp_path / "all", validation_share=0)


def test_a_part_of_the_training_rows_is_the_same_wherever_it_is_made_and_no_first_piece(tmp_path: Path) -> None:
    rows = [{"sentence": f"S {number}", "label": int(number > 100)} for number in range(200)]
    parquet(tmp_path / "in" / "train.parquet", rows)
    parquet(tmp_path / "in" / "test.parquet", [{"sentence": "T", "label": 1}])
    taken = {}
    for name, number in (("out", 50), ("again", 50), ("more", 80)):
        made = prepare("sst2", source=tmp_path / "in", out=tmp_path / name, validation_share=0.1, rows=number)
        assert made["train.parquet"] == number and made["validation.parquet"] > 5
        taken[name] = read(tmp_path / name / "train.parquet")
    assert taken["out"] == taken["again"] == taken["more"][:50]
    # Of a table that is ordered by label it has both.
    assert min(Counter(label for _, label in taken["out"]).values()) > 10
    assert not set(taken["out"]) & set(read(tmp_path / "out" / "validation.parquet"))


def test_csv_without_names_counts_labels_from_one_and_a_title_stands_before_its_text(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text('"3","Stocks fall","Again, and ""more"""\n"1","A","b"\n"4","C","d"\n')
    (tmp_path / "test.csv").write_text('"2","Goal","by him"\n')
    prepare("ag-news", source=tmp_path, out=tmp_path / "out", validation_share=0)
    assert read(tmp_path / "out/train.parquet") == [
        ('Stocks fall Again, and "more"', "Business"), ("A b", "World"), ("C d", "Sci/Tech"),
    ]  # fmt: skip
    assert read(tmp_path / "out/test.parquet") == [("Goal by him", "Sports")]


def test_glue_s_secret_test_rows_are_left_out_and_its_validation_rows_are_the_test(tmp_path: Path) -> None:
    rows = [{"sentence": f"S {number}", "label": number % 2, "idx": number} for number in range(60)]
    parquet(tmp_path / "cola/train-00000-of-00001.parquet", rows)
    parquet(tmp_path / "cola/validation-00000-of-00001.parquet", [{"sentence": "V", "label": 1, "idx": 0}])
    parquet(tmp_path / "cola/test-00000-of-00001.parquet", [{"sentence": "T", "label": -1, "idx": 0}])
    prepare("cola", source=tmp_path / "cola", out=tmp_path / "out", validation_share=0.2)
    assert read(tmp_path / "out/test.parquet") == [("V", "acceptable")]
    held = read(tmp_path / "out/validation.parquet")
    assert held and not set(held) & set(read(tmp_path / "out/train.parquet"))
    # The same set as tab-separated text without names, where quotation marks mean nothing.
    (tmp_path / "tsv").mkdir()
    (tmp_path / "tsv/in_domain_train.tsv").write_text('gj04\t1\t\tHe said "no.\nks08\t0\t*\tSaid he.\n')
    (tmp_path / "tsv/in_domain_dev.tsv").write_text("gj04\t0\t*\tNo.\n")
    (tmp_path / "tsv/test.tsv").write_text("index\tsentence\n0\tBill left.\n")
    prepare("cola", source=tmp_path / "tsv", out=tmp_path / "out-tsv", validation_share=0)
    assert read(tmp_path / "out-tsv/train.parquet") == [('He said "no.', "acceptable"), ("Said he.", "unacceptable")]


def test_a_single_file_is_divided_and_labels_in_words_are_known(tmp_path: Path) -> None:
    lines = "".join(f"review {number},{('positive', 'negative')[number % 2]}\n" for number in range(200))
    (tmp_path / "IMDB Dataset.csv").write_text("review,sentiment\n" + lines)
    made = prepare("imdb", source=tmp_path / "IMDB Dataset.csv", out=tmp_path / "out", validation_share=0.1)
    assert sum(made.values()) == 200 and all(count >= 10 for count in made.values())
    labels = Counter(label for _, label in read(tmp_path / "out/train.parquet"))
    assert set(labels) == set(SETS["imdb"].labels)


def test_json_lines_and_yelp_s_five_stars(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(f'{{"text": "R{n}", "label": {n % 5}}}\n' for n in range(10)))
    (tmp_path / "test.jsonl").write_text('{"text": "Good", "label": 4}\n')
    prepare("yelp-full", source=tmp_path, out=tmp_path / "out", validation_share=0)
    assert read(tmp_path / "out/test.parquet") == [("Good", "5 stars")]
    assert read(tmp_path / "out/train.parquet")[0] == ("R0", "1 star")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("train.csv", "title,opinion\n1,good\n", "has the columns"),
        ("train.jsonl", '{"text": "a", "label": 7}\n', "is no label of imdb"),
        ("train.jsonl", "not json\n", "cannot be read"),
        ("rows.csv", "text,label\na,positive\n", "holds no files of a data set"),
        ("train.csv", "text,label\na,positive\n", "has no test rows with labels"),
    ],
)
def test_what_is_not_this_set_is_refused_in_a_sentence(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InvalidInput, match=says):
        prepare("imdb", source=tmp_path, out=tmp_path / "out", validation_share=0)
    assert not (tmp_path / "out").exists()
