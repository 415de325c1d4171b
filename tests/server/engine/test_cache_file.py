"""Prompts kept on disk: known again after a restart, to the last bit, and nothing is believed of any other file."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from doubles import save_word_tokenizer, tiny_llama
from kernels import native
from server.engine import cache_file
from server.engine.cache_file import PromptFile
from server.engine.completion import generate
from server.engine.engine import Engine, EngineOptions
from server.engine.request import Request, SamplingParams
from server.targets.identity import model_identity
from server.targets.native_target import NativeTarget
from server.targets.torch_target import TorchTarget

SYSTEM = [(7 * i) % 67 for i in range(70)]
TAILS = ([1, 2, 3] * 15, [4], [5, 6] * 20)


@pytest.fixture(scope="module")
def folder(save_model: Callable[..., Path]) -> Path:
    folder = save_model(tiny_llama(), "kept")
    save_word_tokenizer(folder)
    return folder


@pytest.fixture(scope="module", params=["torch", "native"])
def load(request: pytest.FixtureRequest, folder: Path) -> Callable[[], TorchTarget]:
    """A start of the server: the model is read anew."""
    if request.param == "torch":
        return lambda: TorchTarget.load(folder, "fp32", 2, 200)
    if native.library() is None:
        pytest.skip("the native kernels are not built")
    return lambda: NativeTarget.load(folder, "bf16", 2, 200, "int8")


def start(target: TorchTarget, file: Path, identity: str = "this", limit: int = 10**8) -> tuple[Engine, PromptFile]:
    engine = Engine(target, None, EngineOptions(2, 190, prefill_chunk=32, cache_bytes=limit))
    assert engine.prefixes is not None
    prompts = PromptFile(engine.prefixes, file, identity)
    prompts.load()
    engine.check_integrity()
    return engine, prompts


def answers(engine: Engine) -> tuple[list[list[int]], list[int]]:
    """Texts, and how much of each prompt was known."""
    params = SamplingParams(temperature=0.9, seed=3)
    requests = [Request(f"r{i}", [*SYSTEM, *tail], 30, params) for i, tail in enumerate(TAILS)]
    requests.append(Request("salted", [*SYSTEM, 4], 30, params, cache_salt="mine"))
    results = generate(engine, requests)
    return [r.token_ids for r in results.values()], [r.finished.stats.cached for r in results.values()]


def test_what_was_read_before_a_restart_is_known_after_it(load: Callable[[], TorchTarget], tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "prompts"
    engine, prompts = start(load(), file)
    want, cached = answers(engine)
    assert min(cached[:3]) == cached[3] == 0
    prompts.save()
    assert file.stat().st_mode & 0o777 == 0o600
    engine, prompts = start(load(), file)
    assert engine.prefixes is not None
    num_pages, size = engine.prefixes.pages.num_pages, engine.prefixes.pages.page_size
    texts, cached = answers(engine)
    assert texts == want
    lengths = [len(SYSTEM) + len(tail) for tail in (*TAILS, [4])]
    assert cached == [(length - 1) // size * size for length in lengths]
    assert num_pages >= 2 * len(SYSTEM) // size
    prompts.save()
    assert [path.name for path in file.parent.iterdir()] == ["prompts"]


def test_the_texts_used_last_are_taken_where_not_all_fit(load: Callable[[], TorchTarget], tmp_path: Path) -> None:
    engine, prompts = start(load(), tmp_path / "prompts")
    answers(engine)
    assert engine.prefixes is not None
    generate(engine, [Request("last", [*SYSTEM, *TAILS[0]], 1)])
    prompts.save()
    pages, prompt = engine.prefixes.pages, [*SYSTEM, *TAILS[0]]
    fitting = len(prompt) // pages.page_size
    engine, _ = start(load(), tmp_path / "prompts", limit=fitting * pages.num_bytes // pages.num_pages)
    known = generate(engine, [Request("last", prompt, 1)])["last"].finished.stats.cached
    assert known == fitting * pages.page_size


@pytest.fixture
def written(load: Callable[[], TorchTarget], tmp_path: Path) -> Path:
    engine, prompts = start(load(), tmp_path / "prompts")
    answers(engine)
    prompts.save()
    return tmp_path / "prompts"


def assert_ignored(target: TorchTarget, file: Path, reason: str, caplog: pytest.LogCaptureFixture, **more: str) -> None:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        engine, _ = start(target, file, **more)
    assert engine.prefixes is not None
    assert engine.prefixes.pages.num_pages == 0
    (record,) = caplog.records
    assert "will be written anew" in record.message
    assert reason in record.message
    assert "\n" not in record.message
    assert target.slots.lengths == [0, 0]


def test_a_damaged_file_is_not_used_wherever_the_damage_is(
    load: Callable[[], TorchTarget], written: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target, whole = load(), written.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        written.write_bytes(whole[:length])
        assert_ignored(target, written, "it is damaged", caplog)
    for place in range(0, len(whole), len(whole) // 40):
        written.write_bytes(whole[:place] + bytes([whole[place] ^ 0x11]) + whole[place + 1 :])
        assert_ignored(target, written, "", caplog)
    written.write_bytes(whole + b"more")
    assert_ignored(target, written, "it is damaged", caplog)


def test_another_models_file_is_not_used(
    load: Callable[[], TorchTarget], written: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert_ignored(load(), written, "another model wrote it", caplog, identity="that")
    save_file({"0.0": torch.zeros(3)}, written)
    assert_ignored(load(), written, "it is damaged", caplog)


def test_a_model_that_reads_otherwise_is_found_out(
    load: Callable[[], TorchTarget], written: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By the bits of the first page, where every name agrees: other kernels, or weights changed in place."""
    target = load()
    with torch.no_grad():
        target.embedding()[SYSTEM[9]] *= 1.01
    assert_ignored(target, written, "otherwise than when it was written", caplog)


def test_a_file_that_cannot_be_written_is_told_and_the_old_one_stays(
    load: Callable[[], TorchTarget], written: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, prompts = start(load(), written)
    before = written.read_bytes()

    def full(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half of")
        raise OSError("No space left on device")

    monkeypatch.setattr(cache_file, "save_file", full)
    prompts.save()
    assert "cannot be kept" in caplog.text
    assert written.read_bytes() == before
    assert [path.name for path in written.parent.iterdir()] == ["prompts"]


def test_a_models_identity_is_that_of_its_files(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert model_identity(copy) == model_identity(folder)
    weights = load_file(copy / "model.safetensors")
    times = (copy / "model.safetensors").stat()
    weights["model.norm.weight"] *= 1.5
    save_file(weights, copy / "model.safetensors")
    changed = model_identity(copy)
    assert changed != model_identity(folder)
    os.utime(copy / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    save_word_tokenizer(copy, [f"other{i}" for i in range(67)])
    assert len({changed, model_identity(copy), model_identity(folder)}) == 3
