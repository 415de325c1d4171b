"""From a folder or a GGUF file to a target: which engine computes it, for how long a context, and loaded."""

from __future__ import annotations

import functools
import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch

from kernels.decoder_layer.form import MODEL_TYPES
from server.own_models import is_gguf
from server.placement.machine import available_bytes, compute_with
from server.settings import LLAMA_CPP, NATIVE
from server.targets.checkpoint import context_limit, read_config
from server.targets.context import MemoryPlan, Wanted, cache_shape, plan_memory
from server.targets.gguf.configuration import BeyondNative, read_configuration
from server.targets.gguf.header import open_gguf
from server.targets.gguf.loading import load_dequantised, load_gguf_target, why_not_native
from server.targets.gguf.weights import GGUFWeights
from server.targets.layer_stream import Stream
from server.targets.llama_cpp.library import INSTALL
from server.targets.llama_cpp.memory import context_and_cache
from server.targets.llama_cpp.target import LlamaCppTarget
from server.targets.native_target import CreateNative, NativeTarget
from server.targets.native_target import load_target as load_folder
from server.targets.packed_model import model_of
from server.targets.split_target import SplitTarget
from server.targets.target import Target, TargetError
from server.targets.torch_target import TorchTarget, load_transformers_model
from server.targets.upper_layers import Split

logger = logging.getLogger(__name__)


def choose_engine(path: Path, wanted: str | None, weights: str | None) -> str:
    """``native`` or ``llama.cpp``; ``wanted`` None: llama.cpp for GGUF files that the native layers do not compute.

    Errors: TargetError for damaged files, for what llama.cpp is not asked with, and for files that need it where it is
    not installed.
    """
    if wanted == LLAMA_CPP:
        check_llama_cpp(path, weights)
        return LLAMA_CPP
    if wanted == NATIVE or not is_gguf(path) or weights is not None:
        return NATIVE
    try:
        reason = layers_reason(path)
    except BeyondNative as error:
        if not installed():
            raise TargetError(f"{error}; llama.cpp may compute it: {INSTALL}") from error
        reason = str(error)
    if reason is None:
        return NATIVE
    if not installed():
        logger.warning("llama.cpp would compute %s as it is: %s", path.name, INSTALL)
        return NATIVE
    logger.info("llama.cpp computes %s: %s", path.name, reason)
    return LLAMA_CPP


def check_llama_cpp(path: Path, weights: str | None) -> None:
    """Errors: TargetError where llama.cpp is asked for and cannot be had."""
    if not is_gguf(path):
        raise TargetError(f"--engine llama.cpp takes a .gguf file, not {path}; `dovetail convert --to gguf` writes one")
    if weights is not None:
        raise TargetError(f"llama.cpp computes {path} as stored; leave --weights {weights} out, or --engine llama.cpp")
    if not installed():
        raise TargetError(f"--engine llama.cpp needs llama-cpp-python: {INSTALL}")


def installed() -> bool:
    """Whether llama-cpp-python is there."""
    return importlib.util.find_spec("llama_cpp") is not None


def layers_reason(path: Path) -> str | None:
    """None where the native layers compute the file as stored. Errors: BeyondNative, TargetError."""
    file = open_gguf(path)
    model = model_of(read_configuration(file), path)
    GGUFWeights(file, model.config)
    return why_not_native(model)


def load_target(
    path: Path, weights: str | None, num_slots: int, capacity: int, threads: int | None, kv_cache: str | None = None,
    engine: str | None = None, gpu_layers: int = 0, split: Split | None = None, stream: Stream | None = None,
) -> Target:  # fmt: skip
    """The target with ``capacity`` rows a slot; ``threads`` None takes every usable core; ``split`` cuts a native one,
    ``stream`` reads its prompts on a device.

    Errors: TargetError, PackedFormatError.
    """
    if choose_engine(path, engine, weights) == LLAMA_CPP:
        return LlamaCppTarget.load(path, num_slots, capacity, compute_with(threads), kv_cache, gpu_layers)
    if gpu_layers:
        raise TargetError(f"--gpu-layers is llama.cpp's, and {path.name} is computed by the native layers, on the CPU")
    return load_own_target(path, weights, num_slots, capacity, threads, kv_cache, split, stream)


def load_own_target(
    path: Path, weights: str | None, num_slots: int, capacity: int, threads: int | None, kv_cache: str | None = None,
    split: Split | None = None, stream: Stream | None = None,
) -> TorchTarget:  # fmt: skip
    """The target on the native layers, else on transformers'. Errors: TargetError, PackedFormatError."""
    compute_with(threads)
    load = load_gguf_target if is_gguf(path) else load_folder
    if (split or stream) and not rows_on_device(model_config(path)):
        logger.warning("transformers' layers of %s cannot run row by row, so a GPU gets none of them", path.name)
        split = stream = None
    create: CreateNative = functools.partial(NativeTarget, stream=stream)
    if split is not None:
        create = functools.partial(SplitTarget, split=split, stream=stream)
    target = load(path, weights, num_slots, capacity, kv_cache, create)
    if isinstance(target, NativeTarget):
        # The heavy work has a pool of its own; torch's threads would only fight it for the cores.
        torch.set_num_threads(1)
    elif split is not None or stream is not None:
        logger.warning("%s does not run on the native layers, so a GPU gets none of its layers", path.name)
    slots = target.slots
    logger.info(
        "KV cache: %s, %d bytes a position, %.1f MiB for a slot of %d positions, %d slots",
        str(slots.keys.dtype).removeprefix("torch."), slots.bytes_per_position,
        slots.bytes_per_position * capacity / 2**20, capacity, num_slots,
    )  # fmt: skip
    return target


def rows_on_device(config: Any) -> bool:
    """Whether transformers' own layers, which run on accelerators, take the rows of a pass; unknown ones might."""
    known = MODEL_TYPES.get(config.get_text_config().model_type)
    return known is None or known.hands_on


def memory_plan(path: Path, wanted: Wanted, num_slots: int, kv_cache: str | None, engine: str = NATIVE) -> MemoryPlan:
    """What is served of what the model's positions allow and the memory holds. Errors: TargetError."""
    files = [path] if is_gguf(path) else list(path.glob("*.safetensors"))
    free_bytes = available_bytes() - sum(file.stat().st_size for file in files)
    if engine == LLAMA_CPP:
        limit, shape = context_and_cache(open_gguf(path), num_slots, kv_cache)
    else:
        config = model_config(path)
        limit, shape = context_limit(config, path), cache_shape(config.get_text_config(), num_slots, kv_cache)
    return plan_memory(path.name, limit, wanted, shape, free_bytes)


def model_config(path: Path) -> Any:
    """transformers' configuration of a folder or a GGUF file. Errors: TargetError."""
    return read_configuration(open_gguf(path)) if is_gguf(path) else read_config(path)


def transformers_model(path: Path, dtype: torch.dtype) -> Any:
    """transformers' own model of a folder or a GGUF file, with our attention plugged in. Errors: TargetError."""
    return load_dequantised(path, dtype) if is_gguf(path) else load_transformers_model(path, dtype)
