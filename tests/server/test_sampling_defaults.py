import json
from pathlib import Path

import pytest

from server import own_models
from server.engine.request import SamplingParams
from server.sampling_defaults import read_sampling_defaults
from server.text import TextError


def test_a_folder_says_how_it_wants_to_be_sampled(tmp_path: Path) -> None:
    assert read_sampling_defaults(tmp_path) == SamplingParams()
    file = tmp_path / "generation_config.json"
    said = {"temperature": 0.2, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1}
    file.write_text(json.dumps(said | {"do_sample": True, "max_new_tokens": 5, "top_k": 20.0}))
    assert read_sampling_defaults(tmp_path) == SamplingParams(**said)  # type: ignore[arg-type]
    file.write_text(json.dumps({"do_sample": False, "temperature": None}))
    assert read_sampling_defaults(tmp_path) == SamplingParams(temperature=0.0)


def test_the_default_model_is_sampled_as_its_card_does_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    default = tmp_path / Path(own_models.FILE).name
    monkeypatch.setattr(own_models, "default_target", lambda: default)
    assert read_sampling_defaults(default) == SamplingParams(temperature=0.2, top_p=0.9)
    assert read_sampling_defaults(tmp_path / "copy" / default.name) == SamplingParams()


@pytest.mark.parametrize(
    "said", [{"temperature": -1}, {"temperature": "hot"}, {"top_p": 0}, {"top_k": 2.5}, {"min_p": True}, {"top_p": [1]}]
)
def test_values_that_cannot_be_are_named(said: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    (name,) = said
    with pytest.raises(TextError, match=rf"{name} in .*generation_config\.json is .*allowed is"):
        read_sampling_defaults(tmp_path)
