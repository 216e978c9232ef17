"""The layout and the import directions of the project, kept over the syntax tree, lazy imports included."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "supermoe"
SOURCES = sorted(p for folder in ("supermoe", "kernels") for p in (ROOT / folder).rglob("*.py"))
ALL = [*SOURCES, *sorted(p for folder in ("tests", "benchmarks") for p in (ROOT / folder).rglob("*.py"))]

GROUND = {"config", "typed_yaml"}
# part -> what it may import of ours, besides itself: names of parts, or single modules
MAY_IMPORT = {
    "typed_yaml": set(),
    "config": {"typed_yaml"},
    "kernels": set(),
    "ops": {"kernels"},
    "data": GROUND,
    "model": {*GROUND, "ops", "data.batch", "data.schema"},
    "objectives": {*GROUND, "ops", "data.batch", "data.schema", "model"},
    "distributed": {*GROUND, "ops", "model"},
    "training": {*GROUND, "ops", "data", "model", "objectives", "distributed"},
    "serving": {*GROUND, "data", "model", "objectives.tasks"},
    "studies": {*GROUND, "ops", "data", "model", "objectives", "distributed", "training", "serving"},
}
# modules whose classes plug into a seat of the config
PLURAL = ["data/sources", "data/splits", "model/routers", "model/readouts"]
PLURAL += ["objectives/tasks", "objectives/pretraining", "objectives/balancers"]


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> set[str]:
    """What of ours a file imports, anywhere in it: `data.batch.Batch` for `from supermoe.data.batch import Batch`."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{label(path)}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("import_module")
            and isinstance(node.args[0], ast.Constant)
        ):
            found.add(node.args[0].value)
    return {name.removeprefix("supermoe.") for name in found if name.startswith("supermoe.")}


def allowed(name: str, part: str) -> bool:
    inside = {part, *MAY_IMPORT[part], "__version__"}
    return any(name == other or name.startswith(f"{other}.") for other in inside)


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_imports_point_downwards(path: Path) -> None:
    part = path.relative_to(PACKAGE).with_suffix("").parts[0] if PACKAGE in path.parents else "kernels"
    if part not in MAY_IMPORT:  # a command: may import everything but other commands
        commands = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__", "config", "typed_yaml", "cli", "testing"}
        assert not {name.split(".")[0] for name in imports(path)} & (commands - {path.stem})
        return
    assert {name for name in imports(path) if not allowed(name, part)} == set()


@pytest.mark.parametrize("path", ALL, ids=label)
def test_file_is_short_ascii_and_free_of_machine_paths(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    assert text.isascii()
    assert not re.search(r"/(work|home|root|Users)/\w", text)


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_docstrings(path: Path) -> None:
    module = tree(path)
    assert ast.get_docstring(module), "the module has no docstring"
    missing = []
    for owner in [
        module,
        *(node for node in module.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")),
    ]:
        for node in owner.body:
            if (
                not isinstance(node, ast.FunctionDef | ast.ClassDef)
                or node.name.startswith("_")
                or node.name == "Config"
            ):
                continue
            if owner is not module and _is_given_elsewhere(node, owner):
                continue
            if not ast.get_docstring(node):
                missing.append(node.name)
    assert missing == []


def _is_given_elsewhere(node: ast.AST, owner: ast.AST) -> bool:
    """Methods that fulfil a contract described at its base class or by PyTorch."""
    inherits = isinstance(owner, ast.ClassDef) and bool(owner.bases)
    return inherits and isinstance(node, ast.FunctionDef)


@pytest.mark.parametrize("module", PLURAL)
def test_plural_file_ends_with_its_registry(module: str) -> None:
    path = PACKAGE / f"{module}.py"
    last = tree(path).body[-1]
    target = last.targets[0] if isinstance(last, ast.Assign) else getattr(last, "target", None)
    assert isinstance(target, ast.Name)
    assert target.id == "REGISTRY"
    value = last.value
    assert isinstance(value, ast.Dict)
    classes = {node.name: node for node in tree(path).body if isinstance(node, ast.ClassDef)}
    for key, item in zip(value.keys, value.values, strict=True):
        assert isinstance(key, ast.Constant)
        if isinstance(item, ast.Name) and item.id in classes:
            assert ast.get_docstring(classes[item.id]), f"{item.id} has no docstring"


def test_layout() -> None:
    parts = {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert parts == {"data", "ops", "model", "objectives", "distributed", "training", "serving", "studies"}
    for command in PACKAGE.glob("*.py"):
        if command.stem in {"__init__", "config", "typed_yaml", "cli", "testing"}:
            continue
        assert '__name__ == "__main__"' in command.read_text(encoding="utf-8"), f"{command.name} is not a command"


def test_every_source_file_has_its_test() -> None:
    """tests/test_<file>.py, or test_<folder>_<file>.py."""
    tested = {path.stem.removeprefix("test_") for path in (ROOT / "tests").rglob("test_*.py")}
    untested = {
        label(path)
        for path in PACKAGE.rglob("*.py")
        if path.stem != "__init__" and not tested & {path.stem, f"{path.parent.name}_{path.stem}"}
    }
    assert untested == set()


def test_serving_runs_without_training() -> None:
    """The closure of what the embedder imports holds neither objectives nor training nor distributed."""
    seen, todo = set(), {"serving.embedder"}
    while todo:
        name = todo.pop()
        seen.add(name)
        path = PACKAGE / (name.replace(".", "/") + ".py")
        if path.is_file():
            found = imports(path)
            todo |= (found | {n.rpartition(".")[0] for n in found}) - seen - {""}
    assert not {name for name in seen if name.split(".")[0] in {"objectives", "training", "distributed"}}
