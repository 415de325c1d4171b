"""A language model trained from a recipe is a target that serves."""

from pathlib import Path
from typing import Any

import pytest

from drafters.train.language_model import train_language_model
from kernels.training import RecipeError
from server.engine.completion import generate
from server.engine.engine import Engine, EngineOptions
from server.engine.request import Request, SamplingParams
from server.targets.torch_target import TorchTarget
from server.text import TextCodec

CODE = "def add(first, second):\n    return first + second\n" * 6


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    sources = tmp_path / "sources"
    sources.mkdir()
    for i in range(12):
        (sources / f"{i}.py").write_text(CODE + f"# {i}\n")
    return {
        "model": {
            "hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
            "vocab_size": 300, "context_length": 32, "max_position": 96,
        },
        "corpus": {"sources": [{"kind": "python", "path": str(sources), "max_chars": 20_000}], "held_out_share": 0.2},
        "training": {
            "output": str(tmp_path / "run"), "steps": 60, "batch_size": 4, "optimizer": "muon", "learning_rate": 0.01,
            "save_every": 30, "evaluate_every": 30,
        },
    }  # fmt: skip


def test_a_trained_model_learns_and_serves(recipe: dict[str, Any]) -> None:
    report = train_language_model(recipe)
    assert report.finished
    assert report.best["eval_loss"] < 2.0
    folder = Path(report.checkpoint)
    codec = TextCodec.from_folder(folder)
    assert codec.has_chat_template
    assert len(codec.stop_ids) == 2
    target = TorchTarget.load(folder, "fp32", 1, 96)
    assert target.embedding() is target.lm_head()
    request = Request("r", codec.encode("def add(first, second):"), 16, SamplingParams(temperature=0))
    text = codec.decode(generate(Engine(target, None, EngineOptions(1, 96)), [request])["r"].token_ids)
    assert text.startswith("\n    return first + second\n")


def test_faults_of_a_recipe_are_named(recipe: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="unknown keys hiddensize"):
        train_language_model({**recipe, "model": {"hiddensize": 3}})
    with pytest.raises(RecipeError, match="lacks output"):
        train_language_model({**recipe, "training": {"steps": 1}})
    with pytest.raises(RecipeError, match="does not exist"):
        train_language_model({**recipe, "corpus": {**recipe["corpus"], "unseen": ["nowhere.jsonl"]}})
