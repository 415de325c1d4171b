"""Captured features: what was computed comes back, an interrupted run goes on, and nothing foreign is taken."""

import errno
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from drafters.train import capture as module
from drafters.train.capture import CaptureError, Manifest, capture, describe, shard_file

HIDDEN = 6


class Computer:
    """Features that tell the tokens apart; counts how often it is asked."""

    calls = 0

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return (token_ids[..., None] * torch.arange(1, HIDDEN + 1) / 7).float()


@pytest.fixture
def samples() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 3, 9, 4, 7, 3, 8]
    return [
        {
            "input_ids": torch.randint(0, 50, (length,), generator=generator),
            "loss_mask": (torch.rand(length, generator=generator) > 0.5).float(),
        }
        for length in lengths
    ]


@pytest.fixture
def manifest(samples: list[dict[str, torch.Tensor]]) -> Manifest:
    return replace(describe(samples, "tiny:abc", HIDDEN), shard_samples=3)


def assert_same(data: Any, samples: list[dict[str, torch.Tensor]]) -> None:
    assert len(data) == len(samples)
    for index in (6, 0, 3, 2, 5, 1, 4):
        got = data[index]
        assert torch.equal(got["input_ids"], samples[index]["input_ids"])
        assert torch.equal(got["loss_mask"], samples[index]["loss_mask"])
        want = Computer()(samples[index]["input_ids"][None])[0].half().float()
        assert torch.equal(got["features"], want)


def test_samples_come_back_with_their_features(
    samples: list[dict[str, torch.Tensor]], manifest: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert (manifest.num_tokens, manifest.num_bytes, manifest.num_shards) == (39, 39 * 21, 3)
    with caplog.at_level(logging.INFO):
        assert_same(capture(samples, Computer(), tmp_path / "features", manifest), samples)
    assert "7 samples (39 tokens)" in caplog.text
    again = Computer()
    assert_same(capture(samples, again, tmp_path / "features", manifest), samples)
    assert again.calls == 0


def test_a_disk_that_fills_up_loses_nothing_and_the_run_goes_on(
    samples: list[dict[str, torch.Tensor]], manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file = module.save_file

    def save_until_full(state: dict[str, torch.Tensor], file: Path) -> None:
        if "00002" in file.name:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(state, file)

    monkeypatch.setattr(module, "save_file", save_until_full)
    with pytest.raises(CaptureError, match=r"shard-00002.*No space left.*goes on from there"):
        capture(samples, Computer(), tmp_path, manifest)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "manifest.json", "shard-00000.safetensors", "shard-00001.safetensors",
    ]  # fmt: skip
    monkeypatch.setattr(module, "save_file", save_file)
    rest = Computer()
    assert_same(capture(samples, rest, tmp_path, manifest), samples)
    assert rest.calls == 1


def test_too_little_room_is_told_before_anything_is_computed(
    samples: list[dict[str, torch.Tensor]], manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    computer = Computer()
    with pytest.raises(CaptureError, match=r"takes 0\.0 MB more and 0\.0 MB are free.*on the fly"):
        capture(samples, computer, tmp_path, manifest)
    assert computer.calls == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [({"target": "other:def"}, "another target: 'tiny:abc' there, 'other:def'"), ({"samples": "x"}, "another samples")],
)
def test_features_of_another_target_or_other_samples_are_refused(
    samples: list[dict[str, torch.Tensor]], manifest: Manifest, tmp_path: Path, change: dict[str, str], named: str
) -> None:
    capture(samples, Computer(), tmp_path, manifest)
    with pytest.raises(CaptureError, match=named):
        capture(samples, Computer(), tmp_path, replace(manifest, **change))
    samples[2]["loss_mask"] = 1 - samples[2]["loss_mask"]
    assert describe(samples, "tiny:abc", HIDDEN).samples != manifest.samples


def test_a_damaged_shard_is_named(samples: list[dict[str, torch.Tensor]], manifest: Manifest, tmp_path: Path) -> None:
    data = capture(samples, Computer(), tmp_path, manifest)
    shard_file(tmp_path, 1).write_bytes(b"damaged")
    with pytest.raises(CaptureError, match=r"shard-00001\.safetensors cannot be read.*remove it"):
        data[0]
