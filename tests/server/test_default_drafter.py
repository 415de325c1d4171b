"""The default model's drafter: licensed, of this very model; its drafts shorten the work and change no token."""

from pathlib import Path

import pytest

from drafters.native import load_native
from drafters.proposal import Budget
from server.bench.prompts import load_prompts
from server.engine.completion import generate
from server.engine.engine import Engine, EngineOptions
from server.engine.request import Request, SamplingParams
from server.feature_source import fingerprint
from server.launch import load_codec
from server.own_models import OwnModelError, default_target, own_drafter
from server.targets.loading import load_target
from server.targets.torch_target import TorchTarget

NUM_TOKENS, CONTEXT = 40, 640
SAMPLED = SamplingParams(temperature=0.7, seed=11)


@pytest.fixture(scope="module")
def path() -> Path:
    try:
        return default_target()
    except OwnModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def target(path: Path) -> TorchTarget:
    return load_target(path, None, 1, CONTEXT + 16, 1)


def test_the_card_is_whole_and_the_drafter_small(path: Path) -> None:
    folder = own_drafter(path)
    assert folder is not None
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert all(f"## {section}" in card for section in ("Data", "Recipe", "Figures", "Limits", "Licence"))
    assert sum(file.stat().st_size for file in folder.iterdir()) < 25 * 10**6


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0), SAMPLED], ids=["greedy", "sampled"])
def test_drafts_shorten_the_work_and_change_no_token(path: Path, target: TorchTarget, sampling: SamplingParams) -> None:
    codec = load_codec(path)
    folder = own_drafter(path)
    assert folder is not None
    drafter = load_native(folder, target.embedding(), target.lm_head(), 1, CONTEXT + 16)
    prompts = [load_prompts(suite, 1)[0].as_chat() for suite in ("humaneval", "gsm8k", "mt-bench")]
    requests = [
        Request(p.name, codec.chat([{"role": "user", "content": p.turns[0]}]), NUM_TOKENS, sampling) for p in prompts
    ]
    options = EngineOptions(1, CONTEXT, Budget(rows=8, top_k=2, depth=4))
    plain = generate(Engine(target, None, options), requests)
    drafted = generate(Engine(target, drafter, options), requests)
    for request in requests:
        assert drafted[request.request_id].token_ids == plain[request.request_id].token_ids
    rounds = sum(drafted[request.request_id].finished.stats.rounds for request in requests)
    assert rounds < 0.8 * len(requests) * NUM_TOKENS
    assert target.info.name in str(drafter.config.target) and fingerprint(target) == drafter.config.target
