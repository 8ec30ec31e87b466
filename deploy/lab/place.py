"""What each site of an experiment gets before it begins: rows, site.toml, certificate and the base model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from client_agent import identity
from client_agent.home import Home
from client_agent.models import Models
from client_agent.taskdir import write_json
from coordinator.client import OperatorClient
from deploy.data.make_samples import write
from deploy.lab.attack import FILE as ATTACK
from deploy.lab.experiment import Experiment, LabData
from deploy.lab.partition import Row, split
from protos.identity import JoinToken
from protos.jobspec import JobSpec
from protos.v1 import operator_pb2

HOUSE = "house"
ROWS = "rows.parquet"
# Below the house agent's home: what each version that was measured says of each row.
PREDICTIONS = "predictions"
TOKEN_SECONDS = 3600.0


def site_rows(experiment: Experiment, *, seed: int) -> dict[str, list[Row]]:
    """The rows of each site by its name; empty where the task reads none."""
    if experiment.data is None:
        return {f"site-{number + 1:02}": [] for number in range(experiment.sites)}
    _, rows = _sliced(experiment.data, seed=seed)
    return split(rows, partition=experiment.partition, sites=experiment.sites, seed=seed)


def _sliced(data: LabData, *, seed: int) -> tuple[list[Row], list[Row]]:
    """The rows that the house agent takes for itself, and those that the sites share."""
    rows = pyarrow.parquet.read_table(data.rows).slice(0, data.limit).to_pylist()
    taken = round(len(rows) * data.slice_share)
    if not taken:
        return [], rows
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[row] for row in order[:taken]], [rows[row] for row in order[taken:]]


def site_tomls(experiment: Experiment, spec: JobSpec, *, threads: int) -> tuple[str, str]:
    """site.toml of a site, and of the house agent."""
    if experiment.data is None or spec.data is None:
        return _toml({}, threads=threads), _toml({}, threads=threads)
    own = {"path": ROWS, "validation": experiment.data.site_validation, **experiment.data.columns}
    return _toml({spec.data.name: own}, threads=threads), _toml(_house(experiment.data, spec), threads=threads)


def _house(data: LabData, spec: JobSpec) -> dict[str, Mapping[str, Any]]:
    assert spec.data is not None
    # Where it has no rows of its own to train on, nothing ever reads what stands in their place (see plan.py).
    own = ROWS if data.slice_share else data.slice or data.validation
    held_out = {"path": own, "validation": data.validation, "test": data.test, **data.columns}
    held_out["predictions"] = PREDICTIONS
    held_out = {key: value for key, value in held_out.items() if value is not None}
    questions = {name: {"path": path, "question": "question"} for name, path in data.benchmarks.items()}
    return {spec.data.name: held_out, **questions}


def _toml(data_sets: Mapping[str, Mapping[str, Any]], *, threads: int) -> str:
    # Whoever runs an experiment has written its recipe too.
    lists = ("tasks", "base_models", "data_sets", "methods")
    policy: dict[str, Any] = {**{name: ["*"] for name in lists}, "max_epochs": 1000}
    tables: dict[str, dict[str, Any]] = {"device": {"threads": threads}, "policy": policy}
    tables |= {f"data.{name}": dict(keys) for name, keys in data_sets.items()}
    # A JSON text is a TOML text too.
    return "\n".join(
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
        for name, keys in tables.items()
    )


def place(
    homes: Path, *, experiment: Experiment, spec: JobSpec, seed: int, threads: int, models: Mapping[str, Path],
    client: OperatorClient, coordinator: str,
) -> dict[str, int]:  # fmt: skip
    """Enrolls every site and the house agent in a home below `homes`; the number of rows by site."""
    sites = site_rows(experiment, seed=seed)
    rows = {**sites, HOUSE: _sliced(experiment.data, seed=seed)[0] if experiment.data else []}
    attackers = experiment.attack.by(list(sites), seed=seed) if experiment.attack else set()
    own, house = site_tomls(experiment, spec, threads=threads)
    registry: Path | None = None
    for name in rows:
        home = Home(homes / name)
        home.create()
        _enroll(home, name=name, client=client, coordinator=coordinator)
        if rows[name]:
            write(home.path / ROWS, rows[name], columns=tuple(rows[name][0]))
        if registry is not None:
            # Reading a large model anew for every site would take longer than the experiment.
            shutil.copyfile(registry, home.models_file)
        elif models:
            for base_model, directory in models.items():
                Models(home.models_file).add(base_model, directory)
            registry = home.models_file
        if name in attackers:
            assert experiment.attack is not None
            write_json(home.path / ATTACK, experiment.attack.model_dump())
        (home.path / "site.toml").write_text(house if name == HOUSE else own)
    return {name: len(found) for name, found in sites.items()}


def _enroll(home: Home, *, name: str, client: OperatorClient, coordinator: str) -> None:
    request = operator_pb2.InviteSiteRequest(name=name, house=name == HOUSE, valid_seconds=TOKEN_SECONDS)
    token = JoinToken.decode(client.ask("InviteSite", request).token)
    identity.enroll(home.identity, token=token, coordinator=coordinator)
