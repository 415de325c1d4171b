"""A server under load, and in trouble: text goes on, vision comes back by itself. Every server is a real process."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import load
import pytest
from tiny_detector import encoded, halves, write_tiny_detector

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PATIENCE_S, LOOKS = 120.0, 1200
TEXT = {"prompt": "def mean", "max_tokens": 12, "temperature": 0}
# Every look at the wall clock sees it ten years on, or back where it was.
SKEWED_CLOCK = r"""
#define _GNU_SOURCE
#include <time.h>
#include <sys/syscall.h>
#include <unistd.h>
int clock_gettime(clockid_t id, struct timespec *at) {
    static long looks;
    int failed = syscall(SYS_clock_gettime, id, at);
    if (id == CLOCK_REALTIME && ++looks % 2) at->tv_sec += 315360000;
    return failed;
}
"""


def until(condition: Callable[[], Any]) -> Any:
    for _ in range(LOOKS):  # not until a moment: a machine with much else to do starves server and test alike
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError("it did not come about")


def call(port: int, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, None if body is None else json.dumps(body).encode(), 60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def text(port: int) -> str:
    status, answer = call(port, "/v1/completions", TEXT)
    assert status == 200, answer
    return str(answer["choices"][0]["text"])


def vision_state(port: int) -> str:
    return str(call(port, "/health")[1]["vision"]["state"])


def detects(port: int) -> bool:
    import base64

    image = base64.b64encode(encoded(halves("blue"))).decode()
    status, answer = call(port, "/v1/vision/detections", {"image": image})
    return status == 200 and [found["class_name"] for found in answer["detections"]] == ["blue"]


def vision_pid(pid: int) -> int | None:
    """The server's child that looks at images."""
    children = [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    for child in children:
        with contextlib.suppress(OSError):
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                return child
    return None


def test_five_minutes_of_everything_at_once() -> None:
    with load.server("tiny", "--max-seqs", "8", "--cache", "16MiB") as (port, pid):
        report = asyncio.run(load.drive(port, pid, at_once=200, seconds=300, warm_up=300))
    assert report["mismatches"] == [] and report["odd"] == [] and report["left_running"] == 0
    assert set(report["statuses"]) <= {"200", "400", "404", "415", "429", "503"}
    assert report["compared"] > 100
    memory = report["resident_bytes"]
    assert memory["after"] <= 1.05 * memory["before"], memory


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int, Path]]:
    """A server with a detector: port, process id, the detector's folder."""
    pytest.importorskip("onnxruntime", reason="not installed (extra vision): onnxruntime")
    folder = write_tiny_detector(tmp_path_factory.mktemp("models") / "halves")
    with load.server("tiny", "--vision", str(folder)) as (port, pid):
        until(lambda: vision_state(port) == "ok")
        yield port, pid, folder


def test_the_vision_process_killed_ten_times_comes_back(seeing: tuple[int, int, Path]) -> None:
    port, pid, _ = seeing
    before = text(port)
    for _ in range(10):
        victim = until(lambda: vision_pid(pid))
        os.kill(victim, signal.SIGKILL)
        assert text(port) == before
        until(lambda: detects(port))
    assert call(port, "/health")[1]["vision"]["restarts"] >= 10


def test_a_vision_model_that_is_damaged_is_served_again_once_it_is_whole(seeing: tuple[int, int, Path]) -> None:
    port, pid, folder = seeing
    before, whole = text(port), (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(whole[: len(whole) // 3] + b"\xff" * 100)
    os.kill(until(lambda: vision_pid(pid)), signal.SIGKILL)
    until(lambda: vision_state(port) == "failed")
    assert text(port) == before and not detects(port)
    (folder / "model.onnx").write_bytes(whole)
    until(lambda: detects(port))
    assert vision_state(port) == "ok"


def test_a_server_that_was_stopped_for_ten_seconds_goes_on(seeing: tuple[int, int, Path]) -> None:
    port, pid, _ = seeing
    body = json.dumps(TEXT | {"max_tokens": 400, "stream": True, "ignore_eos": True}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as stream:
        stream.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
                       b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body)  # fmt: skip
        raw = stream.recv(65536)
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(10)  # what is tested
        finally:
            os.kill(pid, signal.SIGCONT)
        while piece := stream.recv(65536):
            raw += piece
    assert load.streamed_text(load.parsed(raw, 0).body) and b"[DONE]" in raw
    assert text(port) and until(lambda: detects(port))


@pytest.mark.parametrize("shell", ["exec 1>&-", "exec 2>&-", "exec 0<&- 1>&- 2>&-", "exec 2>/dev/full"])
def test_standard_streams_that_are_closed_or_full_cost_nothing(shell: str) -> None:
    with load.server("tiny", "--vision", "none", shell=shell) as (port, pid):
        assert text(port) == text(port)
        names = [os.readlink(f"/proc/{pid}/fd/{number}") for number in range(3)]
        assert not [name for name in names if "socket" in name], "no connection takes a standard stream's place"


def test_few_open_files_leave_some_connections_out_and_text_goes_on() -> None:
    with load.server("tiny", "--vision", "none", shell="ulimit -n 100") as (port, _), contextlib.ExitStack() as held:
        before = text(port)
        for _ in range(150):
            held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S))
        held.close()
        until(lambda: call(port, "/health")[0] == 200)
        assert text(port) == before


def test_a_full_disk_costs_what_would_have_been_written_and_nothing_else(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], check=False).returncode == 0
    if not mounted:
        pytest.skip("a small file system cannot be mounted here")
    try:
        with contextlib.suppress(OSError), (disk / "fill").open("wb", buffering=0) as fill:
            while fill.write(b"x" * 1024):
                pass
        places = {"HOME": str(disk), "TMPDIR": str(disk), "XDG_CACHE_HOME": str(disk)}
        keep = ("--cache-file", str(disk / "prompts"))
        with load.server("tiny", "--vision", "none", *keep, shell=f"exec 2>>{disk}/log", **places) as (port, _):
            assert text(port) == text(port)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(shutil.which("cc") is None, reason="builds the clock: a C compiler")
def test_a_clock_that_jumps_changes_no_answer(tmp_path: Path) -> None:
    (tmp_path / "clock.c").write_text(SKEWED_CLOCK)
    library = tmp_path / "clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "clock.c")], check=True)
    with load.server("tiny", "--vision", "none", "--rate-limit", "100", LD_PRELOAD=str(library)) as (port, _):
        assert text(port) == text(port)
        assert call(port, "/health")[1]["status"] == "ok"
