"""The images: well-formed, small in rights, and built from what the repository really has."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILES = sorted((ROOT / "deploy/containers").glob("*.Dockerfile"))
TOOLS = Path(sys.executable).parent
by_name = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, rest) in order; continued lines are one."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.M)
    joined = re.sub(r"\\\n\s*", " ", text)
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def test_there_is_an_image_for_each_side() -> None:
    assert [path.stem for path in DOCKERFILES] == ["agent", "coordinator"]


@by_name
def test_the_linter_finds_nothing(path: Path) -> None:
    done = subprocess.run([TOOLS / "hadolint", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@by_name
def test_the_base_can_be_replaced_and_no_frontend_is_fetched(path: Path) -> None:
    steps = instructions(path)
    assert steps[0] == ("ARG", "BASE_IMAGE=python:3.11-slim")
    assert all(rest.startswith("${BASE_IMAGE}") for name, rest in steps if name == "FROM")
    assert "syntax=" not in path.read_text()


@by_name
def test_it_runs_as_a_numbered_user_without_rights(path: Path) -> None:
    """A number, because Kubernetes' runAsNonRoot cannot judge a name."""
    users = [rest for name, rest in instructions(path) if name == "USER"]
    assert users == ["10001:10001"]


@by_name
def test_it_says_whether_it_is_well(path: Path) -> None:
    checks = [rest for name, rest in instructions(path) if name == "HEALTHCHECK"]
    assert len(checks) == 1 and "/healthz" in checks[0]


@by_name
def test_it_installs_one_extra_with_the_tested_versions(path: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installs = [rest for name, rest in instructions(path) if name == "RUN" and "pip install" in rest]
    assert len(installs) == 1
    # Another one with --build-arg: the lab's image has both sides.
    assert f"EXTRAS={path.stem}" in [rest for name, rest in instructions(path) if name == "ARG"]
    assert "-c constraints.txt" in installs[0] and '".[${EXTRAS}]"' in installs[0]
    assert path.stem in extras


def test_the_build_context_holds_what_the_install_needs_and_no_tests() -> None:
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    assert kept == {
        "pyproject.toml",
        "constraints.txt",
        "README.md",
        "LICENSE",
        "protos",
        "coordinator",
        "client_agent",
        "deploy",
    }
    assert all((ROOT / name).exists() for name in kept)


def test_the_build_context_holds_what_the_lab_imports_and_makes_models_of() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().split("\n") if line.startswith("deploy/")]
    imported = "".join(path.read_text() for path in (ROOT / "deploy/lab").glob("*.py"))
    assert "from deploy.data." in imported
    assert not [path for path in ignored if f"from {path.replace('/', '.')}" in imported]


def test_what_the_recipes_take_from_a_package_can_be_in_the_image_of_the_lab() -> None:
    wanted = {
        package
        for path in (ROOT / "deploy/recipes").glob("*/lab*.toml")
        for package in re.findall(r'"package:([^/"]+)', path.read_text())
    }
    (encoder,) = re.findall(r"ENCODER=(\S+)==", (ROOT / "deploy/kubernetes/lab.yaml").read_text())
    assert wanted == {encoder.replace("-", "_")}
    assert "ENCODER=" in [rest for name, rest in instructions(DOCKERFILES[0]) if name == "ARG"]


def test_every_declared_dependency_has_its_tested_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = sum(project["optional-dependencies"].values(), start=list(project["dependencies"]))
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.M)
    names = {re.split(r"[\[<>=]", requirement)[0] for requirement in declared}
    assert {name.lower().replace("-", "_") for name in names} <= {name.lower().replace("-", "_") for name in pinned}


COMPOSE = ROOT / "deploy/compose.yml"


@pytest.fixture(scope="module")
def compose() -> dict[str, dict]:
    return yaml.safe_load(COMPOSE.read_text())


def test_compose_follows_the_specification() -> None:
    tool = [TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE]
    done = subprocess.run(tool, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_has_a_coordinator_and_two_sites(compose: dict[str, dict]) -> None:
    assert set(compose["services"]) == {"coordinator", "site-a", "site-b"}
    assert "version" not in compose


def test_compose_names_the_images_of_this_version(compose: dict[str, dict]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert all(service["image"].endswith(f":{version}") for service in compose["services"].values())


def test_every_service_is_small_in_rights_and_checked(compose: dict[str, dict]) -> None:
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert "/healthz" in service["healthcheck"]["test"][-1], name
        assert not service.get("privileged") and "environment" not in service, name
        assert (COMPOSE.parent / service["build"]["context"] / service["build"]["dockerfile"]).is_file(), name


def test_sites_wait_for_a_healthy_coordinator_and_listen_nowhere(compose: dict[str, dict]) -> None:
    for name in ("site-a", "site-b"):
        site = compose["services"][name]
        assert site["depends_on"] == {"coordinator": {"condition": "service_healthy"}}
        assert "ports" not in site


def test_what_must_last_lies_in_named_volumes_and_data_is_read_only(compose: dict[str, dict]) -> None:
    used = set()
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source, target, *mode = volume.split(":")
            if target == "/data":
                used.add(source)
            else:
                assert mode == ["ro"], volume
    assert used == set(compose["volumes"])


def test_the_published_ports_are_those_of_the_coordinator(compose: dict[str, dict]) -> None:
    exposed = [rest.split() for name, rest in instructions(DOCKERFILES[1]) if name == "EXPOSE"]
    published = [port.split(":")[1] for port in compose["services"]["coordinator"]["ports"]]
    assert exposed == [published]
