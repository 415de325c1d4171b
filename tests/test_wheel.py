"""What a wheel installs: all of it in a folder of its own, so that no other package's files are overwritten."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's files, built without native kernels and weights, which take minutes and megabytes."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    for package in ("server", "drafters", "kernels", "vision"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "csrc", "assets", "suites")
        shutil.copytree(ROOT / package, source / package, ignore=ignored)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, source],
        check=True,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(site: Path, code: str) -> subprocess.CompletedProcess[str]:
    # The folder is made a site folder, so that its .pth file is read; the tree that is under test must not be found.
    prelude = f"import site, sys; sys.path[:] = [p for p in sys.path if p not in ('', {str(ROOT)!r})]\n"
    prelude += "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder)]\n"
    prelude += f"sys.path.insert(0, {str(site)!r}); site.addsitedir({str(site)!r})\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + code], cwd=site.parent, capture_output=True, text=True, check=False, env={}
    )


def test_everything_lies_in_a_folder_of_its_own(installed: Path) -> None:
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {
        "_dovetail", "dovetail_server.pth",
    }  # fmt: skip
    done = run(installed, "import kernels, server.cli; print(kernels.__file__); server.cli.app(['--version'])")
    assert done.returncode == 0, done.stderr
    assert str(installed / "_dovetail" / "kernels") in done.stdout and "dovetail 0." in done.stdout


@pytest.mark.parametrize("command", ["doctor", "serve"])
def test_hugging_faces_kernels_keep_their_files_and_are_named(installed: Path, tmp_path: Path, command: str) -> None:
    site = tmp_path / "site"
    shutil.copytree(installed, site)
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("get_kernel = True\n")
    (site / "kernels-0.18.2.dist-info").mkdir()
    (site / "kernels-0.18.2.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n"
    )
    assert run(site, "from kernels import get_kernel").returncode == 0
    done = run(site, f"import sys, server.cli; sys.argv = ['dovetail', '{command}']; server.cli.main()")
    (sentence,) = done.stderr.splitlines()
    assert done.returncode == 1 and "Hugging Face's package 'kernels' 0.18.2" in sentence
    assert "pip uninstall kernels" in sentence
