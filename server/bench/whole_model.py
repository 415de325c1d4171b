"""Scope ``model`` of ``bench kernels``: whole LLaMA shapes of random weights, ours and llama.cpp's in turns.

Both hold the same weights bit for bit (``packed_gguf``). A pass is what verifying costs: all rows through all layers
and the head; ours with its arg-max, llama.cpp's with the logits of every row.
"""

from __future__ import annotations

import ctypes
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from drafters.proposal import Proposal, chain
from kernels.decoder_layer import PackedDecoderLayer, layer_from_tensors
from kernels.linear_lowbit.bench import (
    BITS,
    GROUP,
    OURS,
    BenchOptions,
    Entry,
    Limits,
    ModelShape,
    Say,
    entries,
    measure_in_turns,
    random_packed,
    torch_threads,
)
from kernels.linear_lowbit.bench_peers import EngineMissing
from kernels.native import PARTS, library, num_threads, profiled
from kernels.tree_attention.transformers_plugin import ATTENTION_NAME
from server.targets.llama_cpp.library import ContextOptions, LlamaCppError, try_out
from server.targets.native_target import NativeTarget
from server.targets.packed_model import HEAD_BITS, PackedModel
from server.targets.target import VerifyRows

LLAMA_CPP = "llama.cpp"
PREFILL = 512  # tokens of context llama.cpp takes at a time
PRODUCTS = "products of ours"
PROFILED_PASSES = 8


@dataclass
class ModelResults:
    """results and skipped as in the report; outside: milliseconds per layer that are no product; parts: where the
    threads' time goes."""

    results: list[Entry] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    outside: list[Entry] = field(default_factory=list)
    parts: list[Entry] = field(default_factory=list)


def bench_models(options: BenchOptions, contexts: Sequence[int], limits: Limits, say: Say) -> ModelResults:
    """Measure every shape, format and context of the options."""
    found = ModelResults()
    if library() is None:
        found.skipped["ours, whole model"] = "NOT BUILT: the native kernels; a C++20 compiler at install builds them"
        return found
    with torch.inference_mode(), torch_threads(1):
        for name in options.shapes:
            for weights in options.weights:
                measure_format(name, weights, options, contexts, limits, say, found)
    return found


def measure_format(
    name: str, weights: str, options: BenchOptions, contexts: Sequence[int], limits: Limits, say: Say,
    found: ModelResults,
) -> None:  # fmt: skip
    """One shape in one format: both models are made, measured and dropped here, so that only one pair lives."""
    say(f"{name} {weights}: whole model, weights")
    capacity = max(contexts) + max(options.rows)
    packed = random_model(options.shape(name), weights, capacity)
    peer = None
    try:
        peer = LlamaCppModel(packed, capacity) if options.peers else None
    except EngineMissing as error:
        found.skipped[LLAMA_CPP] = str(error)
    if peer is not None and not peer.rearranged:
        found.skipped[f"{LLAMA_CPP}, weights laid out anew"] = "NOT ALLOWED here: its AMX tiles end the process"
    measure_model(name, packed, peer, options, contexts, limits, say, found)


def measure_model(
    name: str, packed: PackedModel, peer: LlamaCppModel | None, options: BenchOptions, contexts: Sequence[int],
    limits: Limits, say: Say, found: ModelResults,
) -> None:  # fmt: skip
    """One shape in one format, at each context."""
    target = filled_target(packed, max(contexts), max(options.rows))
    num_layers = len(target.stack)
    for context in sorted(contexts):
        say(f"{name} {packed.weights}: whole model, context {context}")
        target.slots.lengths[0] = context
        passes: dict[str, Callable[[int], float]] = {
            OURS: lambda rows: time_verify(target, rows),
            PRODUCTS: lambda rows: time_products(packed, rows),
        }
        if peer is not None:
            peer.fill(context)
            passes[LLAMA_CPP] = peer.time_decode
        samples = measure_in_turns(passes, options.rows, options.rounds, limits)
        fields: Entry = {"shape": name, "scope": "model", "weights": packed.weights, "group": GROUP, "context": context}
        fields |= {"layers": num_layers}
        found.results += entries(fields | {"engine": OURS}, samples, OURS, packed.packed_bytes)
        found.results += entries(fields | {"engine": LLAMA_CPP}, samples, LLAMA_CPP)
        for rows in options.rows:
            pairs = zip(samples[OURS, rows], samples[PRODUCTS, rows], strict=True)  # of the same round
            between = statistics.median(whole - products for whole, products in pairs)
            found.outside.append(fields | {"rows": rows, "ms_per_layer": round(between / num_layers, 4)})
            found.parts.append(fields | {"rows": rows} | profile_verify(target, rows))


def random_model(shape: ModelShape, weights: str, capacity: int) -> PackedModel:
    """A LLaMA model whose layers are copies of one random layer, each in memory of its own; head as it is served."""
    bits = BITS[weights]
    config = LlamaConfig(
        hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size, num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads, num_key_value_heads=shape.num_kv_heads, vocab_size=shape.vocab_size,
        max_position_embeddings=max(2048, capacity), tie_word_embeddings=False, attn_implementation=ATTENTION_NAME,
    )  # fmt: skip
    with init_empty_weights(include_buffers=False):
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    base = model.base_model
    base.rotary_emb.float()
    base.embed_tokens.weight = nn.Parameter(
        torch.randn(shape.vocab_size, shape.hidden_size).to(torch.bfloat16), requires_grad=False
    )
    base.norm.weight = nn.Parameter(torch.ones(shape.hidden_size, dtype=torch.bfloat16), requires_grad=False)
    names = ("qkv", "output", "gate_up", "down")
    one = {name: random_packed(*size, bits, GROUP) for name, size in zip(names, shape.matrices(), strict=False)}

    def own(layer: nn.Module) -> PackedDecoderLayer:
        tensors: dict[str, Any] = {
            f"layer.{name}": type(weight)(weight.data.clone(), weight.out_features, weight.in_features, bits, GROUP)
            for name, weight in one.items()
        }
        tensors |= {f"layer.{name}": torch.ones(shape.hidden_size) for name in ("input_norm", "post_norm")}
        return layer_from_tensors(tensors, "layer", layer)

    head = random_packed(shape.vocab_size, shape.hidden_size, max(bits, HEAD_BITS), GROUP)
    return PackedModel(model, [own(layer) for layer in base.layers], head, weights, tied=False)


