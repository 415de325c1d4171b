"""Look at a model folder before loading it: every file named, present and whole, and none of them a pickle."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from server.targets.target import TargetError

INDEX = "model.safetensors.index.json"


def check_files(folder: Path) -> None:
    """Errors: TargetError naming the missing, truncated or refused file."""
    if not folder.is_dir():
        raise TargetError(f"{folder} is not a folder; a target is a folder of safetensors or a hub id")
    if not (folder / "config.json").is_file():
        raise TargetError(f"{folder} has no config.json; a target is a folder as transformers saves it")
    for name in weight_files(folder):
        check_whole(folder / name)


def weight_files(folder: Path) -> list[str]:
    """The safetensors files the folder's index, or its contents, name."""
    index = folder / INDEX
    if index.is_file():
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
    if pickles:
        raise TargetError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when loaded; convert it to "
            "safetensors with transformers' save_pretrained on a machine you trust with it"
        )
    raise TargetError(f"{folder} has no weights: no *.safetensors file")


def check_whole(file: Path) -> None:
    """Refuse a weights file that is missing or shorter than its header says."""
    if not file.is_file():
        raise TargetError(f"the weights file {file} is missing; the index names it")
    try:
        with safe_open(file, framework="numpy") as tensors:
            tensors.keys()
    except SafetensorError as error:
        raise TargetError(f"the weights file {file} is truncated or damaged ({error}); fetch it again") from error
