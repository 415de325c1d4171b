"""From a recipe to a served drafter: ``dovetail train drafter``, then the same text as plain decoding."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from doubles import save_word_tokenizer, tiny_llama
from drafters.train.capture import CaptureError
from server import cli
from server.targets.target import TargetError
from server.training_plan import plan_drafter

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
RECIPE = """
[drafter]
intermediate_size = 96
num_heads = 4
num_kv_heads = 2
features = "FEATURES"

[loss]
unrolled_steps = 2

[data]
target = "FOLDER/target"
conversations = "FOLDER/talks.jsonl"
window_length = 24
held_out_share = 0.25
captured = "FOLDER/features"
answers = "FOLDER/run/answers.jsonl"
answer_tokens = 8

[training]
output = "FOLDER/run"
steps = 6
batch_size = 4
learning_rate = 1e-2
save_every = 6
evaluate_every = 6
log_every = 3
"""


@pytest.fixture
def folder(save_model: Callable[..., Path], tmp_path: Path) -> Path:
    save_model(tiny_llama(num_layers=8), "target").rename(tmp_path / "target")
    save_word_tokenizer(tmp_path / "target")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (tmp_path / "target" / "tokenizer_config.json").write_text(json.dumps(config))
    talks = [[{"role": "user", "content": f"word{i} word{i + 1}"}] for i in range(8)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return tmp_path


def write_recipe(folder: Path, features: str = "last") -> Path:
    file = folder / "recipe.toml"
    file.write_text(RECIPE.replace("FOLDER", str(folder)).replace("FEATURES", features))
    return file


def recipe_of(folder: Path, **data: Any) -> dict[str, Any]:
    recipe = tomllib.loads(write_recipe(folder).read_text())
    recipe["data"] |= data
    return recipe


def last_line(*arguments: str) -> Any:
    result = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("features", ["last", "low+mid+high"])
def test_a_recipe_ends_in_a_drafter_that_serves(folder: Path, features: str) -> None:
    report = last_line("train", "drafter", str(write_recipe(folder, features)))
    assert report["finished"]
    assert {"loss", "accuracy", "accuracy_2", "eval_accuracy"} <= report["final"].keys()
    assert report["best"]["step"] == 6
    for name in ("answers.jsonl", "training.json", "training.png", "drafter/model.safetensors"):
        assert (folder / "run" / name).is_file()
    assert (folder / "features" / "held_out" / "shard-00000.safetensors").is_file()
    text = ["generate", "word3 word4 word5", str(folder / "target"), "--max-tokens", "24", "--json"]
    plain = last_line(*text, "--no-draft")
    # Trees of a fixed size: whether rows pay is a matter of this machine's load.
    drafted = last_line(*text, "--drafter", report["checkpoint"], "--trees", "fixed")
    assert drafted["token_ids"] == plain["token_ids"]
    assert drafted["timings"]["draft_n"] > 0


def test_a_dry_run_tells_memory_and_disk_and_writes_nothing(folder: Path) -> None:
    plan = last_line("train", "drafter", str(write_recipe(folder)), "--dry-run")
    assert (plan["samples"], plan["captured_bytes"]) == (None, None)  # the answers are not written yet
    assert sorted(file.name for file in folder.iterdir()) == ["recipe.toml", "talks.jsonl", "target"]
    parameters = sum(p.numel() for p in tiny_llama(num_layers=8).parameters())
    assert plan["target_bytes"] == 4 * parameters
    assert plan["memory"]["borrowed"] == 2 * 4 * 67 * 64
    assert plan["memory"]["total"] == sum(value for name, value in plan["memory"].items() if name != "total")


def test_captured_features_cost_what_the_dry_run_says(folder: Path) -> None:
    talk = [{"role": "user", "content": "word1"}, {"role": "assistant", "content": "word2 word3"}]
    (folder / "talks.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 3)
    recipe = recipe_of(folder)
    del recipe["data"]["answers"]
    plan = plan_drafter(recipe)
    assert (plan["samples"], plan["tokens"]) == (3, 3 * 5)
    assert plan["captured_bytes"] == 15 * (64 * 2 + 1 + 8)
    recipe["drafter"]["features"] = "low+mid+high"
    assert plan_drafter(recipe)["captured_bytes"] == 15 * (4 * 64 * 2 + 1 + 8)
    with pytest.raises(TargetError, match="weights 'int3'"):
        plan_drafter(recipe | {"data": recipe["data"] | {"weights": "int3"}})
    (folder / "target" / "config.json").write_text("{}")
    with pytest.raises(TargetError, match="does not describe a model"):
        plan_drafter(recipe)


def test_ctrl_c_in_mid_capture_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from server import feature_source

    recipe = write_recipe(folder)
    features_of, calls = feature_source.features_of, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return features_of(*arguments)

    monkeypatch.setattr(feature_source, "features_of", interrupted)
    assert CliRunner().invoke(cli.app, ["train", "drafter", str(recipe)]).exit_code != 0
    answers = (folder / "run" / "answers.jsonl").read_bytes()
    monkeypatch.undo()
    assert last_line("train", "drafter", str(recipe))["finished"]
    assert (folder / "run" / "answers.jsonl").read_bytes() == answers


def test_targets_without_the_layers_and_windows_beyond_the_context_are_refused(
    folder: Path, save_model: Callable[..., Path]
) -> None:
    from server.feature_source import DrafterTraining

    recipe = recipe_of(folder, window_length=300)
    with pytest.raises(ValueError, match=r"data\.window_length is 300; the positions of target end at 256"):
        DrafterTraining()(recipe, resume=False)
    shallow = save_model(tiny_llama(), "shallow")
    recipe = recipe_of(folder, target=str(shallow))
    recipe["drafter"]["features"] = "low+mid+high"
    with pytest.raises(TargetError, match="no feature layers high, low, mid; it gives last"):
        DrafterTraining()(recipe, resume=False)


def test_features_of_other_layers_are_refused(folder: Path) -> None:
    last_line("train", "drafter", str(write_recipe(folder)))
    recipe = recipe_of(folder)
    recipe["drafter"]["features"] = "low+mid+high"
    recipe["training"]["output"] = str(folder / "other")
    from server.feature_source import DrafterTraining

    with pytest.raises(CaptureError, match=r"another layers: 'last' there, 'low\+mid\+high\+last' asked for"):
        DrafterTraining()(recipe, resume=False)
