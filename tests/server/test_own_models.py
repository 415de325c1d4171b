"""The default model: its own bytes or nothing; the tiny pair only by its name."""

from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from server import own_models
from server.launch import LaunchError, load_engine, resolve_target
from server.own_models import ASSETS, FILE, INSTALL, OwnModelError, default_target, own_drafter
from server.settings import Settings


class Installed:
    def __init__(self, root: Path) -> None:
        self.root = root

    def locate_file(self, name: str) -> Path:
        return self.root / name


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(own_models, "distribution", lambda name: Installed(tmp_path))
    default_target.cache_clear()
    yield tmp_path / FILE
    default_target.cache_clear()


def test_without_the_package_one_command_is_named_and_nothing_else_served(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(own_models, "distribution", missing)
    default_target.cache_clear()
    with pytest.raises(LaunchError, match=INSTALL):
        load_engine(Settings())
    default_target.cache_clear()


def test_another_file_under_its_name_is_refused(package: Path) -> None:
    with pytest.raises(OwnModelError, match=INSTALL):
        default_target()
    package.parent.mkdir(parents=True)
    package.write_bytes(b"GGUF and something else")
    with pytest.raises(OwnModelError, match="SHA-256"):
        default_target()


def test_the_tiny_pair_goes_by_its_name() -> None:
    target = resolve_target("tiny")
    assert (target / "config.json").is_file()
    assert own_drafter(target) == ASSETS / "target_drafter"
    assert own_drafter(Path("some/model")) is None


def test_the_default_model_answers() -> None:
    try:
        default_target()
    except OwnModelError as error:
        pytest.skip(str(error))
    from server.engine.completion import generate
    from server.engine.request import Request, SamplingParams
    from server.launch import load_codec

    engine = load_engine(Settings(max_seqs=1, context=256, threads=1))
    codec = load_codec(resolve_target(None))
    ids = codec.chat([{"role": "user", "content": "Write a Python function that adds two numbers."}])
    request = Request("one", ids, 60, SamplingParams(temperature=0))
    text = codec.decode(generate(engine, [request])["one"].token_ids)
    assert "def " in text and "return" in text
    assert engine.target.info.weights == "Q4_1"
    # Drafting never changes the text.
    plain = load_engine(Settings(max_seqs=1, context=256, threads=1, drafter="none"))
    assert codec.decode(generate(plain, [request])["one"].token_ids) == text
