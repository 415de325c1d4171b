"""What ``dovetail train drafter`` would take of memory and disk, told without loading any weights."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from drafters.train.capture import describe
from drafters.train.feature_source import Samples, data_samples, training_layers
from drafters.train.options import DrafterRecipe
from server.feature_source import check_data
from server.launch import resolve_target
from server.targets.target import TargetError

logger = logging.getLogger(__name__)

WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.125, "int4": 0.625}
"""Of one weight of the target with the scales of its group."""
BORROWED_BYTES = {"fp32": 4}
"""Of one number of the embedding and LM head the drafter borrows; bf16 for every other type of weights."""


def plan_drafter(recipe: dict[str, Any]) -> dict[str, Any]:
    """The estimate as JSON has it: ``memory`` in bytes on the training device, ``target_bytes`` in main memory.

    ``samples`` and ``tokens`` count training and held-out data together; they and ``captured_bytes`` are None where the
    target has its answers still to write, or where nothing is captured. Errors: RecipeError, CorpusError, TargetError,
    LaunchError, DrafterError.
    """
    tables = DrafterRecipe.read(recipe)
    data = tables.data
    folder = resolve_target(data.target)
    if data.weights not in WEIGHT_BYTES:
        raise TargetError(f"weights {data.weights!r} are not available; allowed are {', '.join(WEIGHT_BYTES)}")
    target = target_shape(folder)
    matrix = target.vocab_size * target.hidden_size * BORROWED_BYTES.get(data.weights, 2)
    borrowed = matrix if target.is_tied else 2 * matrix
    memory = tables.memory(tables.config(target.vocab_size, target.hidden_size), borrowed)
    plan: dict[str, Any] = {
        "memory": {**dataclasses.asdict(memory), "total": memory.total},
        "target_bytes": round(target.num_parameters * WEIGHT_BYTES[data.weights]),
        "samples": None,
        "tokens": None,
        "captured_bytes": None,
    }
    logger.info("training takes about %s", memory)
    logger.info("beside it the target takes %.2f GB of main memory", plan["target_bytes"] / 1e9)
    check_data(data)
    if data.answers is None:
        train_data, held_out_data = data_samples(data, folder, target.vocab_size)
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


def target_shape(folder: Path) -> TargetShape:
    """Sizes of a model folder's ``config.json``, its parameters counted on the meta device. Errors: TargetError."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise TargetError(f"{folder} has no configuration of a causal language model: {error}") from error
    text = config.get_text_config()
    return TargetShape(
        text.vocab_size,
        text.hidden_size,
        bool(text.tie_word_embeddings),
        sum(parameter.numel() for parameter in model.parameters()),
    )
