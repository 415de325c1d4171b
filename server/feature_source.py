"""A target as the source of features that a drafter learns from: any target, exactly as it will be served."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drafters.train.capture import capture, describe
from drafters.train.feature_source import DataOptions, FeatureSource, OnTheFlySource, Samples, data_samples
from server.launch import load_target, resolve_model
from server.targets.target import PrefillChunk, Target

SLOT = 0


def fingerprint(target: Target) -> str:
    """Identifies a target by its name and the bytes of its embedding, so features and drafters can be told apart."""
    weights = target.embedding().detach().cpu().contiguous().view(torch.uint8).flatten()
    return f"{target.info.name}:{hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:16]}"


def features_of(target: Target, token_ids: Tensor) -> Tensor:
    """[B, T, W] the selected features of whole sequences [B, T], each run alone from its first position."""
    rows = []
    for sequence in token_ids.tolist():
        rows.append(target.prefill(PrefillChunk(SLOT, sequence)).features)
        target.release(SLOT)
    # The engine's passes run in inference mode, whose tensors autograd refuses; a copy is an ordinary tensor.
    return torch.stack(rows).clone().to(token_ids.device)


def captured(target: Target, samples: Samples, folder: Path) -> Samples:
    """The samples with their features on disk; what is missing there is computed now."""
    manifest = describe(samples, fingerprint(target), target.info.hidden_size)
    return capture(samples, lambda token_ids: features_of(target, token_ids), folder, manifest)


def source_for(options: DataOptions) -> FeatureSource:
    """Load the target a recipe's ``[data]`` table names; features on the fly, or captured first where it says so."""
    folder = resolve_model(options.target, "target")
    target = load_target(folder, options.weights, num_slots=1, capacity=options.window_length, threads=None)
    train_data, held_out_data = data_samples(options, folder)
    if options.captured is not None:
        folders = Path(options.captured).expanduser()
        train_data = captured(target, train_data, folders / "train")
        if held_out_data is not None:
            held_out_data = captured(target, held_out_data, folders / "held_out")
    embedding = target.embedding()
    lm_head = target.lm_head()
    return OnTheFlySource(
        lambda token_ids: features_of(target, token_ids),
        embedding,
        embedding if lm_head is embedding else lm_head,
        fingerprint(target),
        train_data,
        held_out_data,
    )


def train_drafter(recipe: dict[str, Any], resume: bool) -> Any:
    """``dovetail train drafter``: run a recipe; the report's checkpoint is a drafter folder ready to serve."""
    from drafters.train.drafter_task import train_drafter as train

    return train(recipe, source_for, resume=resume)
