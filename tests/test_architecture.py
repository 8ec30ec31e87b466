"""The house rules that a machine can hold: floors, the torch rule, the tree, the size and the names of files."""

from __future__ import annotations

import ast
import fnmatch
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("protos", "coordinator", "client_agent", "deploy")
TOP_LEVEL = {
    ".ci",
    ".dockerignore",
    ".editorconfig",
    ".gitignore",
    "buf.yaml",
    "CHANGELOG.md",
    "client_agent",
    "constraints.txt",
    "CONTRIBUTING.md",
    "coordinator",
    "deploy",
    "LICENSE",
    "Makefile",
    "protos",
    "pyproject.toml",
    "README.md",
    "tests",
}
MODEL_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "safetensors.torch", "tokenizers")
OPERATOR_FILES = {
    f"coordinator/{name}.py"
    for name in (
        *("adapter_export", "base_model", "benchmarks", "cli", "client", "export", "footprint", "job_cli"),
        *("model_card", "plan", "plan_view", "recipe", "terminal", "traffic", "watch"),
    )
}


def is_generated(path: Path) -> bool:
    return "_pb2" in path.name


def python_files(*rooms: str) -> list[Path]:
    """Hand-written sources below these rooms, relative to the repository root."""
    found = [path.relative_to(ROOT) for room in rooms for path in (ROOT / room).rglob("*.py") if not is_generated(path)]
    return sorted(found)


def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), filename=str(path))


def imports_of(path: Path) -> set[str]:
    """Every dotted name that a file imports, at whatever depth: `from a.b import c` gives a.b and a.b.c."""
    names: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports by a relative name"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_below(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def offences(paths: list[Path], *forbidden: str, but: tuple[str, ...] = ()) -> list[str]:
    return [
        f"{path} imports {name}"
        for path in paths
        for name in sorted(imports_of(path))
        if is_below(name, *forbidden) and not is_below(name, *but)
    ]


# --- floors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("protos", ("coordinator", "client_agent", "deploy", "tests")),
        ("coordinator", ("client_agent", "deploy", "tests")),
        ("client_agent", ("coordinator", "deploy", "tests")),
        ("deploy", ("tests",)),
    ],
)
def test_a_room_imports_only_the_floors_below_it(room: str, forbidden: tuple[str, ...]) -> None:
    assert python_files(room), f"{room} is empty"
    assert offences(python_files(room), *forbidden) == []


def test_services_and_controller_meet_only_in_the_store() -> None:
    assert offences(python_files("coordinator/services"), "coordinator.controller") == []
    assert offences([Path("coordinator/controller.py")], "coordinator.services") == []


def test_the_round_machine_uses_only_the_standard_library_and_the_contract() -> None:
    allowed = (*sys.stdlib_module_names, "protos", "coordinator.rounds")
    found = [
        f"{path} imports {name}"
        for path in python_files("coordinator/rounds")
        for name in sorted(imports_of(path))
        if not is_below(name, *allowed)
    ]
    assert found == []


def test_the_round_machine_reads_no_clock_and_touches_no_file() -> None:
    impure = ("time", "random", "secrets", "socket", "subprocess", "threading", "asyncio", "logging", "os", "pathlib")
    assert offences(python_files("coordinator/rounds"), *impure) == []


def test_the_operator_command_is_a_client_and_imports_nothing_of_the_service() -> None:
    # settings.py knows where an operator's profile lies: the environment is read there and nowhere else. How a cohort
    # is drawn is a pure rule, which a plan follows.
    pure = ("coordinator.settings", "coordinator.rounds.cohort", "coordinator.rounds.state")
    siblings = (*pure, *(name.removesuffix(".py").replace("/", ".") for name in OPERATOR_FILES))
    paths = [path for path in python_files("coordinator") if str(path) in OPERATOR_FILES]
    assert Path("coordinator/cli.py") in paths
    # `from coordinator import client` names the empty package too; what it takes from it is what counts.
    found = [line for line in offences(paths, "coordinator", but=siblings) if not line.endswith(" imports coordinator")]
    assert found == []


