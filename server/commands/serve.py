"""``dovetail serve``: the HTTP server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from server.commands.options import (
    Config,
    Context,
    Depth,
    Drafter,
    DrafterDevice,
    Engine,
    GPULayers,
    KVCache,
    Lookup,
    Rows,
    Target,
    Threads,
    TopK,
    Trees,
    Vram,
    Weights,
    flag,
    settings_from,
)


def serve(
    target: Target = None,
    drafter: Drafter = None,
    weights: Weights = None,
    engine: Engine = None,
    gpu_layers: GPULayers = None,
    kv_cache: KVCache = None,
    drafter_device: DrafterDevice = None,
    vram: Vram = None,
    host: Annotated[str | None, flag("host")] = None,
    port: Annotated[int | None, flag("port")] = None,
    threads: Threads = None,
    context: Context = None,
    max_seqs: Annotated[int | None, flag("max_seqs")] = None,
    max_waiting: Annotated[int | None, flag("max_waiting")] = None,
    cache: Annotated[str | None, flag("cache")] = None,
    cache_file: Annotated[Path | None, flag("cache_file")] = None,
    rows: Rows = None,
    top_k: TopK = None,
    depth: Depth = None,
    lookup: Lookup = None,
    trees: Trees = None,
    vision: Annotated[list[str] | None, flag("vision")] = None,
    no_llm: Annotated[bool | None, flag("no_llm")] = None,
    vision_batch: Annotated[int | None, flag("vision_batch")] = None,
    vision_pixels: Annotated[int | None, flag("vision_pixels")] = None,
    vision_url_hosts: Annotated[str | None, flag("vision_url_hosts")] = None,
    api_key: Annotated[str | None, flag("api_key")] = None,
    model_name: Annotated[str | None, flag("model_name")] = None,
    sampling_defaults: Annotated[str | None, flag("sampling_defaults")] = None,
    strict: Annotated[bool | None, flag("strict")] = None,
    config: Config = None,
) -> None:
    """Answer OpenAI clients over HTTP, and vision requests beside them."""
    settings = settings_from(**locals())
    from server import app
    from server.launch import load_model, vision_worker

    app.serve(settings, None if settings.no_llm else load_model, vision_worker(settings))
