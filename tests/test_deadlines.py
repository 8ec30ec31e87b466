"""Every remote call has a deadline: a stopped server answers nothing, and keepalive notices only a dead connection.

The sources are walked for the ways in which a gRPC call can be made here; a new call without a timeout fails.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from protos.v1 import agent_pb2, operator_pb2, transfer_pb2

ROOT = Path(__file__).resolve().parents[1]
METHODS = {
    method.name
    for module in (agent_pb2, operator_pb2, transfer_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
} | {"Check", "Watch"}
KINDS = {"unary_unary", "unary_stream", "stream_unary", "stream_stream"}
# It gives whatever it is handed a deadline; its own call of it is seen below like any other.
CALLER = "rpc.call"


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, bool]]:
    """Each remote call in the source, and whether it has a deadline."""
    made = {name.id for node in ast.walk(tree) if _makes_a_call(node) for name in _targets(node)}
    handed = {id(argument) for node in ast.walk(tree) if _is_caller(node) for argument in node.args}
    functions = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        called = id(node) in functions and (
            _is_multi_callable(node) or (isinstance(node, ast.Name) and node.id in made)
        )
        remote = called or _is_method(node)
        if remote and id(node) not in handed:
            call = functions.get(id(node))
            has = call is not None and any(
                word.arg == "timeout" and ast.unparse(word.value) != "None" for word in call.keywords
            )
            yield (call or ast.Call(node, [], [], lineno=node.lineno)), has
        elif remote:
            yield ast.Call(node, [], [], lineno=node.lineno), True


def _is_method(node: ast.AST) -> bool:
    """`stub.Heartbeat`, or `getattr(stub, method)` whatever the method."""
    if isinstance(node, ast.Attribute):
        return node.attr in METHODS and "stub" in ast.unparse(node.value).lower()
    is_getattr = isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr"
    return is_getattr and "stub" in ast.unparse(node.args[0]).lower()


def _makes_a_call(node: ast.AST) -> bool:
    """`read = channel.unary_stream(...)`."""
    return isinstance(node, ast.Assign | ast.AnnAssign) and _is_multi_callable(node.value)


def _is_multi_callable(node: ast.AST | None) -> bool:
    """`channel.unary_stream(...)`."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in KINDS


def _targets(node: ast.AST) -> list[ast.Name]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target for target in targets if isinstance(target, ast.Name)]


def _is_caller(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == CALLER


def without_deadline(source: str) -> list[int]:
    return [call.lineno for call, has in calls(ast.parse(source)) if not has]


def sources() -> list[Path]:
    rooms = ("client_agent", "coordinator", "deploy")
    return [path for room in rooms for path in sorted((ROOT / room).rglob("*.py")) if "grpc" in path.read_text()]


def test_every_remote_call_in_the_sources_has_a_deadline() -> None:
    found = [f"{path.relative_to(ROOT)}:{line}" for path in sources() for line in without_deadline(path.read_text())]
    assert found == []


def test_the_calls_of_agent_operator_and_transfers_are_seen() -> None:
    seen = {str(path.relative_to(ROOT)): len(list(calls(ast.parse(path.read_text())))) for path in sources()}
    assert seen["client_agent/identity.py"] == 1  # Enroll
    assert seen["client_agent/session.py"] == 1  # all of AgentService
    assert seen["client_agent/transfers.py"] == 4  # FindMissing, QueryWriteStatus, Read, Write
    assert seen["coordinator/client.py"] == 4  # all of OperatorService, Read, QueryWriteStatus, Write


def test_the_one_that_hands_out_deadlines_does() -> None:
    tree = ast.parse((ROOT / "client_agent/rpc.py").read_text())
    (made,) = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "method"]
    assert [word.arg for word in made.keywords] == ["timeout"]


@pytest.mark.parametrize(
    "careless",
    [
        "stub.Heartbeat(request)",
        "stub.Heartbeat(request, timeout=None)",
        "agent_pb2_grpc.EnrollmentServiceStub(channel).Enroll(request)",
        "getattr(self._stub, method)(request, metadata=metadata)",
        "read = channel.unary_stream('/x')\nread(request)",
        "write: Any = channel.stream_unary('/x')\nwrite(None)",
        "channel.unary_unary('/x')(request)",
        "await patiently(stub.FinishTask, request)",
    ],
)
def test_a_call_without_a_deadline_is_found(careless: str) -> None:
    assert without_deadline(f"async def f():\n  {careless.replace(chr(10), chr(10) + '  ')}") != []


@pytest.mark.parametrize(
    "careful",
    [
        "stub.Heartbeat(request, timeout=3)",
        "rpc.call(stub.FindMissing, request)",
        "rpc.call(getattr(stub, method), request)",
        "read = channel.unary_stream('/x')\nread(request, timeout=3)",
        "file.Write(data)",
    ],
)
def test_a_call_with_one_is_not(careful: str) -> None:
    assert without_deadline(careful) == []