# --- the torch rule ---------------------------------------------------------------------------------------------------


def test_only_the_training_room_imports_model_libraries() -> None:
    training = set(python_files("client_agent/training"))
    assert offences([path for path in python_files(*ROOMS) if path not in training], *MODEL_LIBRARIES) == []


def test_the_training_room_has_no_network() -> None:
    network = ("grpc", "aiohttp", "socket", "http", "urllib", "requests", "httpx", "huggingface_hub")
    assert offences(python_files("client_agent/training"), *network, "protos.v1", "protos.channel") == []


def test_neither_service_nor_daemon_nor_command_loads_a_model_library_or_opens_a_socket() -> None:
    """Everything outside the training room is imported in one fresh process."""
    modules = [
        ".".join(path.with_suffix("").parts)
        for path in python_files(*ROOMS)
        if path.parts[:2] != ("client_agent", "training") and path.name not in ("__init__.py", "__main__.py")
        if "migrations" not in path.parts
    ]
    # boto3's urllib3 binds a socket to find out whether this machine has IPv6; only a coordinator with S3 loads it.
    modules = [name for name in modules if name not in ("coordinator.storage.bucket", "coordinator.storage.s3")]
    script = f"""
import importlib, sys
opened = []
sys.addaudithook(lambda event, _: opened.append(event) if event in {{"socket.bind", "socket.connect"}} else None)
for name in {modules!r}:
    importlib.import_module(name)
    for library in {MODEL_LIBRARIES!r}:
        assert library not in sys.modules, f"importing {{name}} loads {{library}}"
    assert not opened, f"importing {{name}} opens a socket"
assert "botocore" not in sys.modules, "a coordinator without S3 loads boto3"
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.fail(done.stderr[-2000:], pytrace=False)


def test_the_operator_command_starts_without_database_arrays_and_plots() -> None:
    """It answers at once, and on a laptop that has no extra installed."""
    heavy = ("sqlalchemy", "alembic", "numpy", "matplotlib", "jinja2", *MODEL_LIBRARIES)
    script = f"import sys, deploy.cli; print(*(set({heavy!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# --- no work at import, no settings by the back door ------------------------------------------------------------------


def test_importing_a_module_does_no_work() -> None:
    """A module's top level holds imports, names, functions and classes; commands may be registered.

    Alembic runs the files in migrations/ and never imports them.
    """
    harmless = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assert)
    named = (ast.Assign, ast.AnnAssign)
    found = []
    for path in python_files(*ROOMS):
        for node in tree_of(path).body if "migrations" not in path.parts else []:
            if isinstance(node, harmless + named) or _is_docstring(node) or _is_guard(node) or _registers(node):
                continue
            found.append(f"{path}:{node.lineno} does something at import")
    assert found == []


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING")


def _registers(node: ast.stmt) -> bool:
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "add_command"


def test_the_environment_is_read_in_settings_only() -> None:
    found = []
    for path in python_files("protos", "coordinator", "client_agent"):
        for node in ast.walk(tree_of(path)):
            text = ast.unparse(node) if isinstance(node, ast.Call | ast.Subscript) else ""
            reads = isinstance(getattr(node, "ctx", ast.Load()), ast.Load)
            if reads and re.match(r"os\.(getenv\(|environ(\[|\.get\())", text) and path.name != "settings.py":
                found.append(f"{path}:{node.lineno} {text}")
    assert found == []


# --- files ------------------------------------------------------------------------------------------------------------


def ignored(name: str) -> bool:
    patterns = (line.strip("/") for line in (ROOT / ".gitignore").read_text().split())
    return name == ".git" or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def test_the_top_level_is_fixed() -> None:
    assert {path.name for path in ROOT.iterdir() if not ignored(path.name)} == TOP_LEVEL


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in python_files(*ROOMS, "tests")}
    assert {str(path): length for path, length in lengths.items() if length > 400} == {}


def test_no_file_or_class_is_a_drawer() -> None:
    drawer = re.compile(r"(utils?|common|helpers?|misc|base)")
    found = [
        str(path) for path in python_files(*ROOMS, "tests") for part in path.parts if drawer.fullmatch(Path(part).stem)
    ]
    for path in python_files(*ROOMS):
        classes = (node.name for node in ast.walk(tree_of(path)) if isinstance(node, ast.ClassDef))
        # A base model is a thing of this domain.
        found += [f"{path}: class {name}" for name in classes if re.match(r"_?Base(?!Model)[A-Z]", name)]
    assert found == []


def test_every_module_says_what_it_is() -> None:
    paths = [path for path in python_files(*ROOMS) if (ROOT / path).read_text().strip()]
    assert [str(path) for path in paths if not ast.get_docstring(tree_of(path))] == []


def test_nothing_is_left_for_later() -> None:
    later = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    kinds = {".py", ".proto", ".toml", ".md", ".yml", ".html", ".service", ".Dockerfile"}
    paths = [path for room in (*ROOMS, "tests") for path in (ROOT / room).rglob("*") if path.suffix in kinds]
    paths += [path for path in ROOT.iterdir() if path.is_file() and not ignored(path.name)]
    assert [str(path.relative_to(ROOT)) for path in paths if later.search(path.read_text(errors="replace"))] == []


def test_every_third_party_import_is_declared_for_its_room() -> None:
    """A site installs the agent's extra alone: what its room imports must come with it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {
        "protos": _names(project["dependencies"]),
        "coordinator": _names(project["dependencies"] + extras["coordinator"]),
        "client_agent": _names(project["dependencies"] + extras["agent"]),
        "deploy": _names(project["dependencies"] + extras["coordinator"] + extras["agent"] + extras["dev"]),
    }
    # The operator's command runs on a laptop with no extra at all.
    operator = _names(project["dependencies"])
    distributions = packages_distributions()
    # `google` is shared by several distributions; both of ours are in the base dependencies.
    ours = (*ROOMS, "tests", "google", *sys.stdlib_module_names)
    found = []
    for room in ROOMS:
        for path in python_files(room):
            allowed = operator if str(path) in OPERATOR_FILES else declared[room]
            for module in sorted({name.split(".")[0] for name in imports_of(path)} - set(ours)):
                if not {_normal(name) for name in distributions.get(module, [module])} & allowed:
                    found.append(f"{path} imports {module}")
    assert found == []


