"""Who takes part: the institutes of the shipped sample, and the operator's own agent with the held-out rows.

An institute's rows are copied into its agent's own home, beside its site.toml: no other process of the federation ever
opens them. The baselines are the one exception, because to pool the rows is their point.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

from client_agent.settings import DataSet
from client_agent.training.data import Rows, read_rows
from deploy.data.make_medquad import SITES, TEST, VALIDATION

SAMPLE = Path(__file__).parents[1] / "data" / "medquad"
DATA_SET = "answers"
HOUSE = "house"
BASE_MODEL = "minilm"

_POLICY = f"""
[device]
name = "cpu"
threads = 1            # all institutes share one machine here

[policy]               # what jobs may do at this site; anything else is declined
tasks = ["classification"]
base_models = ["{BASE_MODEL}"]
data_sets = ["{DATA_SET}"]
methods = ["full", "lora"]
max_epochs = 5

[http]
address = "{{http}}"
"""
_SITE = f"""\
[data.{DATA_SET}]
path = "answers.parquet"
text = "text"
label = "label"
validation = 0.0       # this job is measured by the house agent, so every row here can train
"""
_HOUSE = f"""\
[data.{DATA_SET}]        # held out: no institute has a row about any of these conditions
path = "validation.parquet"
validation = "validation.parquet"
test = "test.parquet"
"""
SITE_TOML = _SITE + _POLICY
HOUSE_TOML = _HOUSE + _POLICY


def names() -> list[str]:
    """The institutes, in name order."""
    return sorted(path.stem for path in (SAMPLE / SITES).glob("*.parquet"))


def place_rows(name: str, *, home: Path) -> None:
    """Copies what `name` holds into its agent's home."""
    if name == HOUSE:
        for file in (VALIDATION, TEST):
            shutil.copyfile(SAMPLE / file, home / Path(file).name)
    else:
        shutil.copyfile(SAMPLE / SITES / f"{name}.parquet", home / "answers.parquet")


def site_rows(name: str, *, labels: tuple[str, ...]) -> Rows:
    """The training rows of one institute."""
    return _rows(f"{SITES}/{name}.parquet", labels=labels)


def held_out_rows(file: str, *, labels: tuple[str, ...]) -> Rows:
    """The house agent's rows: `file` is VALIDATION or TEST."""
    return _rows(file, labels=labels)


def label_counts(rows: Rows) -> dict[str, int]:
    """Rows by label, labels without a row included."""
    counted = Counter(rows.labels)
    return {name: counted[number] for number, name in enumerate(rows.label_names)}


def _rows(file: str, *, labels: tuple[str, ...]) -> Rows:
    data_set = DataSet(path=str(SAMPLE / file), validation=0.0)
    return read_rows(data_set, name=DATA_SET, labels=labels, split="train")
