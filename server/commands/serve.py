"""``dovetail serve``: the HTTP server."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

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
from server.commands.show_settings import settings_text
from server.logs import write_json


def serve(
    target: Target = None,
    drafter: Drafter = None,
    weights: Weights = None,
    engine: Engine = None,
    gpu_layers: GPULayers = None,
    kv_cache: KVCache = None,
    drafter_device: DrafterDevice = None,
    vram: Vram = None,
    stream_prefill: Annotated[bool | None, flag("stream_prefill")] = None,
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
    api_key: Annotated[list[str] | None, flag("api_key")] = None,
    api_key_file: Annotated[Path | None, flag("api_key_file")] = None,
    allowed_hosts: Annotated[str | None, flag("allowed_hosts")] = None,
    cors_origins: Annotated[str | None, flag("cors_origins")] = None,
    tls_cert: Annotated[Path | None, flag("tls_cert")] = None,
    tls_key: Annotated[Path | None, flag("tls_key")] = None,
    rate_limit: Annotated[float | None, flag("rate_limit")] = None,
    max_per_key: Annotated[int | None, flag("max_per_key")] = None,
    max_connections: Annotated[int | None, flag("max_connections")] = None,
    model_name: Annotated[str | None, flag("model_name")] = None,
    sampling_defaults: Annotated[str | None, flag("sampling_defaults")] = None,
    strict: Annotated[bool | None, flag("strict")] = None,
    keepalive_s: Annotated[float | None, flag("keepalive_s")] = None,
    send_timeout_s: Annotated[float | None, flag("send_timeout_s")] = None,
    drain_s: Annotated[float | None, flag("drain_s")] = None,
    watchdog_s: Annotated[float | None, flag("watchdog_s")] = None,
    otlp_endpoint: Annotated[str | None, flag("otlp_endpoint")] = None,
    log_level: Annotated[str | None, flag("log_level")] = None,
    log_format: Annotated[str | None, flag("log_format")] = None,
    config: Config = None,
    show_settings: Annotated[
        bool, typer.Option("--show-settings", help="Print every setting and where it comes from, and end.")
    ] = False,
) -> None:
    """Answer OpenAI clients over HTTP, and vision requests beside them."""
    flags = {name: value for name, value in locals().items() if name not in ("config", "show_settings")}
    settings = settings_from(config, **flags)
    if show_settings:
        typer.echo(settings_text(settings, flags, config))
        return
    if "log_level" in settings.model_fields_set:
        logging.getLogger().setLevel(settings.log_level.upper())
    if settings.log_format == "json":
        write_json()
    from server import app
    from server.launch import load_model, vision_worker

    app.serve(settings, None if settings.no_llm else load_model, vision_worker(settings))
