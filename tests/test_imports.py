"""Imports point one way, and the light modules stay free of torch."""

import ast
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "kernels": {"kernels"},
    "drafters": {"drafters", "kernels"},
    "vision": {"vision", "kernels"},
    "server": {"server", "drafters", "vision", "kernels"},
}
KINDS = "vision/serving/kinds/"  # found by their folder, so that no import names them
LIGHT = [
    "server.cli", "server.settings", "server.placement.machine", "server.app", "server.text", "server.api",
    "server.engine.request", "server.engine.scheduler", "server.engine.sequence",
    "server.engine.pages", "server.engine.completion", "server.cluster.conversation", "server.cluster.call",
]  # fmt: skip


def imported_packages(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package: str) -> None:
    against = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in sorted((ROOT / package).rglob("*.py"))
        for name in imported_packages(file)
        if name in ALLOWED and name not in ALLOWED[package]
    ]
    assert not against


def imported_files(file: Path) -> set[str]:
    """The files of vision that a file imports, lazily as well; what only type checkers read is left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    unread = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in unread:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    paths = {name.replace(".", "/") for name in names}
    found = {f"{path}.py" for path in paths} | {f"{path}/__init__.py" for path in paths}
    if file == ROOT / "vision/serving/registry.py":
        found |= {str(kind.relative_to(ROOT)) for kind in (ROOT / KINDS).glob("*.py")}
    return {path for path in found if (ROOT / path).is_file()}


def test_no_file_of_vision_imports_itself_by_any_way() -> None:
    graph = {str(file.relative_to(ROOT)): imported_files(file) for file in (ROOT / "vision").rglob("*.py")}
    assert "vision/serving/kinds/detector.py" in graph["vision/serving/registry.py"]
    assert "vision/detection/traced.py" in graph["vision/serving/kinds/detector.py"], "lazy imports count"
    with contextlib.suppress(StopIteration):
        while True:  # take away files that import none of those left
            leaf = next(file for file, imports in graph.items() if not imports & graph.keys())
            del graph[leaf]
    assert not graph, f"a circle among {sorted(graph)}"


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_do_not_import_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_our_kernels_live_beside_transformers() -> None:
    code = "import kernels, transformers; from transformers import LlamaForCausalLM; print(kernels.__file__)"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert Path(answer.stdout.strip()).is_relative_to(ROOT)
