"""Clients for Node, of the versions named here, installed by npm into a temporary folder. Slow."""

import json
import os
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
PACKAGES = ("openai@6.49.0", "ai@6.0.326", "@ai-sdk/openai@3.0.141", "@ai-sdk/openai-compatible@2.0.92", "zod@4.6.7")
SCRIPT = Path(__file__).with_name("clients.mjs")
ANSWER = "Grüße 🌍, one two three. STOP and more"
CITY = {"city": "Rome", "people": 3}
CALL = f"<tool_call>{json.dumps({'name': 'City', 'arguments': CITY})}</tool_call>"
SLOW_ROUND_S = 0.05


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the packages and the script."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text('{"private": true, "type": "module"}')
    made = subprocess.run([npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", *PACKAGES],
                          cwd=folder, capture_output=True, text=True, check=False)  # fmt: skip
    if made.returncode:
        pytest.skip(f"npm could not install the packages: {made.stderr[-300:]}")
    shutil.copy(SCRIPT, folder)
    return folder


def test_clients_for_node(folder, listen, make_model):
    texts = {"TEXT": ANSWER, "CALL": CALL, "JSON": json.dumps(CITY)}
    models = {name: make_model(text=text, context=4000) for name, text in texts.items()}
    models["LONG"] = make_model(script=lambda request: ((70,) for _ in range(4000)), context=4000, round_s=SLOW_ROUND_S)
    with ExitStack() as servers:
        urls = {f"{name}_URL": servers.enter_context(listen(model))[0] for name, model in models.items()}
        run = subprocess.run(["node", SCRIPT.name], cwd=folder, env=dict(os.environ) | urls | {"ANSWER": ANSWER},
                             capture_output=True, text=True, check=False)  # fmt: skip
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert [result for result in results if result["fault"]] == [], run.stderr
    assert (run.returncode, len(results)) == (0, 25)
