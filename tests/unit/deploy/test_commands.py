"""Whatever command a deployment file or a README tells a person to type exists, with the options that it is given."""

from __future__ import annotations

import functools
import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
IMAGES = {"silotune-coordinator": "coordinator", "silotune-agent": "agent"}
PLACES = [
    *sorted((ROOT / "deploy/systemd").iterdir()),
    *sorted((ROOT / "deploy/containers").iterdir()),
    *sorted((ROOT / "deploy/prometheus").iterdir()),
    ROOT / "deploy/compose.yml",
    *sorted(ROOT.glob("*.md")),
    *sorted(
        path for room in ("protos", "coordinator", "client_agent", "deploy") for path in (ROOT / room).rglob("*.md")
    ),
]


@functools.cache
def help_of(script: str, *path: str) -> str:
    module, _, function = SCRIPTS[script].partition(":")
    command = getattr(importlib.import_module(module), function)
    shown = CliRunner().invoke(command, [*path, "--help"], prog_name=script)
    assert shown.exit_code == 0, f"`{script} {' '.join(path)} --help` fails: {shown.output[-500:]}"
    return shown.output


def check(line: list[str]) -> None:
    """`line` is a command with its words, for example ["silotune", "site", "invite", "st-olav", "--house"]."""
    script, words = line[0], line[1:]
    path: tuple[str, ...] = ()
    while re.search(r"^Commands:", help_of(script, *path), re.M) and len(path) < len(words):
        if words[len(path)].startswith("-"):
            break
        path = (*path, words[len(path)])
    said = help_of(script, *path)
    for word in words[len(path) :]:
        if word.startswith("--"):
            option = word.partition("=")[0]
            assert re.search(rf"{option}\b", said), f"`{script} {' '.join(path)}` has no option {option}"


def services() -> dict[str, list[str]]:
    """{service of compose.yml: the command that its image runs}."""
    compose = yaml.safe_load((ROOT / "deploy/compose.yml").read_text())
    return {name: [service["image"].partition(":")[0]] for name, service in compose["services"].items()}


def written_commands(text: str) -> list[list[str]]:
    """Commands in backticks, in fenced or indented code, and in the comments at the head of a file."""
    text = re.sub(r"^#(?=   )", " ", text, flags=re.M)
    text = re.sub(r"\\\n\s*", " ", text)
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    code = [line for block in fenced for line in block.splitlines()]
    code += [line for line in text.splitlines() if line.startswith("    ")]
    code += re.findall(r"`([^`\n]+)`", text)
    code += [line.partition("=")[2] for line in text.splitlines() if line.startswith("ExecStart=")]
    found = []
    for line in code:
        line = re.sub(r"\s+#.*", "", line.strip()).removeprefix("sudo -u silotune ")
        for service, command in services().items():
            line = re.sub(rf"^docker compose run (--rm )?{service}\b", command[0], line)
        match = re.search(r"(?:^|[/ $])(silotune(?:-coordinator|-agent)?)( .*|$)", line)
        if match and not re.match(r"(useradd|cp|pip|docker build|class|from|import)\b", line):
            words = [word for word in shlex.split(match[2], posix=False) if word not in ("...", "[", "]")]
            found.append([match[1], *words])
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_explains_itself(script: str) -> None:
    assert "Usage:" in help_of(script)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: str(place.relative_to(ROOT)))
def test_every_command_in_a_file_exists(place: Path) -> None:
    for line in written_commands(place.read_text()):
        check(line)


def test_commands_are_found_where_they_are_written() -> None:
    """The check above would be content with a file in which it finds nothing."""
    assert len(written_commands((ROOT / "deploy/compose.yml").read_text())) >= 7
    for path in sorted((ROOT / "deploy/systemd").iterdir()):
        assert len(written_commands(path.read_text())) >= 2, path
    with pytest.raises(AssertionError):
        check(["silotune-coordinator", "serve", "--no-such-option"])


@pytest.mark.parametrize("image", IMAGES.items(), ids=lambda image: image[1])
def test_what_an_image_starts_exists(image: tuple[str, str]) -> None:
    script, name = image
    text = (ROOT / f"deploy/containers/{name}.Dockerfile").read_text()
    entry = re.search(r"^ENTRYPOINT (\[.*\])$", text, re.M)
    default = re.search(r"^CMD (\[.*\])$", text, re.M)
    assert entry and default
    assert yaml.safe_load(entry[1]) == [script]
    check([script, *yaml.safe_load(default[1])])


def test_what_a_service_starts_exists() -> None:
    compose = yaml.safe_load((ROOT / "deploy/compose.yml").read_text())
    for name, command in services().items():
        check([*command, *compose["services"][name]["command"]])
