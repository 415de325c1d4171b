"""A served target as the source of a drafter's training data: conversations in, features on the fly or captured."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from doubles import save_word_tokenizer, tiny_llama
from drafters.train.capture import CaptureError
from drafters.train.feature_source import DataOptions
from server.feature_source import DrafterTraining, source_for

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"


@pytest.fixture
def options(save_model: Callable[..., Path], tmp_path: Path) -> DataOptions:
    folder = save_model(tiny_llama(), "source")
    save_word_tokenizer(folder)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    talk = [{"role": "user", "content": "word3 word4"}, {"role": "assistant", "content": "word5 word6 word7"}]
    (tmp_path / "talks.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 4)
    return DataOptions(
        str(folder), conversations=str(tmp_path / "talks.jsonl"), window_length=16, held_out_share=0.25,
        captured=str(tmp_path / "features"),
    )  # fmt: skip


def test_captured_features_are_the_targets_own(options: DataOptions) -> None:
    source = source_for(options)
    assert (len(source.train_data), source.held_out_data is not None) == (3, True)  # type: ignore[arg-type]
    sample = source.train_data[0]
    assert sample["input_ids"].tolist()[1:3] == [3, 4]
    assert int(sample["loss_mask"].sum()) >= 3
    torch.testing.assert_close(
        sample["features"], source.features(sample["input_ids"][None])[0], atol=2e-3, rtol=2e-3
    )  # kept in fp16
    again = source_for(options)
    assert torch.equal(again.train_data[0]["features"], sample["features"])


def test_trainings_with_the_same_data_share_a_source(options: DataOptions) -> None:
    training = DrafterTraining()
    source = training.source_of(options, ("last",))
    assert training.source_of(dataclasses.replace(options), ["last"]) is source
    longer = dataclasses.replace(options, window_length=12, captured=None)
    assert training.source_of(longer, ("last",)).train_data is not source.train_data
    assert training.source_of(options, ("last",)) is not source


def test_features_of_another_target_are_refused(options: DataOptions) -> None:
    assert source_for(options).train_data
    tiny_llama(seed=1).save_pretrained(options.target)
    with pytest.raises(CaptureError, match="another target"):
        assert source_for(options).train_data
