"""What a classifier said of each held-out row, kept at the site where its site.toml says so.

    [data.answers]
    predictions = "predictions"       # a directory, seen from site.toml

Each evaluation writes JOB-version-V-SPLIT.parquet there, with the columns row (its place among the split's usable
rows, from 0), right and predicted (labels of the recipe) and probability (of the predicted one). Nothing of it leaves
the site: it is what two versions, or two runs, are compared by, row by row.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet

from client_agent.taskdir import TaskSpec, sync
from client_agent.training.classification import TextClassification
from client_agent.training.evaluate import Predicted
from client_agent.training.kinds import Kind

FILE = "{job}-version-{version}-{split}.parquet"


class Predictions:
    def __init__(self, task: TaskSpec, kind: Kind, *, writes: bool) -> None:
        """Keeps nothing where the data set does not ask for it, and of other tasks than a classification. Of several
        processes one `writes`."""
        self._task, self._found = task, list[tuple[int, str, str, float]]()
        self._labels = kind.labels if isinstance(kind, TextClassification) else ()
        self._directory = (task.data_set or {}).get("predictions") if writes and self._labels else None

    def add(self, seen: Predicted) -> None:
        if self._directory is None:
            return
        best = seen.logits.float().softmax(dim=-1).max(dim=-1)
        columns = (seen.rows, seen.targets, best.indices, best.values)
        for row, right, predicted, probability in zip(*(column.tolist() for column in columns), strict=True):
            self._found.append((row, self._labels[right], self._labels[predicted], probability))

    def write(self) -> None:
        """Whole or not at all; an evaluation that is repeated replaces what it wrote before."""
        if self._directory is None:
            return
        directory = Path(self._directory)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / FILE.format(job=self._task.job_id, version=self._task.round, split=self._task.split)
        names = ("row", "right", "predicted", "probability")
        rows = [dict(zip(names, found, strict=True)) for found in sorted(self._found)]
        temporary = path.with_suffix(".new")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), temporary, compression="zstd")
        sync(temporary)
        temporary.rename(path)
