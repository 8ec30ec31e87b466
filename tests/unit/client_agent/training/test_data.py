"""A site's rows are read, or the first wrong one is named in a sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from client_agent.settings import DataSet
from client_agent.training.data import (
    Instruction,
    Instructions,
    Rows,
    fingerprint,
    read_instructions,
    read_rows,
    read_texts,
    without_content,
)
from client_agent.training.data import read as read_any
from protos.errors import SiteConfigInvalid

LABELS = ("no", "yes")


def read(path: Path, *, labels: tuple[str, ...] | None = LABELS, split: Any = "train", **settings: Any) -> Rows:
    return read_rows(DataSet(path=str(path), **{"validation": 0, **settings}), name="notes", labels=labels, split=split)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def fault(path: Path, **settings: Any) -> SiteConfigInvalid:
    with pytest.raises(SiteConfigInvalid) as caught:
        read(path, **settings)
    assert "Data set 'notes'" in caught.value.message
    assert str(path) not in str(caught.value)
    return caught.value


def test_the_three_formats_give_the_same_rows(tmp_path: Path) -> None:
    texts, labels = ["a cough, at night", 'said "no"\nand left'], ["yes", "no"]
    csv_file = write(tmp_path / "a.csv", 'text,label\n"a cough, at night",yes\n"said ""no""\nand left",no\n')
    lines = "".join(
        json.dumps({"label": label, "text": text}) + "\n" for text, label in zip(texts, labels, strict=True)
    )
    jsonl = write(tmp_path / "a.jsonl", lines)
    parquet = write_parquet(tmp_path / "a.parquet", {"text": texts, "other": [1, 2], "label": labels})
    assert read(csv_file) == read(jsonl) == read(parquet) == Rows(texts, [1, 0], LABELS, 0)


def test_columns_delimiter_and_format_are_configurable(tmp_path: Path) -> None:
    path = write(tmp_path / "export.txt", "id;note;class\n1;a, b;yes\n")
    assert read(path, format="csv", delimiter=";", text="note", label="class").texts == ["a, b"]


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    assert len(read(write(tmp_path / "a.csv", b"\xef\xbb\xbftext,label\nx,yes\n"))) == 1


def test_latin_1_bytes_are_refused_with_their_row_and_read_when_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\nfine,no\nna\u00efve caf\u00e9,yes\n".encode("latin-1"))
    error = fault(path)
    assert "row 2: column 'text' holds bytes that are not utf-8" in error.message
    assert "latin-1" in error.hint
    assert read(path, encoding="latin-1").texts[1] == "na\u00efve caf\u00e9"


def test_undecodable_bytes_in_a_column_that_nobody_reads_do_no_harm(tmp_path: Path) -> None:
    assert len(read(write(tmp_path / "a.csv", b"text,who,label\nx,\xe9ve,yes\n"))) == 1


def test_undecodable_bytes_are_found_in_every_format(tmp_path: Path) -> None:
    jsonl = write(tmp_path / "a.jsonl", b'{"text": "ok", "label": "no"}\n{"text": "caf\xe9", "label": "no"}\n')
    binary = write_parquet(tmp_path / "a.parquet", {"text": pa.array([b"ok", b"caf\xe9"]), "label": ["no", "no"]})
    invalid = pa.StringArray.from_buffers(2, *pa.array([b"ok", b"caf\xe9"]).buffers()[1:])
    string = write_parquet(tmp_path / "b.parquet", {"text": invalid, "label": ["no", "no"]})
    for path in (jsonl, binary, string):
        assert "row 2: column 'text' holds bytes that are not utf-8" in fault(path).message
    assert read(binary, encoding="latin-1").texts[1] == "caf\u00e9"


def test_half_a_character_in_json_is_refused(tmp_path: Path) -> None:
    assert "row 1" in fault(write(tmp_path / "a.jsonl", '{"text": "\\ud83d", "label": "no"}\n')).message


def test_a_file_in_utf_16_reads_when_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\nx,yes\n".encode("utf-16"))
    assert read(path, encoding="utf-16").texts == ["x"]
    assert "not utf-16" in fault(write(tmp_path / "b.csv", "text,label\nx,yes\n"), encoding="utf-16").message


def test_an_unknown_encoding_is_named(tmp_path: Path) -> None:
    assert "'klingon'" in fault(write(tmp_path / "a.csv", "text,label\nx,yes\n"), encoding="klingon").message


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_missing_column_is_answered_with_those_there_are(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        write_parquet(path, {"note": ["x"], "label": ["yes"]})
    else:
        write(path, "note,label\nx,yes\n" if ending == "csv" else '{"note": "x", "label": "yes"}\n')
    error = fault(path)
    assert "no column 'text'; the columns are 'note', 'label'" in error.message
    assert "'note'" not in without_content(error)


def test_one_column_that_holds_another_delimiter_is_recognised(tmp_path: Path) -> None:
    assert "';'" in fault(write(tmp_path / "a.csv", "text;label\nx;yes\n")).hint


def test_an_unknown_label_is_named_with_its_row_but_does_not_leave_the_site(tmp_path: Path) -> None:
    error = fault(write(tmp_path / "a.csv", "text,label\nx,yes\ny,maybe\n"))
    assert "row 2: the label 'maybe' in column 'label' is none of the recipe's (no, yes)" in error.message
    assert "maybe" not in without_content(error) + error.hint
    assert "row 2" in without_content(error)


def test_unknown_and_missing_labels_are_skipped_and_counted_where_that_is_permitted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\nx,yes\ny,maybe\nz,\n")
    rows = read(path, unknown_labels="skip")
    assert (rows.texts, rows.skipped) == (["x"], 2)
    assert "row 3: there is no label" in fault(path, labels=("yes", "maybe")).message


def test_a_site_s_labels_are_mapped_to_the_recipe_s(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\nx,J\ny,no\nz, N \n")
    rows = read_rows(
        DataSet(path=str(path), labels={"J": "yes", "N": "no"}, validation=0),
        name="notes",
        labels=LABELS,
        split="train",
    )
    assert rows.labels == [1, 0, 0]


def test_labels_may_be_numbers_or_truth_values(tmp_path: Path) -> None:
    whole = write_parquet(tmp_path / "a.parquet", {"text": ["x", "y"], "label": [0, 1]})
    # How pandas writes whole numbers when one is missing.
    floating = write_parquet(tmp_path / "b.parquet", {"text": ["x", "y"], "label": [0.0, 1.0]})
    assert read(whole, labels=("0", "1")).labels == read(floating, labels=("0", "1")).labels == [0, 1]
    truth = write(tmp_path / "a.jsonl", '{"text": "x", "label": true}\n')
    assert read(truth, labels=("false", "true")).labels == [1]


def test_without_a_recipe_every_label_is_accepted_and_listed(tmp_path: Path) -> None:
    rows = read(write(tmp_path / "a.csv", "text,label\nx,b\ny,a\n"), labels=None)
    assert (rows.label_names, rows.labels) == (("a", "b"), [1, 0])


def test_empty_texts_and_blank_lines_are_skipped_and_counted_as_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\nx,yes\n\n  ,no\n,maybe\ny,maybe\n")
    assert "row 5: the label 'maybe'" in fault(path).message
    assert read(path, unknown_labels="skip").skipped == 4
    lines = write(tmp_path / "a.jsonl", '\n{"text": null, "label": "no"}\n{"text": "x", "label": "no"}\n')
    assert read(lines).skipped == 2


def test_a_text_of_ten_thousand_words_is_a_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", f"text,label\n{'paracetamol ' * 20_000},yes\n")
    assert len(read(path).texts[0]) > 200_000


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("text,label\nx,yes\na, b,no\n", "row 2: there are 3 fields for 2 columns"),
        ('text,label\nx,yes\n"never closed,no\ny,no\n', "row 2: this is not valid CSV"),
        ("", "has an empty file"),
        ("text,label\n", "has no rows"),
        ("text,label\n ,yes\n", "has no usable rows for train (1 rows, 1 skipped)"),
    ],
)
def test_a_wrong_csv_file_is_explained(tmp_path: Path, content: str, says: str) -> None:
    assert says in fault(write(tmp_path / "a.csv", content)).message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"text": "x", "label": "no"}\n{"text": \n', "row 2: this is not valid JSON"),
        ("[1]\n", "row 1: this is not a JSON object"),
        ('{"text": 5, "label": "no"}\n', "row 1: column 'text' holds int values where texts are expected"),
        ("[" * 100_000, "row 1: this is not valid JSON"),
        ("", "has an empty file"),
    ],
)
def test_a_wrong_jsonl_file_is_explained(tmp_path: Path, content: str, says: str) -> None:
    assert says in fault(write(tmp_path / "a.jsonl", content)).message


def test_files_that_are_no_parquet_missing_or_of_unknown_kind_are_explained(tmp_path: Path) -> None:
    assert "not valid Parquet" in fault(write(tmp_path / "a.parquet", "text,label\n")).message
    assert "No such file" in fault(tmp_path / "absent.csv").message
    assert "'.xlsx'" in fault(write(tmp_path / "a.xlsx", "")).message
    whole = write_parquet(tmp_path / "b.parquet", {"text": ["x"] * 100, "label": ["no"] * 100}).read_bytes()
    assert "not valid Parquet" in fault(write(tmp_path / "b.parquet", whole[: len(whole) // 2])).message


def test_a_share_is_split_off_by_text_the_same_way_each_time(tmp_path: Path) -> None:
    rows = [f"text {number % 150},yes\n" for number in range(300)]
    path = write(tmp_path / "a.csv", "text,label\n" + "".join(rows))
    train, held = read(path, validation=0.2), read(path, validation=0.2, split="validation")
    assert len(train) + len(held) == 300
    assert set(train.texts).isdisjoint(held.texts)
    assert 30 <= len(held) <= 90
    shuffled = write(tmp_path / "b.csv", "text,label\n" + "".join(reversed(rows)))
    assert set(read(shuffled, validation=0.2, split="validation").texts) == set(held.texts)


def test_validation_and_test_may_be_files(tmp_path: Path) -> None:
    path, other = (write(tmp_path / name, f"text,label\n{name},yes\n") for name in ("a.csv", "b.csv"))
    for split in ("validation", "test"):
        assert read(path, split=split, **{split: str(other)}).texts == ["b.csv"]
    assert read(path, validation=str(other)).texts == ["a.csv"]


def test_a_split_without_rows_is_a_fault(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\nx,yes\n")
    assert "has no test rows" in fault(path, split="test").message
    assert "no usable rows for validation" in fault(path, split="validation").message


def test_a_fingerprint_changes_with_the_file_and_the_configuration(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\nx,yes\n")
    first, second = DataSet(path=str(path)), DataSet(path=str(path), unknown_labels="skip")
    assert fingerprint(first, name="notes", split="train") != fingerprint(second, name="notes", split="train")
    before = fingerprint(first, name="notes", split="train")
    assert before == fingerprint(first, name="notes", split="train")
    write(path, "text,label\nxy,yes\n")
    assert before != fingerprint(first, name="notes", split="train")


def taught(path: Path, *, split: Any = "train", **settings: Any) -> Instructions:
    fields = {"validation": 0, "instruction": "instruction", **settings}
    return read_instructions(DataSet(path=str(path), **fields), name="notes", split=split)


def test_instructions_read_alike_from_the_three_formats(tmp_path: Path) -> None:
    columns = {
        "instruction": ["What is it?", "Why, then?"],
        "input": ["", "a note"],
        "output": ["A cough.", 'He said "so".'],
    }
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    csv_file = write(
        tmp_path / "a.csv", 'instruction,input,output\nWhat is it?,,A cough.\n"Why, then?",a note,"He said ""so""."\n'
    )
    jsonl = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    parquet = write_parquet(tmp_path / "a.parquet", {"id": [1, 2], **columns})
    expected = Instructions([Instruction(**row) for row in rows], 0)
    assert taught(csv_file) == taught(jsonl) == taught(parquet) == expected


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_table_may_lack_an_input_unless_one_was_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        write_parquet(path, {"front": ["x"], "back": ["y"]})
    else:
        write(path, "front,back\nx,y\n" if ending == "csv" else '{"front": "x", "back": "y"}\n')
    named = {"instruction": "front", "output": "back"}
    assert taught(path, **named).rows == [Instruction("x", "", "y")]
    with pytest.raises(SiteConfigInvalid, match="no column 'context'; the columns are 'front', 'back'") as caught:
        taught(path, **named, input="context")
    assert "instruction, input and output" in caught.value.hint
    assert "front" not in without_content(caught.value)


def test_a_column_that_is_the_instruction_is_not_the_input_as_well(tmp_path: Path) -> None:
    card = '{"instruction": "Answer truthfully.", "input": "What is it?", "output": "A cough."}\n'
    path = write(tmp_path / "flashcards.jsonl", card)
    assert taught(path, instruction="input").rows == [Instruction("What is it?", "", "A cough.")]
    assert taught(path).rows == [Instruction("Answer truthfully.", "What is it?", "A cough.")]


def test_rows_without_an_instruction_or_an_output_are_skipped_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "instruction,output\nx,y\n,y\nx, \n\nz,w\n")
    found = taught(path)
    assert ([row.instruction for row in found.rows], found.skipped) == (["x", "z"], 3)
    with pytest.raises(SiteConfigInvalid, match=r"no usable rows for train \(1 rows, 1 skipped\)"):
        taught(write(tmp_path / "b.csv", "instruction,output\nx,\n"))


def test_an_output_that_is_no_text_is_named_with_its_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"instruction": "x", "output": "y"}\n{"instruction": "x", "output": 5}\n')
    with pytest.raises(SiteConfigInvalid, match="row 2: column 'output' holds int values") as caught:
        taught(path)
    assert "Set output under [data.notes]" in caught.value.hint
    undecodable = write(tmp_path / "a.csv", b"instruction,output\nx,caf\xe9\n")
    with pytest.raises(SiteConfigInvalid, match="row 1: column 'output' holds bytes that are not utf-8"):
        taught(undecodable)


def test_a_share_of_instructions_is_split_off_by_what_is_asked(tmp_path: Path) -> None:
    rows = [f"question {number % 50},note {number % 3},answer {number}\n" for number in range(300)]
    path = write(tmp_path / "a.csv", "instruction,input,output\n" + "".join(rows))
    train, held = taught(path, validation=0.2), taught(path, validation=0.2, split="validation")
    asked = [{(row.instruction, row.input) for row in part.rows} for part in (train, held)]
    assert len(train) + len(held) == 300
    assert held.rows
    assert asked[0].isdisjoint(asked[1])


def test_a_data_set_is_of_labels_or_of_instructions(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label,instruction,output\nx,yes,ask,tell\n")
    labels, instructions = DataSet(path=str(path), validation=0), DataSet(path=str(path), instruction="instruction")
    assert isinstance(read_any(labels, name="notes", split="train"), Rows)
    assert isinstance(read_any(instructions, name="notes", split="train"), Instructions)
    with pytest.raises(SiteConfigInvalid, match="no table of instructions, which this job needs"):
        read_instructions(labels, name="notes", split="train")
    with pytest.raises(SiteConfigInvalid, match="no table of texts and labels, which this job needs"):
        read_rows(instructions, name="notes", labels=None, split="train")
    with pytest.raises(ValueError, match="instruction and text describe two tables"):
        DataSet(path="a.csv", instruction="instruction", text="note")


def test_reading_rows_loads_no_model_library() -> None:
    script = "import sys, client_agent.training.data; print({'torch', 'transformers', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_texts_are_read_without_a_look_at_labels_and_counted_so_where_the_table_has_none(tmp_path: Path) -> None:
    content = [{"text": "a cough"}, {"text": " "}, {"text": "a fever", "label": 7}, {"text": "a dose"}]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in content))
    plain = DataSet(path=str(path), label="", validation=0.0)
    for data_set in (plain, DataSet(path=str(path), validation=0.0)):
        found = read_texts(data_set, name="notes", labels=LABELS, split="train")
        assert found == Rows(["a cough", "a fever", "a dose"], [0, 0, 0], LABELS, 1)
    assert len(read_any(plain, name="notes", split="train")) == 3
    assert "no table of texts and labels" in fault(path, label="").message


def test_texts_need_a_column_of_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "sentence\na cough\n")
    with pytest.raises(SiteConfigInvalid, match="no column 'text'") as caught:
        read_texts(DataSet(path=str(path), label=""), name="notes", labels=LABELS, split="train")
    assert caught.value.hint == "Set text under [data.notes] in site.toml to columns among these."
