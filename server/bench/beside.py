"""Passes per second while busy processes take part of the cores, ours and llama.cpp's: ``bench kernels --beside``."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from kernels.linear_lowbit.bench import OURS, BenchOptions, Entry, Say, torch_threads
from kernels.linear_lowbit.bench_peers import EngineMissing
from kernels.native import library, num_threads
from server.bench.whole_model import LLAMA_CPP, LlamaCppModel, filled_target, random_model, time_verify

SLICE_S = 1.5  # of one engine's turn: many time slices of the operating system


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that compute without end, until the block is left."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def passes_per_s(timed_pass: Callable[[], object], seconds: float) -> float:
    """How often a pass ends in a second, over about ``seconds``."""
    start = time.perf_counter()
    passes = 0
    while (elapsed := time.perf_counter() - start) < seconds or passes == 0:
        timed_pass()
        passes += 1
    return passes / elapsed


def fair_share(processes: int, threads: int) -> float:
    """What part of the cores ``threads`` threads get beside so many others, on as many cores as threads."""
    return threads / (threads + processes)


def in_turns(
    engines: Mapping[str, Callable[[], object]], processes: Sequence[int], rounds: int, seconds: float = SLICE_S
) -> list[Entry]:
    """Passes per second of each engine beside each number of busy processes: medians of slices taken in turns.

    ``of_fair_share``: the speed by that of the same engine alone, by the share of the cores that is left to it.
    """
    found: list[Entry] = []
    alone: dict[str, float] = {}
    for count in sorted({0, *processes}):
        samples: dict[str, list[float]] = {name: [] for name in engines}
        with busy_processes(count):
            for _ in range(rounds):
                for name, timed_pass in engines.items():
                    samples[name].append(passes_per_s(timed_pass, seconds))
        for name, speeds in samples.items():
            speed = statistics.median(speeds)
            share = fair_share(count, num_threads())
            of_idle = speed / alone.setdefault(name, speed)
            found.append({
                "engine": name, "beside": count, "passes_per_s": round(speed, 2), "of_idle": round(of_idle, 3),
                "fair_share": round(share, 3), "of_fair_share": round(of_idle / share, 3),
            })  # fmt: skip
    return found


def bench_beside(
    options: BenchOptions, processes: Sequence[int], context: int, say: Say
) -> tuple[list[Entry], dict[str, str]]:
    """One-row passes of each shape and format, and the engines that could not take part with the reason."""
    results: list[Entry] = []
    skipped: dict[str, str] = {}
    if library() is None:
        return results, {"ours, beside other work": "NOT BUILT: the native kernels"}
    with torch.inference_mode(), torch_threads(1):
        for name in options.shapes:
            for weights in options.weights:
                say(f"{name} {weights}: beside {', '.join(map(str, processes))} busy processes")
                packed = random_model(options.shape(name), weights, context + 1)
                target = filled_target(packed, context, rows=1)
                engines: dict[str, Callable[[], object]] = {OURS: lambda target=target: time_verify(target, 1)}  # type: ignore[misc]
                try:
                    peer = LlamaCppModel(packed, context + 1) if options.peers else None
                except EngineMissing as error:
                    peer, skipped[LLAMA_CPP] = None, str(error)
                if peer is not None:
                    peer.fill(context)
                    engines[LLAMA_CPP] = lambda peer=peer: peer.time_decode(1)  # type: ignore[misc]
                fields = {"shape": name, "weights": weights, "context": context, "layers": len(target.stack), "rows": 1}
                results += [fields | entry for entry in in_turns(engines, processes, options.rounds)]
    return results, skipped
