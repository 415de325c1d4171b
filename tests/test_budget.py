"""Size is a feature: files and functions stay small. The ledger is printed with ``pytest -s``."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("server", "drafters", "kernels", "vision")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70
USUAL_FUNCTION_LINES = 40  # 95 of 100 functions stay under it


def source_files() -> list[Path]:
    return [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]


def functions(file: Path) -> dict[str, int]:
    """Lines of each function, its decorators left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {
        f"{file.relative_to(ROOT)}:{node.lineno} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_files_and_functions_stay_small() -> None:
    sizes = {str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines()) for file in source_files()}
    lengths = {name: length for file in source_files() for name, length in functions(file).items()}
    for package in PACKAGES:
        lines = {name: size for name, size in sizes.items() if name.startswith(f"{package}/")}
        largest = max(lines, key=lambda name: lines[name])
        print(f"\n{len(lines)} files, {sum(lines.values())} lines; largest {largest}, {lines[largest]}")  # noqa: T201
    too_long = {name: size for name, size in sizes.items() if size > MAX_FILE_LINES}
    too_long |= {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES}
    assert not too_long


def test_most_functions_are_short() -> None:
    lengths = sorted(length for file in source_files() for length in functions(file).values())
    assert lengths[int(len(lengths) * 0.95)] < USUAL_FUNCTION_LINES
