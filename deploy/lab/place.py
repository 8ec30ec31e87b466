"""What each site of an experiment gets before it begins: rows, site.toml, certificate and the base model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet

from client_agent import identity
from client_agent.home import Home
from client_agent.models import Models
from coordinator.client import OperatorClient
from deploy.data.make_samples import write
from deploy.lab.experiment import Experiment, LabData
from deploy.lab.partition import Row, split
from protos.identity import JoinToken
from protos.jobspec import JobSpec
from protos.v1 import operator_pb2

HOUSE = "house"
ROWS = "rows.parquet"
TOKEN_SECONDS = 3600.0


def site_rows(experiment: Experiment, *, seed: int) -> dict[str, list[Row]]:
    """The rows of each site by its name; empty where the task reads none."""
    if experiment.data is None:
        return {f"site-{number + 1:02}": [] for number in range(experiment.sites)}
    table = pyarrow.parquet.read_table(experiment.data.rows).to_pylist()
    return split(table, partition=experiment.partition, sites=experiment.sites, seed=seed)


def site_tomls(experiment: Experiment, spec: JobSpec, *, threads: int) -> tuple[str, str]:
    """site.toml of a site, and of the house agent."""
    if experiment.data is None or spec.data is None:
        return _toml({}, threads=threads), _toml({}, threads=threads)
    own = {"path": ROWS, "validation": 0.0, **experiment.data.columns}
    return _toml({spec.data.name: own}, threads=threads), _toml(_house(experiment.data, spec), threads=threads)


def _house(data: LabData, spec: JobSpec) -> dict[str, Mapping[str, Any]]:
    assert spec.data is not None
    held_out = {"path": data.validation, "validation": data.validation, "test": data.test, **data.columns}
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
    homes: Path, *, experiment: Experiment, spec: JobSpec, seed: int, threads: int, model: Path | None,
    client: OperatorClient, coordinator: str,
) -> dict[str, int]:  # fmt: skip
    """Enrolls every site and the house agent in a home below `homes`; the number of rows by site."""
    rows = site_rows(experiment, seed=seed)
    own, house = site_tomls(experiment, spec, threads=threads)
    registry: Path | None = None
    for name in (*rows, HOUSE):
        home = Home(homes / name)
        home.create()
        _enroll(home, name=name, client=client, coordinator=coordinator)
        if rows.get(name):
            write(home.path / ROWS, rows[name], columns=tuple(rows[name][0]))
        if model is not None and spec.base_model is not None:
            if registry is None:
                Models(home.models_file).add(spec.base_model.name, model)
                registry = home.models_file
            else:
                # Reading a large model anew for every site would take longer than the experiment.
                shutil.copyfile(registry, home.models_file)
        (home.path / "site.toml").write_text(house if name == HOUSE else own)
    return {name: len(found) for name, found in rows.items()}


def _enroll(home: Home, *, name: str, client: OperatorClient, coordinator: str) -> None:
    request = operator_pb2.InviteSiteRequest(name=name, house=name == HOUSE, valid_seconds=TOKEN_SECONDS)
    token = JoinToken.decode(client.ask("InviteSite", request).token)
    identity.enroll(home.identity, token=token, coordinator=coordinator)
