"""The README's commands are run as they stand, against a server on a free port; its tree and its links are true."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.own_models import OwnModelError, default_target

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# A block is run when this comment stands on the line before it.
RUNNABLE = re.findall(r"<!-- runnable -->\n```sh\n(.*?)```", README, flags=re.DOTALL)
START_LIMIT_S = 120


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    try:
        default_target()
    except OwnModelError as error:
        pytest.skip(str(error))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # One thread: on a machine that is busy, two that wait for each other at every layer take minutes.
    settings = {"DOVETAIL_MODEL_NAME": "dovetail", "DOVETAIL_THREADS": "1"}
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)} | settings


@pytest.fixture(scope="module")
def port(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free: int = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("wb") as stream:
        server = subprocess.Popen(["dovetail", "serve", "--port", str(free)], env=environment, stderr=stream, cwd=ROOT)
    try:
        wait_until_healthy(free, server, log)
        yield free
    finally:
        server.terminate()
        server.wait(timeout=45)


def wait_until_healthy(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    pytest.fail(f"the server did not come up:\n{log.read_text(encoding='utf-8')}")


def test_some_blocks_are_runnable() -> None:
    assert len(RUNNABLE) >= 3


@pytest.mark.parametrize("block", RUNNABLE, ids=lambda block: " ".join(block.split()[:2]))
def test_block_runs(block: str, environment: dict[str, str], port: int) -> None:
    script = "set -euo pipefail\n" + block.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    done = subprocess.run(
        ["bash", "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert '"error"' not in done.stdout


def test_tree_is_true() -> None:
    (tree,) = re.findall(r"<!-- tree -->\n```\n(.*?)```", README, flags=re.DOTALL)
    for line in tree.splitlines():
        assert (ROOT / line.split()[0]).exists(), line


def test_links_into_the_repository_lead_somewhere() -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
