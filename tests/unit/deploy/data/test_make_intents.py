from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet

from deploy.data import make_intents
from deploy.data.make_intents import CLINC150, COLUMNS
from deploy.data.make_samples import write

SHIPPED = Path(make_intents.__file__).parent / CLINC150
FILES = ("train", "validation", "test", "base")
ALL_TESTED = "test_all"


def read(path: Path) -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(path).to_pylist()


def test_no_sentence_is_in_two_files_and_domains_have_equal_shares(tmp_path: Path) -> None:
    rows = [
        {"text": f"{domain} sentence {number // 2}", "label_name": f"intent {number % 3}", "client": domain}
        for domain in ("home", "travel")
        for number in range(2000)
    ]
    write(tmp_path / "source" / "train.parquet", rows, columns=tuple(rows[0]))
    # Half of the test rows are training rows too.
    write(tmp_path / "source" / "test.parquet", rows[:100] + rows[2000:2400], columns=tuple(rows[0]))
    first, second = (make_intents.make(tmp_path / "source", out=tmp_path / name) for name in ("a", "b"))
    assert first == second
    found = {name: read(tmp_path / "a" / f"{name}.parquet") for name in FILES}
    sentences = [row["text"] for rows in found.values() for row in rows]
    assert len(sentences) == len(set(sentences))
    assert Counter(row["label"] for row in found["train"]) == {"home": 200, "travel": 200}
    assert set(found["base"][0]) == {"text"}
    tested = [row["text"] for row in read(tmp_path / "a" / f"{ALL_TESTED}.parquet")]
    assert {row["text"] for row in found["test"]} < set(tested) and len(tested) == len(set(tested))
    assert not set(tested) & {row["text"] for name in ("train", "validation", "base") for row in found[name]}
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in first)


def test_what_is_shipped_is_what_its_page_says() -> None:
    page = (SHIPPED / "README.md").read_text()
    for name in (*FILES, ALL_TESTED):
        rows = read(SHIPPED / f"{name}.parquet")
        assert f"| `{name}.parquet` | {len(rows)} |" in page
        assert name == "base" or tuple(rows[0]) == COLUMNS
    assert all(f"`{label}`" in page for label in {row["label"] for row in read(SHIPPED / "test.parquet")})
    assert sum(path.stat().st_size for path in SHIPPED.glob("*.parquet")) < 400_000
    assert "CC BY 3.0" in (SHIPPED / "LICENSE").read_text()
