import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kernels.linear_lowbit import (
    FORMAT_VERSION,
    PackedFormatError,
    PackedWeight,
    checkpoint,
    linear,
    load_packed,
    pack,
    packing_error,
    save_packed,
)


@pytest.mark.parametrize(("bits", "zero_point"), [(4, False), (4, True), (8, False), (16, False)])
def test_what_is_saved_comes_back(tmp_path: Path, bits: int, zero_point: bool) -> None:
    weight, norm, x = torch.randn(40, 64), torch.randn(64), torch.randn(5, 64)
    packed = pack(weight, bits, 32, zero_point=zero_point)
    save_packed(tmp_path / "packed.safetensors", {"down": packed, "norm": norm})
    loaded = load_packed(tmp_path / "packed.safetensors")
    assert isinstance(loaded["down"], PackedWeight) and torch.equal(loaded["norm"], norm)
    assert torch.equal(linear(x, loaded["down"]), linear(x, packed))


@pytest.mark.parametrize("names", [("a", "b"), ("a", "bb"), ("a" * 40, "b")])
def test_weights_read_from_a_file_start_on_cache_lines(tmp_path: Path, names: tuple[str, str]) -> None:
    weights = {name: pack(torch.randn(40, 64), 4) for name in names} | {"norm": torch.ones(64)}
    save_packed(tmp_path / "model.safetensors", weights)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = load_packed(tmp_path / "model.safetensors")
    for name in names:
        packed = loaded[name]
        assert isinstance(packed, PackedWeight) and packed.data.data_ptr() % 64 == 0
        assert torch.equal(packed.data, weights[name].data)


def test_a_file_of_another_version_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "packed.safetensors"
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", FORMAT_VERSION + 1)
    save_packed(file, {"down": pack(torch.randn(8, 32), 4, 32)})
    monkeypatch.undo()
    with pytest.raises(PackedFormatError, match=f"packed format {FORMAT_VERSION + 1}, this version reads 1 and "):
        load_packed(file)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"a": torch.zeros(2)}, None, "is no packed checkpoint"),
        (
            {"a": torch.zeros(2)},
            {"format": "dovetail-packed", "format_version": str(FORMAT_VERSION)},
            "which of its weights",
        ),
        (
            {"a": torch.zeros(2, dtype=torch.uint8)},
            {
                "format": "dovetail-packed",
                "format_version": str(FORMAT_VERSION),
                "packed": json.dumps({"a": {"out_features": 8, "in_features": 32, "bits": 4, "group_size": 32}}),
            },
            "is damaged: packed data must be 576",
        ),
        (
            {"a": torch.zeros(2)},
            {"format": "dovetail-packed", "format_version": str(FORMAT_VERSION), "packed": '{"b": {}}'},
            "does not hold: b",
        ),
    ],
)
def test_damaged_files_are_refused_by_name(
    tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None, message: str
) -> None:
    file = tmp_path / "packed.safetensors"
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(PackedFormatError, match=message):
        load_packed(file)


def test_bytes_that_are_no_safetensors_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "packed.safetensors"
    file.write_bytes(b"nonsense")
    with pytest.raises(PackedFormatError, match="not a safetensors file"):
        load_packed(file)


def test_packing_error_falls_with_the_bits() -> None:
    weight = torch.randn(64, 128)
    errors = [packing_error(weight, pack(weight, bits, 32)) for bits in (4, 8, 16, 32)]
    relative = [error.relative for error in errors]
    assert relative == sorted(relative, reverse=True) and relative[0] < 0.1 and relative[3] == 0.0
    assert errors[0].largest < 1.0
    assert packing_error(torch.zeros(32, 32), pack(torch.zeros(32, 32), 4, 32)).relative == 0.0
