from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from client_agent.taskdir import write_json
from deploy.lab.experiment import Experiment
from deploy.lab.holdings import MOST_LABELS, OTHERS, drawings, holding_of
from deploy.lab.outcomes import read
from deploy.lab.place import site_rows
from tests.unit.deploy.lab.grid_of_cells import metrics_of, write_grid


def grid_with_rows(
    folder: Path, *, labels: list[str], partition: dict[str, Any], sites: int = 3, named: bool = True,
    column: str = "label",
) -> Path:  # fmt: skip
    """A grid of one cell, with the table that its rows came from; the lab's file may name the column of labels."""
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": labels, column: labels}), folder / "rows.parquet")
    grid = write_grid(folder / "g", axes={"partition": ["skewed"], "seed": [5]},
                      of=lambda axes: metrics_of([0.5, 0.9], sites=sites, seed=5))  # fmt: skip
    rows = str(folder / "rows.parquet")
    data = {"rows": rows, "validation": rows, "columns": {"label": column} if named else {}}
    experiment = {"data": data, "partition": partition, "sites": sites}
    whole = Experiment.model_validate(experiment).model_dump(mode="json")
    write_json(grid / "cells" / "partition-skewed,seed-5" / "lab.json", {"experiment": whole})
    return grid


def test_who_holds_what_is_dealt_out_again_as_the_run_did(tmp_path: Path) -> None:
    partition = {"kind": "dirichlet", "by": "label", "alpha": 0.5}
    study = read([grid_with_rows(tmp_path / "a", labels=["no", "yes"] * 60, partition=partition)])
    ((drawing, holding),) = drawings(study)
    assert drawing.title == "Who holds what: skewed, 3 sites" and "seed 5" in drawing.says
    assert holding.labels == ("no", "yes") and holding.column == "label"
    experiment = {"data": {"rows": str(tmp_path / "a" / "rows.parquet"), "validation": "-"}, "partition": partition}
    dealt = site_rows(Experiment.model_validate({**experiment, "sites": 3}), seed=5)
    assert holding.counts == {
        site: tuple(sum(row["label"] == label for row in rows) for label in ("no", "yes"))
        for site, rows in dealt.items()
    }
    assert sum(map(sum, holding.counts.values())) == 120
    assert drawing.of(study, "#1F2328").axes[0].get_xlabel() == "label"


def test_labels_beyond_the_most_frequent_are_counted_together(tmp_path: Path) -> None:
    labels = [f"intent-{number:02}" for number in range(MOST_LABELS + 4)] * 10 + ["intent-00"]
    study = read([grid_with_rows(tmp_path / "a", labels=labels, partition={"kind": "uniform"})])
    holding = holding_of(study.done[0])
    assert holding is not None and len(holding.labels) == MOST_LABELS + 1 and holding.labels[-1] == OTHERS
    assert sum(own[-1] for own in holding.counts.values()) == 40


def test_labels_are_found_in_the_usual_column_where_the_lab_names_none(tmp_path: Path) -> None:
    grid = grid_with_rows(tmp_path / "a", labels=["no", "yes"] * 60, partition={"kind": "uniform"}, named=False)
    ((drawing, holding),) = drawings(read([grid]))
    assert holding.column == "label" and holding.labels == ("no", "yes")
    assert [sum(own) for own in holding.counts.values()] == [40, 40, 40]
    assert drawing.of(read([grid]), "#1F2328").axes[0].get_xlabel() == "label"


def test_rows_without_labels_are_bars_and_even_ones_are_not_drawn(tmp_path: Path) -> None:
    for kind, count in (("quantity", 1), ("uniform", 0)):
        labels, partition = ["no", "yes"] * 60, {"kind": kind}
        grid = grid_with_rows(tmp_path / kind, labels=labels, partition=partition, named=False, column="topic")
        study = read([grid])
        found = drawings(study)
        assert len(found) == count
        for drawing, holding in found:
            widths = [bar.get_width() for bar in drawing.of(study, "#1F2328").axes[0].patches]
            assert widths == [sum(own) for own in holding.counts.values()] and sum(widths) == 120


def test_where_the_rows_are_gone_nothing_is_drawn(tmp_path: Path) -> None:
    grid = grid_with_rows(tmp_path / "a", labels=["no", "yes"] * 60, partition={"kind": "uniform"})
    (tmp_path / "a" / "rows.parquet").unlink()
    assert drawings(read([grid])) == []
