"""Shapes with random weights: real passes, pretended drafts, said in every line."""

import json

import pytest
import torch
from command_line import refusal, run

from kernels import native
from server.placement import shape
from server.placement.shape import TargetShape

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native layers are not built")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shape.SHAPES, "small", TargetShape("small", 64, 160, 3, 4, 2, 16, 256))


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_shape_is_raced_with_the_acceptance_that_was_asked_for(blocks: int) -> None:
    before = torch.get_num_threads()
    words = ["--shape", "small", "--layers", "2", "--simulate-acceptance", "3", "--weights", "int8", "--rows", "6",
             "--max-tokens", "24", "--repeats", "2", "--blocks", blocks, "--shape-gpu-layers", blocks]  # fmt: skip
    result = run("bench", *words)
    torch.set_num_threads(before)
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["simulated"].startswith("SIMULATED") and report["shape"]["num_layers"] == 2
    assert 2 < report["dovetail"]["acceptance_length"] < 4
    assert report["verify_ms"].keys() == report["predicted"]["verify_ms"].keys() == {"1", "2", "4", "8", "16"}
    assert min(report["predicted"]["verify_ms"].values()) > 0 and report["predicted"]["tokens_per_s"] > 0
    said = [line for line in result.stderr.splitlines() if "tokens/s" in line or "T(1)" in line]
    assert said and all(line.startswith("SIMULATED") for line in said)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shape", "small"], "say --simulate-acceptance"),
        (["--shape", "x", "--simulate-acceptance", "2"], "'x' is none of llama2-7b"),
        (["--shape", "small", "--simulate-acceptance", "2", "--layers", "9"], "small has 3 layers"),
        (["--shape", "small", "--simulate-acceptance", "2", "--shape-gpu-layers", "4"], "measured with fewer layers"),
        (["--shape", "llama2-13b", "--simulate-acceptance", "2", "--weights", "fp32"], "--layers measures fewer"),
        (["--shape", "small", "--simulate-acceptance", "99"], "cannot be simulated"),
    ],
)
def test_what_cannot_be_simulated_is_refused(words: list[str], message: str) -> None:
    assert message in refusal("bench", *words)
