"""What ``dovetail train drafter`` would take of memory and disk, told without loading any weights."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from drafters.train.capture import describe
from drafters.train.feature_source import Samples, data_samples, training_layers
from drafters.train.options import DrafterRecipe
from server.feature_source import chat_codec, check_data
from server.launch import resolve_target
from server.own_models import is_gguf
from server.targets.checkpoint import stored_weights
from server.targets.loading import model_config
from server.targets.target import TargetError

logger = logging.getLogger(__name__)

WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.125, "int4": 0.625}
"""Of one weight of the target with the scales of its group."""


def plan_drafter(recipe: dict[str, Any]) -> dict[str, Any]:
    """The estimate as JSON has it: ``memory`` in bytes on the training device, ``target_bytes`` in main memory.

    ``samples`` and ``tokens`` count training and held-out data together; they and ``captured_bytes`` are None where the
    target has its answers still to write, or where nothing is captured. Errors: RecipeError, CorpusError, TargetError,
    LaunchError, DrafterError.
    """
    tables = DrafterRecipe.read(recipe)
    data = tables.data
    folder = resolve_target(data.target)
    if data.weights not in (None, *WEIGHT_BYTES):
        raise TargetError(f"weights {data.weights!r} are not available; allowed are {', '.join(WEIGHT_BYTES)}")
    target = target_shape(folder)
    matrix = target.vocab_size * target.hidden_size * borrowed_number_bytes(folder, data.weights)
    borrowed = matrix if target.is_tied else 2 * matrix
    memory = tables.memory(tables.config(target.vocab_size, target.hidden_size), borrowed)
    plan: dict[str, Any] = {
        "memory": {**dataclasses.asdict(memory), "total": memory.total},
        "target_bytes": target_bytes(folder, data.weights, target.num_parameters),
        "samples": None,
        "tokens": None,
        "captured_bytes": None,
    }
    logger.info("training takes about %s", memory)
    logger.info("beside it the target takes %.2f GB of main memory", plan["target_bytes"] / 1e9)
    check_data(data)
    if data.answers is None:
        train_data, held_out_data = data_samples(data, chat_codec(data, folder), target.vocab_size)
        parts: list[Samples] = [train_data] if held_out_data is None else [train_data, held_out_data]
        layers = training_layers(tables.shape.features)
        manifests = [describe(part, str(folder), target.hidden_size, layers) for part in parts]
        plan["samples"] = sum(manifest.num_samples for manifest in manifests)
        plan["tokens"] = sum(manifest.num_tokens for manifest in manifests)
        if data.captured is not None:
            plan["captured_bytes"] = sum(manifest.num_bytes for manifest in manifests)
            logger.info("captured features take %.1f MB in %s", plan["captured_bytes"] / 1e6, data.captured)
    return plan


@dataclasses.dataclass(frozen=True)
class TargetShape:
    """What a target's configuration says."""

    vocab_size: int
    hidden_size: int
    is_tied: bool
    num_parameters: int


def target_shape(path: Path) -> TargetShape:
    """Sizes of a model's configuration, its parameters counted on the meta device. Errors: TargetError."""
    config = model_config(path)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise TargetError(f"{path} has no configuration of a causal language model: {error}") from error
    text = config.get_text_config()
    return TargetShape(
        text.vocab_size,
        text.hidden_size,
        bool(text.tie_word_embeddings),
        sum(parameter.numel() for parameter in model.parameters()),
    )


def target_bytes(path: Path, weights: str | None, num_parameters: int) -> int:
    """Main memory of the target's weights; a GGUF file's own codes stay as many bytes as they are there."""
    if weights is None and is_gguf(path):
        return path.stat().st_size
    return round(num_parameters * WEIGHT_BYTES[weights or stored_weights(path)])


def borrowed_number_bytes(path: Path, weights: str | None) -> int:
    """Bytes of one number of the embedding and the LM head that the drafter borrows."""
    if weights is None:
        weights = "fp32" if is_gguf(path) else stored_weights(path)
    return 4 if weights == "fp32" else 2
