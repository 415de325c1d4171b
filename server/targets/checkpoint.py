"""Look at a model folder before loading it: every file named, present and whole, and none of them a pickle.

Then read from it tensor by tensor: ``ModelFiles`` fills one module of a model at a time.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig

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


class ModelFiles:
    """The tensors of a folder by name, read by memory map when asked: what is dropped again costs nothing.

    ``base_prefix`` is what transformers puts before the base model's names (``model``); files saved without it are
    understood too. Errors: TargetError naming what is missing, does not fit, or cannot be read as plain weights.
    """

    def __init__(self, folder: Path, base_prefix: str) -> None:
        check_files(folder)
        self.folder = folder
        files: list[Any] = [safe_open(folder / file, framework="pt") for file in weight_files(folder)]
        self.places = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a mapping
        self.absent_prefix = (
            "" if any(name.startswith(f"{base_prefix}.") for name in self.places) else f"{base_prefix}."
        )

    def fill(self, module: nn.Module, prefix: str, dtype: torch.dtype | None = None) -> None:
        """Give ``module``, which the whole model knows as ``prefix``, its weights: in ``dtype``, or as stored."""
        tensors = {name: self.read(f"{prefix}.{name}").to(dtype) for name, _ in module.named_parameters()}
        try:
            module.load_state_dict(tensors, strict=False, assign=True)
        except RuntimeError as error:
            raise TargetError(f"the weights in {self.folder} do not fit its config.json: {error}") from error
        module.requires_grad_(False)

    def read(self, name: str) -> Tensor:
        """One tensor in the type it is stored in."""
        stored = name.removeprefix(self.absent_prefix)
        if stored not in self.places:
            raise TargetError(f"the weights in {self.folder} do not fit its config.json: they lack {name}")
        tensor: Tensor = self.places[stored].get_tensor(stored)
        if not tensor.is_floating_point():
            raise TargetError(
                f"{name} in {self.folder} holds {tensor.dtype}: these weights are quantised already; give the original"
            )
        return tensor


def read_config(folder: Path) -> Any:
    """The model's configuration, as transformers reads it. Errors: TargetError for a missing or contradictory one."""
    if not (folder / "config.json").is_file():
        raise TargetError(f"{folder} has no config.json; a target is a folder as transformers saves it")
    try:
        return copy.deepcopy(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise TargetError(f"{folder}/config.json does not describe a model: {error}") from error


def check_plain(config: Any, folder: Path) -> None:
    """Refuse a checkpoint that another tool quantised: its bytes are no weights yet."""
    if getattr(config, "quantization_config", None) is not None:
        raise TargetError(f"{folder} is quantised already, says its config.json; give the original weights")
