from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from client_agent.taskdir import write_json
from deploy.lab.report import drops, summary, unusual, write_report
from protos.errors import InvalidInput


def metrics_of(losses: list[float], *, medqa: list[tuple[float, float]] = ()) -> dict[str, Any]:  # type: ignore[assignment]
    """metrics.json of a run with these held-out losses; `medqa` are (unparseable, accuracy of what can be read)."""
    rounds = [
        {"number": number, "train_loss": 2.0, "learning_rate": 1e-3, "seconds": {"total": 1.5}, "bytes_up": 1_000_000,
         "bytes_down": 2_000_000, "updates": [{}, {}]}
        for number in range(len(losses))
    ]  # fmt: skip
    measured = [{"loss": loss} for loss in losses]
    for entry, (unparseable, readable) in zip(measured, medqa, strict=False):
        entry |= {"medqa_unparseable": unparseable, "medqa_parseable_accuracy": readable}
        entry |= {"medqa_accuracy": (1 - unparseable) * readable, "medqa_questions": 1273.0}
    return {
        "rows": {"a": 10, "b": 20},
        "spec": {"evaluation": {"metric": "loss"}},
        "initial": rounds[0],
        "rounds": rounds[1:],
        "evaluations": [
            {"version": version, "site": "house", "split": "validation", "metrics": entry}
            for version, entry in enumerate(measured)
        ],
    }


def test_a_row_of_the_table_has_the_best_round_and_all_bytes() -> None:
    row = summary(metrics_of([4.0, 3.0, 3.5]))
    assert (row["first"], row["best"], row["last"]) == (4.0, (1, 3.0), 3.5)
    assert (row["bytes_up"], row["bytes_down"], row["rounds"], row["sites"]) == (3_000_000, 6_000_000, 2, 2)


def test_a_drop_after_the_best_round_is_split_into_format_and_knowledge() -> None:
    """The study's own figures for MedQA: 3 and 153 of 1,273 answers could not be read."""
    (drop,) = drops(metrics_of([4, 3, 3], medqa=[(0.5, 0.5), (3 / 1273, 0.6165), (153 / 1273, 0.5920)]))
    assert drop["best"][0] == 1 and drop["last"][0] == 2
    assert drop["last"][1] - drop["best"][1] == pytest.approx(drop["format"] + drop["knowledge"])
    assert drop["format"] == pytest.approx(-0.0712, abs=1e-4) and drop["knowledge"] == pytest.approx(-0.0231, abs=2e-4)


def test_several_runs_are_drawn_beside_each_other_on_one_page(tmp_path: Path) -> None:
    for name, losses in (("new", [4.0, 3.5, 3.0]), ("same", [4.0, 3.6, 4.2])):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "metrics.json", metrics_of(losses))
    page = write_report([tmp_path / "new", tmp_path / "same"], out=tmp_path / "both", title="<the trap>").read_text()
    assert {path.stem for path in (tmp_path / "both" / "plots").iterdir()} >= {"training_loss", "held_out_loss"}
    assert "3.6000 (round 1)" in page and "&lt;the trap&gt;" in page
    assert page.startswith("<!doctype html>") and page.count("data:image/png") == 4


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"holds no metrics\.json"):
        write_report([tmp_path], out=tmp_path)


def test_a_run_whose_version_0_is_on_its_way_has_a_row() -> None:
    row = summary({**metrics_of([4.0]), "initial": None, "rounds": [], "evaluations": []})
    assert (row["rounds"], row["first"], row["bytes_up"]) == (0, None, 0)


def test_the_page_says_which_sites_a_rule_left_out_and_which_rounds_were_not_distilled(tmp_path: Path) -> None:
    found = metrics_of([4.0, 3.0, 3.5])
    for number, entry in enumerate(found["rounds"], start=1):
        entry["undistilled"] = "house declined: <no teacher>" if number == 2 else ""
        entry["metrics"] = {
            "update_norm.a": 1.0, "update_norm.b": 9.0, "update_cosine.a": 0.5, "update_cosine.b": -0.5,
            "update_norm_z.b": 2.0 * number, "update_coefficient.a": 1.0, "update_coefficient.b": 0.5 * (number - 1),
        }  # fmt: skip
    assert unusual(found) == [
        {"site": "a", "rounds": 2, "left_out": 0, "weight": 1.0, "against": 0, "outlying": 0},
        {"site": "b", "rounds": 2, "left_out": 1, "weight": 0.25, "against": 2, "outlying": 1},
    ]
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "metrics.json", found)
    page = write_report([tmp_path / "run"], out=tmp_path / "run").read_text()
    assert page.count("not distilled: house declined: &lt;no teacher&gt;") == 1
    assert "<td>b</td><td>2</td>\n<td>1</td><td>0.250</td>" in page


def test_a_rule_that_takes_coordinates_gives_sites_no_weights(tmp_path: Path) -> None:
    found = metrics_of([4.0, 3.0])
    found["rounds"][0]["metrics"] = {"update_norm.a": 1.0, "update_cosine.a": 0.5}
    assert unusual(found)[0]["weight"] is None
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "metrics.json", found)
    assert "<td>a</td><td>1</td>\n<td></td><td></td>" in write_report([tmp_path / "run"], out=tmp_path).read_text()