def _names(requirements: list[str]) -> set[str]:
    return {_normal(re.split(r"[<>=~! \[]", requirement)[0]) for requirement in requirements}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# --- the README's tree ------------------------------------------------------------------------------------------------


def readme_tree() -> dict[str, str]:
    """{path: what is said of it} from the first fenced block below a heading with the word "tree" in it.

    One path a line, two spaces a level, a directory ends with "/": `  jobspec.py    the job spec`.
    """
    block = re.search(r"^#+ .*\btree\b.*?^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), re.I | re.M | re.S)
    assert block, "README.md has no fenced block below a heading with the word tree"
    found: dict[str, str] = {}
    parents: list[str] = []
    for line in block[1].splitlines():
        if not line.strip():
            continue
        level, odd = divmod(len(line) - len(line.lstrip(" ")), 2)
        name, _, said = line.strip().partition(" ")
        assert not odd and level <= len(parents), f"README tree: this line hangs in the air: {line!r}"
        path = "".join(parents[:level]) + name
        assert path not in found, f"README tree: {path} is there twice"
        found[path] = said.strip()
        if name.endswith("/"):
            parents[level:] = [name]
    return found


def test_every_path_in_the_readme_tree_exists_and_is_explained() -> None:
    tree = readme_tree()
    assert [path for path in tree if not (ROOT / path).exists()] == []
    assert [path for path in tree if path.endswith("/") != (ROOT / path).is_dir()] == []
    assert [path for path, said in tree.items() if not said] == []


def test_every_source_file_is_in_the_readme_tree() -> None:
    tree = readme_tree()
    sources = [str(path) for path in python_files(*ROOMS) if (ROOT / path).read_text().strip()]
    sources += [str(path.relative_to(ROOT)) for path in (ROOT / "protos").rglob("*.proto")]
    assert [path for path in sources if path not in tree] == []
