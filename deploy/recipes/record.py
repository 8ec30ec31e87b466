"""The records of a recipe: the cells of its grids that are done, as CSV beside it, from which its README is filled.

    python -m deploy.recipes.record FOLDER --from GRID_DIR... --name NAME    records, and fills
    python -m deploy.recipes.record FOLDER                                   fills (deploy/recipes/tables.py)

FOLDER/results/NAME.csv has for each cell the digests of its plan (recipe, data, model, partition) and of its recipe,
its seed, figures and versions, and the digest of the file in which the house agent kept what it said of each test row
(OUT/cells/CELL/agents/house/predictions). A cell takes the place of one of its name that is recorded
already; of two in folders that are named together, the first that is done is taken.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.lab.grid import read_grid
from deploy.lab.outcomes import AXES, Cell, read
from deploy.lab.place import HOUSE, PREDICTIONS
from deploy.lab.run import AGENTS
from deploy.recipes.tables import FIGURES, PAGE, RESULTS, read_record, refilled
from protos.digests import digest_of
from protos.errors import InvalidInput, SilotuneError

COLUMNS = ("cell", *AXES, "plan", "config_hash", "metric", *FIGURES, "left_out", "predictions", "versions")
# As many digits as tell two runs apart.
SHORT = ".6g"


def record(folder: Path, *, grids: Sequence[Path], name: str) -> Path:
    """Writes the cells of `grids` that are done into the folder's record of that name; its path."""
    path = folder / RESULTS / f"{name}.csv"
    cells: dict[str, dict[str, Any]] = {row["cell"]: dict(row) for row in read_record(path)} if path.exists() else {}
    # Together, because the non-federated cell of one may be another's.
    study = read(grids)
    plans = {entry["name"]: entry.get("plan") for grid in reversed(grids) for entry in read_grid(grid) or ()}
    for cell, row in zip(study.cells, study.rows, strict=True):
        if cell.is_done:
            found = {**row, "plan": plans[cell.name], "predictions": _predictions(cell)}
            cells[cell.name] = {column: _short(found.get(column)) for column in COLUMNS}
    if not cells:
        raise InvalidInput("None of these grids has a cell that is done.")
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        columns = [column for column in COLUMNS if any(cell.get(column) for cell in cells.values())]
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(cells.values())
    return path


def _short(value: Any) -> str:
    return "" if value is None else f"{value:{SHORT}}" if isinstance(value, float) else str(value)


def _predictions(cell: Cell) -> str | None:
    """The digest of what the tested version said of each row, where the cell still has it."""
    kept = next((cell.folder / AGENTS / HOUSE / PREDICTIONS).glob("*-test.parquet"), None)
    return digest_of(kept.read_bytes()) if kept else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="Of a recipe.")
    parser.add_argument("--from", dest="grids", type=Path, nargs="+", default=[], metavar="GRID_DIR")
    parser.add_argument("--name", help="Of the record: FOLDER/results/NAME.csv.")
    arguments = parser.parse_args()
    if bool(arguments.grids) != bool(arguments.name):
        parser.error("--from and --name go together.")
    page = arguments.folder / PAGE
    try:
        if arguments.grids:
            print(record(arguments.folder, grids=arguments.grids, name=arguments.name))
        page.write_text(refilled(page.read_text(), folder=arguments.folder))
    except (SilotuneError, FileNotFoundError) as error:
        sys.exit(str(error))
    print(page)


if __name__ == "__main__":
    main()
