"""A target's shape and its sizes in bytes, from a configuration alone. No torch, no weights."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0625, "int4": 0.5625}
"""Bytes of a weight of the products; 8 and 4 bits carry a 16-bit scale for every group of 32."""
HEAD_BYTES = WEIGHT_BYTES | {"int4": WEIGHT_BYTES["int8"]}
"""Bytes of a weight of the head, which is never held in 4 bits."""
STORED = "stored"
"""The weights of a GGUF file with the file's own codes, in the bytes they take there."""
FP16 = 2


class PlanError(ValueError):
    """A plan cannot be made; the message says what is missing or what would be needed."""


@dataclass(frozen=True)
class TargetShape:
    """A Llama-like model. Every size follows: products are counted, biases are not.

    stored_bytes: what a weight of the layers takes in the file, where the shape was read from one that has codes.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool = False
    max_context: int = 4096
    stored_bytes: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name not in ("name", "tied", "stored_bytes") and (
                not isinstance(value, int) or isinstance(value, bool) or value < 1
            ):
                raise PlanError(f"{self.name}: {name} is {value!r}; it must be a whole number of at least 1")

    @property
    def block_parameters(self) -> int:
        """Weights of one decoder layer's products."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def layer_parameters(self) -> int:
        """One decoder layer with its two norms."""
        return self.block_parameters + 2 * self.hidden_size

    @property
    def head_parameters(self) -> int:
        """The LM head, which is as large as the embedding."""
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Everything; a tied head counts once."""
        ends = self.head_parameters * (1 if self.tied else 2) + self.hidden_size
        return self.num_layers * self.layer_parameters + ends

    def weight_bytes(self, weights: str) -> float:
        """Bytes of a weight, its scales counted. Errors: PlanError for a format that is none, or not to be had here."""
        if weights == STORED and self.stored_bytes is not None:
            return self.stored_bytes
        if weights not in WEIGHT_BYTES:
            known = [*WEIGHT_BYTES, *([] if self.stored_bytes is None else [STORED])]
            raise PlanError(f"weights {weights!r} are not known; allowed are {', '.join(known)}")
        return WEIGHT_BYTES[weights]

    def head_bytes(self, weights: str) -> float:
        """What the head takes, which is read once a pass."""
        return self.head_parameters * HEAD_BYTES.get(weights, self.weight_bytes(weights))

    def target_bytes(self, weights: str) -> float:
        """All of the target in memory: layers, norm and head as they are read, and the embedding beside the head, also
        where they are tied: in 16 bits, in fp32 beside fp32 weights and a file's own codes."""
        layers = self.num_layers * self.layer_parameters * self.weight_bytes(weights)
        embedding = self.head_parameters * (4 if weights in ("fp32", STORED) else 2)
        return layers + self.head_bytes(weights) + embedding + 4 * self.hidden_size

    def kv_bytes(self, num_layers: int, weights: str) -> int:
        """Bytes that ``num_layers`` layers on the CPU keep for one position: fp32 beside fp32 weights, else bf16."""
        return self.kv_elements(num_layers) * (4 if weights == "fp32" else 2)

    def kv_elements(self, num_layers: int) -> int:
        """Numbers that ``num_layers`` layers keep for one position."""
        return 2 * num_layers * self.num_kv_heads * self.head_dim

    def drafter_parameters(self, num_blocks: int) -> int:
        """A Dovetail drafter of ``num_blocks`` blocks of the target's shape: fusion, blocks, norms.

        The first block has no input norm. Embedding and head are the target's, and are counted apart.
        """
        fusion = 4 * self.hidden_size**2 + self.hidden_size
        return fusion + num_blocks * self.layer_parameters - self.hidden_size


SHAPES = {
    shape.name: shape
    for shape in (
        TargetShape("llama2-7b", 4096, 11008, 32, 32, 32, 128, 32000),
        TargetShape("llama2-13b", 5120, 13824, 40, 40, 40, 128, 32000),
        TargetShape("llama3-8b", 4096, 14336, 32, 32, 8, 128, 128256, max_context=8192),
        TargetShape("smollm2-135m", 576, 1536, 30, 9, 3, 64, 49152, tied=True, max_context=8192),
        TargetShape("1B", 2048, 5632, 16, 32, 8, 64, 32000),
        TargetShape("3B", 3072, 8192, 28, 24, 8, 128, 32000),
        TargetShape("7B", 4096, 11008, 32, 32, 32, 128, 32000),
    )
}


def shape_from_config(config: Mapping[str, Any], name: str) -> TargetShape:
    """The shape that a transformers configuration describes. Errors: PlanError naming the key that is missing."""
    text = config.get("text_config") or config
    if not isinstance(text, Mapping):
        raise PlanError(f"{name}: text_config of config.json is no object")
    wanted = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if missing := [key for key in wanted if not isinstance(text.get(key), int)]:
        raise PlanError(
            f"{name}: config.json has no whole number for {', '.join(missing)}; plans need a Llama-like model"
        )
    if text.get("num_local_experts") or text.get("num_experts"):
        raise PlanError(f"{name} is a mixture of experts, whose layers are not read whole for a token: not planned for")
    num_heads = text["num_attention_heads"]
    return TargetShape(
        name=name,
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        num_layers=text["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=text.get("num_key_value_heads") or num_heads,
        head_dim=text.get("head_dim") or text["hidden_size"] // max(num_heads, 1),
        vocab_size=text["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        max_context=text.get("max_position_embeddings") or 4096,
    )


def read_shape(target: str) -> TargetShape:
    """The shape of a bare name, a folder with config.json, a GGUF file (its header), or a hub id (its config.json).

    Errors: PlanError.
    """
    if target in SHAPES:
        return SHAPES[target]
    folder = Path(target).expanduser()
    if folder.suffix == ".gguf":
        return shape_from_gguf(folder)
    if folder.is_dir():
        file = folder / "config.json"
    elif target.count("/") == 1 and not target.startswith((".", "/", "~")):
        file = fetch_config(target)
    else:
        raise PlanError(
            f"{target!r} is no folder, no .gguf file, no hub id (owner/name), and none of {', '.join(SHAPES)}"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise PlanError(f"{file} holds no object")
    return shape_from_config(config, folder.name or target)


def shape_from_gguf(file: Path) -> TargetShape:
    """The shape in a GGUF file's header, with what a weight of its layers takes. Errors: PlanError."""
    from server.targets.gguf.configuration import read_configuration
    from server.targets.gguf.header import open_gguf
    from server.targets.target import TargetError

    try:
        opened = open_gguf(file)
        shape = shape_from_config(read_configuration(opened).to_dict(), file.stem)
    except TargetError as error:
        raise PlanError(str(error)) from error
    matrices = [tensor for name, tensor in opened.tensors.items() if name.startswith("blk.") and len(tensor.shape) > 1]
    num_bytes = sum(len(tensor.data) for tensor in matrices)
    return dataclasses.replace(shape, stored_bytes=num_bytes / sum(math.prod(tensor.shape) for tensor in matrices))


def fetch_config(name: str) -> Path:
    """config.json of a hub id."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise PlanError(f"{name!r} is no local folder, and the hub did not give its config.json: {error}") from error
