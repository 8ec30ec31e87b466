"""The generated code in protos/v1 is what its .proto files say, for the generator that constraints.txt pins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROTOS = sorted(path.relative_to(ROOT) for path in (ROOT / "protos/v1").glob("*.proto"))


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("regenerated")
    outputs = [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", *outputs, *map(str, PROTOS)]
    subprocess.run(command, cwd=ROOT, check=True)
    return target / "protos/v1"


def generated(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir() if "_pb2" in path.name and path.is_file()}


def test_the_generated_files_are_those_of_the_proto_files(regenerated: Path) -> None:
    assert set(generated(ROOT / "protos/v1")) == set(generated(regenerated)), "run `make protos`"


@pytest.mark.parametrize("proto", PROTOS, ids=lambda proto: proto.stem)
def test_the_generated_code_is_fresh(proto: Path, regenerated: Path) -> None:
    fresh, here = generated(regenerated), generated(ROOT / "protos/v1")
    for name in (f"{proto.stem}_pb2.py", f"{proto.stem}_pb2.pyi", f"{proto.stem}_pb2_grpc.py"):
        assert here[name] == fresh[name], f"{name} is stale: run `make protos`"
