"""``dovetail convert --weights``: a folder of safetensors into a packed folder that loads by memory map."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from kernels.decoder_layer import PackedDecoderLayer, packing_errors
from kernels.decoder_layer.scaling import check_scaling, record_inputs, scale_layer
from kernels.tree_attention import KVSlots, causal_segment
from kernels.tree_attention.transformers_plugin import RowPass
from server.own_models import is_gguf
from server.placement.devices import CPU
from server.targets.checkpoint import INDEX, ModelFiles
from server.targets.gguf.folders import model_configuration, write_configuration
from server.targets.gguf.header import open_gguf
from server.targets.gguf.loading import pack_stored
from server.targets.gguf.weights import GGUFWeights
from server.targets.packed_model import (
    BITS,
    GROUP_SIZE,
    check_model,
    embedding_factor,
    empty_model,
    is_packed,
    model_of,
    pack_from,
    pack_model,
    save_packed_model,
)
from server.targets.target import TargetError

KEPT_FILES = ("*.json", "*.jinja")
CALIBRATION_WINDOW = 512
STORED = "stored"


@dataclass(frozen=True)
class ConversionOptions:
    """weights: bf16, int8 or int4 in groups of ``group_size``, or ``stored``, a GGUF file's own codes.

    calibration: a text file for activation-aware scaling; calibration_tokens: how many of its tokens are run. report:
    measure how far each packed matrix is from the original.
    """

    weights: str
    group_size: int = GROUP_SIZE
    calibration: Path | None = None
    calibration_tokens: int = 2048
    report: bool = False


@dataclass(frozen=True)
class TargetConversion:
    """packed_bytes: of all matrices. layers: for each, |packed - original| / |original| by matrix (``report``).

    scaling: for each layer what activation-aware scaling found. Errors of scaled layers are against the scaled weights.
    """

    output: str
    weights: str
    group_size: int
    packed_bytes: int
    original_bytes: int
    layers: list[dict[str, float]] = field(default_factory=list)
    scaling: list[list[dict[str, Any]]] = field(default_factory=list)


def convert_target(source: Path, output: Path, options: ConversionOptions) -> TargetConversion:
    """Pack ``source`` into the new folder ``output``, with its config and tokenizer beside it.

    Errors: TargetError for what cannot be packed, UnsupportedLayer for architectures without native layers.
    """
    if is_gguf(source):
        return convert_gguf(source, output, options)
    if options.weights not in BITS:
        raise TargetError(f"weights {options.weights!r} have no packed form; allowed are {', '.join(BITS)}")
    if is_packed(source):
        raise TargetError(f"{source} is packed already; convert the original folder of safetensors")
    if output.exists() and any(output.iterdir()):
        raise TargetError(f"{output} is not empty; name a new folder")
    errors: list[dict[str, float]] = []
    calibration = None if options.calibration is None else Calibration(source, options)

    def inspect(_: int, layer: nn.Module, packed: PackedDecoderLayer) -> None:
        if options.report:
            found = packing_errors(layer, packed)
            errors.append({name: round(error.relative, 6) for name, error in found.items()})

    packed = pack_model(
        source, options.weights, options.group_size, None if calibration is None else calibration.scale, inspect
    )
    output.mkdir(parents=True, exist_ok=True)
    for pattern in KEPT_FILES:
        for file in source.glob(pattern):
            if file.name != INDEX:
                shutil.copy(file, output / file.name)
    save_packed_model(packed, output)
    return TargetConversion(
        output=str(output),
        weights=options.weights,
        group_size=options.group_size,
        packed_bytes=packed.packed_bytes,
        original_bytes=sum(file.stat().st_size for file in source.glob("*.safetensors")),
        layers=errors,
        scaling=[] if calibration is None else calibration.found,
    )


def convert_gguf(source: Path, output: Path, options: ConversionOptions) -> TargetConversion:
    """Pack a GGUF file into a new folder: its own codes (``stored``), or its values in another format.

    Errors: TargetError, UnsupportedLayer for architectures without native layers.
    """
    if options.weights not in (STORED, *BITS):
        raise TargetError(f"weights {options.weights!r} have no packed form; allowed are {', '.join((STORED, *BITS))}")
    if options.calibration is not None or options.report:
        raise TargetError("--calibration and --report compare with original weights, which a GGUF file does not hold")
    file = open_gguf(source)
    model = model_of(model_configuration(file), source)
    check_model(model)
    files = GGUFWeights(file, model.config)
    stored = options.weights == STORED
    packed = pack_stored(model, files) if stored else pack_from(model, files, options.weights, options.group_size)
    write_configuration(file, output)
    save_packed_model(packed, output)
    return TargetConversion(
        output=str(output),
        weights=packed.weights,
        group_size=options.group_size,
        packed_bytes=packed.packed_bytes,
        original_bytes=source.stat().st_size,
    )


class Calibration:
    """Runs a text through the layers as they are filled, one after the other, and scales each by what it saw.

    The hidden states are those of the unquantised model: scaled layers compute the same in floats.
    """

    def __init__(self, folder: Path, options: ConversionOptions) -> None:
        """Errors: TargetError for a text shorter than two tokens or a folder without tokenizer."""
        if options.calibration is None:
            raise TargetError("a calibration needs a text")
        model = empty_model(folder)
        check_model(model)
        base = model.base_model
        files = ModelFiles(folder, model.base_model_prefix)
        for layer in base.layers:
            check_scaling(layer)
        files.fill(base.embed_tokens, f"{model.base_model_prefix}.embed_tokens", torch.float32)
        token_ids = read_tokens(folder, options.calibration, options.calibration_tokens)
        self.bits, self.group_size = BITS[options.weights], options.group_size
        self.found: list[list[dict[str, Any]]] = []
        self.lengths = [
            min(CALIBRATION_WINDOW, len(token_ids) - start) for start in range(0, len(token_ids), CALIBRATION_WINDOW)
        ]
        embedded = functional.embedding(token_ids, base.embed_tokens.weight)
        self.hidden = embedded[None].detach() * embedding_factor(model)
        positions = torch.cat([torch.arange(length) for length in self.lengths])
        self.position_embeddings: tuple[Tensor, Tensor] = base.rotary_emb(self.hidden, positions[None])
        attention = base.layers[0].self_attn
        heads = attention.k_proj.out_features // attention.head_dim
        self.slots = KVSlots(len(self.lengths), CALIBRATION_WINDOW, 1, heads, attention.head_dim, torch.float32, CPU)

    @torch.inference_mode()
    def scale(self, _: int, layer: nn.Module) -> None:
        """Run the layer on what the layers before it gave, then scale it."""
        layer.float()
        attention: Any = layer.self_attn
        attention.layer_idx = 0  # the slots hold one layer
        segments = [causal_segment(slot, 0, length) for slot, length in enumerate(self.lengths)]
        outputs: list[Tensor] = []

        def run() -> None:
            row_pass = RowPass(self.slots, segments)
            outputs.append(
                layer(self.hidden, position_embeddings=self.position_embeddings, attention_mask=None, row_pass=row_pass)
            )

        inputs = record_inputs(layer, run)
        found = scale_layer(layer, inputs, self.bits, self.group_size)
        self.found.append([vars(scaled) for scaled in found])
        self.hidden = outputs[0]


def read_tokens(folder: Path, text: Path, limit: int) -> Tensor:
    """The first ``limit`` token ids of a text file. Errors: TargetError for no tokenizer or fewer than two tokens."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise TargetError(f"{folder} has no tokenizer.json, which turns the text into tokens")
    ids = Tokenizer.from_file(str(file)).encode(text.read_text(encoding="utf-8")).ids[:limit]
    if len(ids) < 2:
        raise TargetError(f"{text} gives {len(ids)} tokens; at least 2 are needed")
    return torch.tensor(ids)
