"""``dovetail doctor``: what this machine and this installation have."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Column, Table

from server.installation import installed_version

DISTRIBUTIONS = ("dovetail-server", "torch", "transformers", "safetensors", "tokenizers", "fastapi")


@dataclass(frozen=True)
class Extra:
    """Something optional: the module to look for, what it is for, how to get it."""

    module: str
    purpose: str
    install: str


EXTRAS = {
    "llama-cpp-python": Extra(
        "llama_cpp", "GGUF files beyond the native layers, and the llama.cpp peer of the benchmark", "make gguf"
    ),
    "gguf": Extra("gguf", "writing targets as GGUF", "make gguf"),
    "matplotlib": Extra("matplotlib", "plots of a training run", "pip install 'dovetail-server[train]'"),
}


def doctor() -> None:
    """Show devices, bandwidth, versions, bundled models and extras. The last line printed is JSON."""
    report = examine()
    show(report, Console(stderr=True, markup=False))
    typer.echo(json.dumps(report))


def examine() -> dict[str, Any]:
    """Look at everything; takes about a second."""
    from server.own_models import ASSETS
    from server.placement.machine import compute_with, measure_machine

    compute_with()
    hardware = measure_machine()
    return {
        "hardware": hardware.json(),
        "devices": ["cpu", *(f"cuda:{gpu.index}" for gpu in hardware.gpus)],
        "versions": {name: installed_version(name) for name in DISTRIBUTIONS},
        "default_target": default_model(),
        "bundled": {name: asset(ASSETS / name) for name in ("drafter", "detector", "target", "target_drafter")},
        "extras": {
            name: dataclasses.asdict(extra) | {"present": importlib.util.find_spec(extra.module) is not None}
            for name, extra in EXTRAS.items()
        },
        "kernels": kernels(),
    }


def describe_gpu(gpu: dict[str, Any]) -> str:
    """One device's line."""
    return (
        f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.1f} GiB, {gpu['free_bytes'] / 2**30:.1f} GiB free, copied at "
        f"{gpu['stream_gb_per_s']:.0f} GB/s, {gpu['fp16_tflops']:.0f} TFLOPS in fp16; to it "
        f"{gpu['to_gb_per_s']:.1f} GB/s, {gpu['to_latency_us']:.0f} us; from it {gpu['from_gb_per_s']:.1f} GB/s, "
        f"{gpu['from_latency_us']:.0f} us"
    )


def kernels() -> dict[str, Any]:
    """Which kernels run bf16, int8 and int4 targets, and why those."""
    from kernels.native import available_instruction_sets, instruction_set, library

    if library() is None:
        reason = (
            "not built, or from other sources: int8 and int4 run on torch's own products, several times slower at "
            "several rows; with a C++20 compiler at hand, pip install --editable . builds them"
        )
        return {"chosen": instruction_set(), "available": [], "reason": reason}
    available = available_instruction_sets()
    return {
        "chosen": instruction_set(),
        "available": available,
        "reason": f"the fastest that both this processor and the build have, of {', '.join(available)}",
    }


def default_model() -> dict[str, Any]:
    """Whether the default model's package is there and whole, and what to do where it is not."""
    from server.own_models import OwnModelError, default_target

    try:
        file = default_target()
    except OwnModelError as error:
        return {"path": None, "present": False, "reason": str(error)}
    return {"path": str(file), "present": True, "reason": None}


def asset(folder: Path) -> dict[str, Any]:
    """Whether a bundled model is there, and its size."""
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    has_weights = any(path.suffix == ".safetensors" for path in files)
    return {"path": str(folder), "present": has_weights, "bytes": sum(path.stat().st_size for path in files)}


def show(report: dict[str, Any], console: Console) -> None:
    """The report for people."""
    hardware = report["hardware"]
    table = Table(Column(), Column(overflow="fold"), show_header=False, title="dovetail doctor")
    table.add_row("cpu", f"{hardware['cpu']}, {hardware['cores']} usable cores")
    table.add_row("instruction sets", " ".join(hardware["instruction_sets"]) or "unknown")
    table.add_row(
        "memory",
        f"{hardware['memory_gb']:.1f} GB, {hardware['available_gb']:.1f} GB of it free, read at "
        f"{hardware['stream_gb_per_s']:.1f} GB/s",
    )
    if hardware["dot_gmac_per_s"] is not None:
        table.add_row("arithmetic", f"{hardware['dot_gmac_per_s']:.0f} G multiply-adds/s of 8 bits at most")
    for gpu in hardware["gpus"]:
        table.add_row("gpu", describe_gpu(gpu))
    if not hardware["gpus"]:
        table.add_row("gpu", "none that torch can use; drafting runs on the CPU")
    table.add_row("native kernels", f"{report['kernels']['chosen']}: {report['kernels']['reason']}")
    table.add_row("versions", ", ".join(f"{name} {found or 'missing'}" for name, found in report["versions"].items()))
    default = report["default_target"]
    table.add_row("default model", default["path"] or f"missing: {default['reason']}")
    for name, found in report["bundled"].items():
        state = f"{found['bytes'] / 1e6:.1f} MB" if found["present"] else "missing"
        table.add_row(f"bundled {name}", f"{state}, {found['path']}")
    for name, extra in report["extras"].items():
        state = "present" if extra["present"] else f"missing, for {extra['purpose']}: {extra['install']}"
        table.add_row(name, state)
    console.print(table)
