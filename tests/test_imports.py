"""Imports point one way, and the light modules stay free of torch."""

import ast
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
LIGHT = [
    "server.cli", "server.settings", "server.placement.machine", "server.app", "server.text", "server.api",
    "server.engine.request", "server.engine.scheduler", "server.engine.sequence",
    "server.engine.pages", "server.engine.completion",
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


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_do_not_import_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_our_kernels_live_beside_transformers() -> None:
    code = "import kernels, transformers; from transformers import LlamaForCausalLM; print(kernels.__file__)"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert Path(answer.stdout.strip()).is_relative_to(ROOT)
