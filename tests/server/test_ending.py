"""How ``dovetail serve`` ends before it serves: one sentence and an exit code, whatever is being loaded."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from server import app
from server.app import ListenError, bind_sockets

ROOT = Path(__file__).resolve().parent.parent.parent

# Ctrl-C reaches the whole process group, the vision process included, while a thread is inside torch.
INTERRUPTED_WHILE_LOADING = """
import multiprocessing, os, signal, sys, time, torch
from server import cli, launch

def load_model(settings, report):
    matrix = torch.eye(300)
    while not multiprocessing.active_children():
        time.sleep(0.01)
    time.sleep(0.2)  # the vision process imports by now
    os.killpg(0, signal.SIGINT)
    while True:
        matrix = matrix @ matrix

launch.load_model = load_model
sys.argv = ["dovetail", "serve", "--port", "0"]
cli.main()
"""


def test_ctrl_c_while_models_load_is_one_sentence_and_130() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_WHILE_LOADING],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True, check=False,
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr and "KeyboardInterrupt" not in done.stderr
    assert done.stderr.splitlines()[-1] == "dovetail: interrupted"


# A study that has saved eight answers and is told to end.
ENDED_IN_THE_BACKGROUND = """
import os, sys, threading
from server import cli, launch
from server.bench.structured import Study

def run(self, cases, advance):
    self.report.content["schemas"] = 8
    self.report.save()
    os.kill(os.getpid(), number)
    threading.Event().wait(60)

number = int(sys.argv.pop())
launch.load_engine = launch.load_codec = launch.resolve_target = lambda *given: None
Study.__init__ = lambda self, engine, codec, options, report: setattr(self, "report", report)
Study.run = run
cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_study_in_the_background_ends_when_told_and_keeps_what_is_done(tmp_path, number) -> None:
    """Shells start what runs in the background with Ctrl-C ignored."""
    arguments = ["eval", "structured", "--json", tmp_path / "report.json", number.value]
    done = subprocess.run(
        ["sh", "-c", 'trap "" INT TERM HUP; exec "$@"', "sh", sys.executable, "-c", ENDED_IN_THE_BACKGROUND,
         *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "the same command goes on from" in done.stderr
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["schemas"] == 8


def test_a_taken_port_is_told_before_anything_is_loaded(make_settings, monkeypatch) -> None:
    monkeypatch.setattr(app, "DrainingServer", None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ListenError, match=f"port {port} of 127.0.0.1 is taken; choose another with --port"):
            app.serve(make_settings(port=port), None)


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
def test_an_address_that_is_not_ours_is_named(host: str) -> None:
    with pytest.raises(ListenError, match=f"{host}, port 8000 cannot be listened on"):
        bind_sockets(host, 8000)


def test_sockets_are_bound_for_every_address_of_a_name() -> None:
    sockets = bind_sockets("localhost", 0)
    try:
        assert {each.getsockname()[0] for each in sockets} <= {"127.0.0.1", "::1"} and sockets
    finally:
        for each in sockets:
            each.close()
