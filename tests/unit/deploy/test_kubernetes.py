"""The Kubernetes manifests against the API's own schemas; no cluster is at hand, so nothing is applied."""

from __future__ import annotations

from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from coordinator.settings import Settings

DIRECTORY = Path(__file__).parents[3] / "deploy" / "kubernetes"
OBJECTS = list(yaml.safe_load_all((DIRECTORY / "coordinator.yaml").read_text()))


GRID = yaml.safe_load((DIRECTORY / "lab.yaml").read_text())


@pytest.mark.parametrize("manifest", [*OBJECTS, GRID], ids=lambda manifest: manifest["kind"])
def test_a_manifest_is_valid(manifest: dict) -> None:
    kubernetes_validate.validate(manifest, "1.33", strict=True)


def test_the_schema_check_finds_a_misspelt_field() -> None:
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**OBJECTS[0], "spec": {"replcias": 3}}, "1.33", strict=True)


def test_the_settings_that_the_instructions_name_exist() -> None:
    said = (DIRECTORY / "kustomization.yaml").read_text()
    for table, key in (("listen", "http_address"), ("storage", "database"), ("storage", "blobs"),
                       ("storage", "s3_endpoint_url")):  # fmt: skip
        assert f"{key} = " in said
        assert key in Settings.model_fields[table].annotation.model_fields  # type: ignore[union-attr]


def test_a_coordinator_runs_without_root_or_any_capability() -> None:
    pod = OBJECTS[0]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    for container in (*pod["initContainers"], *pod["containers"]):
        rights = container["securityContext"]
        assert rights["readOnlyRootFilesystem"] is True and rights["allowPrivilegeEscalation"] is False
        assert rights["capabilities"]["drop"] == ["ALL"]


def test_the_pods_of_a_grid_share_out_its_cells() -> None:
    (container,) = GRID["spec"]["template"]["spec"]["containers"]
    assert f"$((JOB_COMPLETION_INDEX + 1))/{GRID['spec']['completions']}" in container["args"][0]