def filled_target(packed: PackedModel, context: int, rows: int) -> NativeTarget:
    """A target whose only slot holds ``context`` random positions and has room for ``rows`` more."""
    target = NativeTarget(packed, "random", 1, context + rows)
    target.slots.keys.normal_()
    target.slots.values.normal_()
    target.slots.lengths[0] = context
    return target


def time_verify(target: NativeTarget, rows: int) -> float:
    """Milliseconds of a verify pass of ``rows`` rows with its arg-max, as the engine calls it."""
    proposal = chain(list(range(1, rows))) if rows > 1 else Proposal()
    start = time.perf_counter()
    target.verify([VerifyRows(0, rows, proposal)])[0].argmax()
    return (time.perf_counter() - start) * 1e3


def profile_verify(target: NativeTarget, rows: int) -> Entry:
    """Milliseconds of a verify pass by part, each the mean over the threads, and the whole pass."""
    with profiled() as threads:
        times = [time_verify(target, rows) for _ in range(PROFILED_PASSES)]
    passes = PROFILED_PASSES * len(threads)
    parts = {part: round(sum(spent[part] for spent in threads) / passes, 4) for part in PARTS}
    return {"ms": round(statistics.mean(times), 3), "threads": len(threads), "parts_ms": parts}


def time_products(packed: PackedModel, rows: int) -> float:
    """Milliseconds of the same products alone, called as cheaply as they can be."""
    native = library()
    assert native is not None
    weights = [weight for layer in packed.layers for weight in layer.matrices]
    weights.append(packed.head)
    inputs = {weight.in_features: torch.randn(rows, weight.in_features) for weight in weights}
    out = torch.empty(rows, max(weight.out_features for weight in weights))
    calls = [(ctypes.byref(weight.descriptor), inputs[weight.in_features].data_ptr()) for weight in weights]
    product, result = native.dovetail_linear, out.data_ptr()
    start = time.perf_counter()
    for descriptor, values in calls:
        product(descriptor, values, rows, result)
    return (time.perf_counter() - start) * 1e3


class LlamaCppModel:
    """llama.cpp with the same weights, called through its C interface; sequence 0 holds the context."""

    def __init__(self, packed: PackedModel, capacity: int) -> None:
        """Errors: EngineMissing without the package, or where it does not load the file."""
        if not (importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf")):
            raise EngineMissing("NOT INSTALLED: `make gguf` builds llama-cpp-python (10 to 15 minutes)")
        import llama_cpp

        from server.bench.packed_gguf import write_packed_gguf

        self.api: Any = llama_cpp
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        options = llama_cpp.llama_model_default_params()
        options.use_mmap = False  # the file is gone once the model is loaded
        with tempfile.TemporaryDirectory(prefix="dovetail-bench-") as scratch:
            file = write_packed_gguf(packed, Path(scratch) / "random.gguf")
            try:
                self.rearranged = try_out(file, ContextOptions(capacity + 256, 1, num_threads())).rearranged
            except LlamaCppError as error:
                raise EngineMissing(str(error)) from error
            options.use_extra_bufts = self.rearranged
            self.model: Any = llama_cpp.llama_model_load_from_file(str(file).encode(), options)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = capacity + 256, PREFILL, PREFILL
        settings.n_threads = settings.n_threads_batch = num_threads()
        self.context: Any = llama_cpp.llama_init_from_model(self.model, settings) if self.model else None
        if not self.context:
            raise EngineMissing("llama.cpp did not load the model written for it")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.length = 0

    def fill(self, context: int) -> None:
        """Bring the context to this length; it only grows."""
        while self.length < context:
            count = min(PREFILL, context - self.length)
            self.decode(count, every_row=False)
            self.length += count

    def time_decode(self, rows: int) -> float:
        """Milliseconds of one ``llama_decode`` of ``rows`` rows behind the context, with the logits of all."""
        elapsed = self.decode(rows, every_row=True)
        self.api.llama_memory_seq_rm(self.memory, 0, self.length, -1)
        return elapsed

    def decode(self, rows: int, every_row: bool) -> float:
        """One batch at the end of the context, in milliseconds."""
        batch = self.api.llama_batch_init(rows, 0, 1)
        batch.n_tokens = rows
        for row in range(rows):
            batch.token[row], batch.pos[row] = row, self.length + row
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, 0
            batch.logits[row] = every_row
        start = time.perf_counter()
        status = self.api.llama_decode(self.context, batch)
        self.api.llama_synchronize(self.context)
        elapsed = (time.perf_counter() - start) * 1e3
        self.api.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama.cpp could not decode {rows} rows at {self.length}: {status}")
        return elapsed

    def __del__(self) -> None:
        """Give the memory back before the next model is made."""
        if getattr(self, "context", None):
            self.api.llama_free(self.context)
        if getattr(self, "model", None):
            self.api.llama_model_free(self.model)
