"""Look at a model folder before loading it: every file named, present and whole, and none of them a pickle.

Then read from it tensor by tensor: ``ModelFiles`` fills one module of a model at a time. The rules are transformers':
the index or ``model.safetensors`` says which files count, a head that is stored wins over a flag that ties it.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig

from kernels.tree_attention.transformers_plugin import ATTENTION_NAME
from server.targets.target import TargetError

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEAD = "lm_head.weight"
FLOATS = {"F64", "F32", "F16", "BF16"}  # of safetensors; anything narrower is somebody's quantisation
STORED_AS = {"F64": "fp32", "F32": "fp32", "F16": "bf16", "BF16": "bf16"}
# transformers' ways of saying that a configuration makes no sense; which one depends on the key.
MALFORMED = (
    OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RuntimeError,
    AssertionError, ImportError, StrictDataclassError,
)  # fmt: skip
SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "max_position_embeddings", "original_max_position_embeddings", "head_dim", "sliding_window",
)  # fmt: skip
FACTORS = (
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_eps", "norm_epsilon",
    "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "attention_multiplier",
    "embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale",
)  # fmt: skip
MAX_SHOWN = 5
NO_MEMORY = re.compile(r"tried to allocate (\d+) bytes")


def check_files(folder: Path) -> None:
    """Errors: TargetError naming the missing, truncated or refused file, or a tensor that holds no plain weights."""
    if not folder.is_dir():
        raise TargetError(f"{folder} is not a folder; a target is a folder of safetensors or a hub id")
    if not (folder / "config.json").is_file():
        raise TargetError(f"{folder} has no config.json; a target is a folder as transformers saves it")
    for name in weight_files(folder):
        check_whole(folder / name)


def weight_files(folder: Path) -> list[str]:
    """The safetensors files that the folder's index names, or the one file of a folder without an index."""
    if (folder / INDEX).is_file():
        return indexed_files(folder)
    if (folder / SINGLE).is_file():
        return [inside(folder, SINGLE, f"{folder}/{SINGLE}")]
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        raise TargetError(
            f"{folder} has neither {SINGLE} nor {INDEX}, so nothing says that {', '.join(others[:MAX_SHOWN])} is the "
            f"whole model; rename the file to {SINGLE}"
        )
    pickles = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
    if pickles:
        raise TargetError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when loaded; convert it to "
            "safetensors with transformers' save_pretrained on a machine you trust with it"
        )
    raise TargetError(f"{folder} has no weights: no *.safetensors file")


