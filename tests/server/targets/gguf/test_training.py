"""A GGUF file as the target of a drafter: planned, learnt from, drafted for and evaluated."""

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType
from typer.testing import CliRunner

from server.cli import app
from server.targets.gguf.tokenizer import read_codec

RECIPE = """
[drafter]
intermediate_size = 64
num_heads = 4
num_kv_heads = 2

[data]
target = "FOLDER/tiny.gguf"
conversations = "FOLDER/talks.jsonl"
captured = "FOLDER/features"
window_length = 32
held_out_share = 0.25
ANSWERS

[training]
output = "FOLDER/run"
steps = 2
batch_size = 2
save_every = 2
"""


def last_line(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("written", [False, True], ids=["given answers", "own answers"])
def test_a_drafter_learns_from_a_file_and_drafts_for_it(tiny_gguf: Any, tmp_path: Path, written: bool) -> None:
    file = tiny_gguf.write(tmp_path / "tiny.gguf", GGMLQuantizationType.Q4_1)
    talk = [{"role": "user", "content": "the a"}, {"role": "assistant", "content": "b the <|im_end|> the"}]
    (tmp_path / "talks.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 4)
    recipe = tmp_path / "recipe.toml"
    answers = f'answers = "{tmp_path}/answers.jsonl"\nanswer_tokens = 6' if written else ""
    recipe.write_text(RECIPE.replace("FOLDER", str(tmp_path)).replace("ANSWERS", answers))
    plan = last_line("train", "drafter", recipe, "--dry-run")
    assert plan["target_bytes"] == file.stat().st_size
    assert plan["memory"]["borrowed"] == 4 * len(tiny_gguf.tokens) * 256
    # The same tokens as when the file is served: a special token inside an answer is ordinary text.
    served = read_codec(file).chat(talk, add_generation_prompt=False)
    assert plan["tokens"] == (None if written else 4 * len(served))
    report = last_line("train", "drafter", recipe)
    assert report["finished"]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the a the"}\n')
    short = ("--suite", tmp_path / "prompts.jsonl", "--limit", 1, "--max-tokens", 6, "--repeats", 1, "--threads", 1)
    evaluated = last_line("eval", "drafter", report["checkpoint"], "--target", file, *short)
    assert evaluated["target"]["name"] == "tiny"
    assert evaluated["drafters"][0]["settings"][0]["equal_texts"] == 1