def indexed_files(folder: Path) -> list[str]:
    """The files of the weight map, each inside the folder."""
    index = read_object(folder / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise TargetError(f"{folder}/{INDEX}: weight_map is {_shown(weight_map)}; it must name a file for each tensor")
    names = set()
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise TargetError(f"{folder}/{INDEX}: weight_map[{tensor!r}] is {_shown(name)}, which is no file name")
        names.add(inside(folder, name, f"{folder}/{INDEX}: weight_map[{tensor!r}]"))
    return sorted(names)


def inside(folder: Path, name: str, where: str) -> str:
    """``name``, if the file lies in the folder, or is the hub cache's own link from a snapshot to its blobs."""
    try:
        place, root = (folder / name).resolve(), folder.resolve()
        (folder / name).exists()
    except (OSError, ValueError) as error:  # too long, a zero byte, links in a circle
        raise TargetError(f"{where} is {_shown(name)}, which is no file name: {error}") from error
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(place.is_relative_to(ground) for ground in allowed):
        raise TargetError(f"{where} names {name!r}, which lies outside the model's folder; only files in it are read")
    return name


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object. Errors: TargetError naming the file and what is in it instead."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TargetError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise TargetError(f"{file} holds {_shown(content)}; it must be a JSON object")
    return content


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


def check_whole(file: Path) -> None:
    """Refuse a weights file that is missing, shorter than its header says, or quantised by another tool."""
    if not file.is_file():
        raise TargetError(f"the weights file {file} is missing; the index names it")
    try:
        with safe_open(file, framework="numpy") as tensors:
            kinds = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise TargetError(f"the weights file {file} is truncated or damaged ({error}); fetch it again") from error
    for name, kind in kinds.items():
        if name.endswith("weight") and kind not in FLOATS:
            raise TargetError(
                f"{name} in {file} holds {kind}: these weights are quantised already; give the original weights, or a "
                "GGUF file"
            )


def stored_weights(folder: Path) -> str:
    """``fp32`` or ``bf16``: what most of the folder's numbers are stored in; fp16 is computed in bf16 and said so."""
    sizes: Counter[str] = Counter()
    for name in weight_files(folder):
        with safe_open(folder / name, framework="numpy") as tensors:
            for tensor in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(tensor)
                sizes[part.get_dtype()] += torch.Size(part.get_shape()).numel()
    kind = sizes.most_common(1)[0][0] if sizes else "F32"
    if kind == "F16":
        logger.warning(
            "%s is stored in fp16 and computed in bf16, of the same size; --weights fp32 keeps every bit", folder.name
        )
    return STORED_AS.get(kind, "fp32")


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
        self.unused = set(self.places)

    def __contains__(self, name: str) -> bool:
        """Whether the folder stores this tensor."""
        return name.removeprefix(self.absent_prefix) in self.places

    def fill(self, module: nn.Module, prefix: str, dtype: torch.dtype | None = None) -> None:
        """Give ``module``, which the whole model knows as ``prefix``, its weights: in ``dtype``, or as stored."""
        tensors = {}
        for name, parameter in module.named_parameters():
            tensors[name] = self.read(f"{prefix}.{name}", parameter.shape).to(dtype)
        module.load_state_dict(tensors, strict=False, assign=True)
        module.requires_grad_(False)

    def read(self, name: str, shape: torch.Size | None = None) -> Tensor:
        """One tensor in the type it is stored in; its shape is looked up before its bytes are read."""
        stored = name.removeprefix(self.absent_prefix)
        if stored not in self.places:
            raise TargetError(f"the weights in {self.folder} do not fit its config.json: they lack {name}")
        found = list(self.places[stored].get_slice(stored).get_shape())
        if shape is not None and found != list(shape):
            raise TargetError(
                f"the weights in {self.folder} do not fit its config.json: {name} is {found}, the configuration says "
                f"{list(shape)}"
            )
        tensor: Tensor = self.places[stored].get_tensor(stored)
        self.unused.discard(stored)
        return tensor

    def tell_unused(self) -> None:
        """Name the tensors that nothing read: a part of the model would be missing from the answers."""
        unused = sorted(name for name in self.unused if not name.endswith("rotary_emb.inv_freq"))
        tell_unused(self.folder, unused)


def tell_unused(folder: Path, names: list[str]) -> None:
    """One line of the log for tensors of a checkpoint that the model has no place for."""
    if names:
        more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
        logger.warning("%s: tensors that are not used: %s%s", folder, ", ".join(names[:MAX_SHOWN]), more)


def read_config(folder: Path) -> Any:
    """The model's configuration, as transformers reads it. Errors: TargetError naming the file and the key."""
    file = folder / "config.json"
    if not file.is_file():
        raise TargetError(f"{folder} has no config.json; a target is a folder as transformers saves it")
    content = read_object(file)
    check_plain(content, folder)
    check_sizes(content, file)
    try:
        config = copy.deepcopy(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        text = config.get_text_config()
        check_sizes({name: getattr(text, name, None) for name in SIZES}, file)  # whatever the file calls them
        check_factors({name: getattr(text, name, None) for name in FACTORS}, file)
    except TargetError:
        raise
    except MALFORMED as error:
        raise TargetError(f"{file} does not describe a model: {reason_of(error)}") from error
    return config


def check_sizes(fields: Mapping[str, Any], file: Path) -> None:
    """Every size is a whole number of at least 1 that fits into 32 bits, where the architecture has it."""
    for name in SIZES:
        value = fields.get(name)
        if isinstance(value, list):  # sizes layer by layer, in some architectures
            continue
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31):
            raise TargetError(
                f"{file}: {name} is {_shown(value)}; it must be a whole number of at least 1 and below 2**31"
            )


def check_factors(fields: Mapping[str, Any], file: Path) -> None:
    """Every factor is a finite number above 0, where the architecture has it: every text would be nonsense."""
    for name, value in fields.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 < value < math.inf):
            raise TargetError(f"{file}: {name} is {_shown(value)}; it must be a finite number above 0")


def check_plain(fields: Mapping[str, Any], folder: Path) -> None:
    """Refuse a checkpoint that another tool quantised: its bytes are no weights yet."""
    if fields.get("quantization_config") is not None:
        raise TargetError(
            f"{folder} is quantised already, says its config.json; give the original weights, or a GGUF file"
        )


def reason_of(error: Exception) -> str:
    """Why a model cannot be made or run, on one line, in words where transformers' own would not tell a user."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if isinstance(error, KeyError) and ATTENTION_NAME in text:
        return "its attention does not go through transformers' attention registry"
    if isinstance(error, TypeError) and "row_pass" in text:
        return "its layers do not hand the rows' places on to their attention"
    if found := NO_MEMORY.search(text):
        return f"a tensor of the sizes it states would take {int(found[1]) / 2**30:,.0f} GiB, more than there is"
    if isinstance(error, KeyError) and " " not in text:
        return f"transformers knows no {text!r}"
    if isinstance(error, StrictDataclassError):  # the last line is the reason, behind the name of its type
        text = text.splitlines()[-1].strip().partition("Error: ")[2] or text
    return " ".join(text.split())


def context_limit(config: Any, folder: Path) -> int:
    """Positions the model has, by whatever name its configuration gives them. Errors: TargetError where it has none."""
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        raise TargetError(
            f"{folder} cannot be a target: its config has no max_position_embeddings; decoder-only models with "
            "positions given by number can"
        )
    return limit
