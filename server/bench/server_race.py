"""This server beside others over HTTP: chats of several clients at once, as their users start them, in one run.

Every server answers ``/v1/chat/completions`` as a stream. Texts are counted by one tokenizer, the target's own, since
servers cut their events differently. Servers that are idle cost the others nothing; who begins rotates.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.targets.llama_cpp.library import ContextOptions, LlamaCppError, try_out

OURS, LLAMA_CPP, TRANSFORMERS = "dovetail", "llama.cpp", "transformers"
PEERS = (LLAMA_CPP, TRANSFORMERS)
HOST = "127.0.0.1"
PLAIN_LLAMA_CPP = """
import runpy
from server.bench.contestants import default_parameters
with default_parameters(use_extra_bufts=False):
    runpy.run_module("llama_cpp.server", run_name="__main__")
"""
START_TIMEOUT_S, ANSWER_TIMEOUT_S, POLL_S = 900.0, 120.0, 0.2  # the first for a server that lives and never answers

Count = Callable[[str], int]
Progress = Callable[[str], None]


class ServerUnavailable(RuntimeError):
    """A server that cannot take part; the message says why."""


@dataclass(frozen=True)
class Contender:
    """A server to start: ``command`` lacks its port, which is put behind it; model: what requests name."""

    name: str
    command: tuple[str, ...]
    model: str


@dataclass(frozen=True)
class Reply:
    """One streamed answer: its text, seconds to the first piece of it, and why it failed; empty where it did not."""

    text: str = ""
    first_s: float = math.nan
    error: str = ""


def contender(name: str, target: Path, ours: Sequence[str], threads: int, context: int) -> Contender:
    """How a server of this name is started for a target's folder or GGUF file; ``ours``: options of our own.

    Errors: ServerUnavailable, with what to install or to name.
    """
    if name == OURS:
        start = "import sys; from server.cli import main; sys.exit(main())"
        return Contender(name, (sys.executable, "-c", start, "serve", *ours, "--vision", "none"), "")
    if name == LLAMA_CPP:
        missing = [each for each in ("llama_cpp", "sse_starlette", "starlette_context") if not installed(each)]
        if missing:
            raise ServerUnavailable(f"{', '.join(missing)} is missing; pip install 'llama-cpp-python[server]'")
        if not target.is_file():
            raise ServerUnavailable("its server reads GGUF files alone; name one, or write one with `dovetail convert`")
        return Contender(name, llama_cpp_server(target, threads, context), "target")
    if name == TRANSFORMERS:
        if target.is_file():
            raise ServerUnavailable("its server reads no GGUF file; transformers=FOLDER names the same weights for it")
        command = (sys.executable, "-m", "transformers.cli.transformers", "serve", str(target), "--device", "cpu")
        return Contender(name, command, str(target))
    raise ServerUnavailable(f"known are {', '.join(PEERS)}")


def llama_cpp_server(target: Path, threads: int, context: int) -> tuple[str, ...]:
    """llama-cpp-python's server; with llama.cpp's plain products where the machine does not allow its fastest.

    Errors: ServerUnavailable where llama.cpp cannot run the file.
    """
    try:
        possible = try_out(target, ContextOptions(context, 1, threads))
    except LlamaCppError as error:
        raise ServerUnavailable(f"llama.cpp cannot run {target.name}: {error}") from error
    start = ("-m", "llama_cpp.server") if possible.rearranged else ("-c", PLAIN_LLAMA_CPP)
    options = f"--n_ctx {context} --n_threads {threads} --n_threads_batch {threads}".split()
    # Unless told otherwise a new request ends the one that is being answered.
    return (sys.executable, *start, "--model", str(target), *options, "--interrupt_requests", "false")


def installed(module: str) -> bool:
    """Whether it can be imported."""
    return importlib.util.find_spec(module) is not None


@contextlib.contextmanager
def running(each: Contender) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """The server, started on a free port: that port and its process."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*each.command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    try:
        yield port, process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(port: int, process: subprocess.Popen[bytes], model: str) -> None:
    """Until the server has answered a first chat, however slow its start is. Errors: ServerUnavailable."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while error := ask(port, model, "Hi", 2).error:
        if process.poll() is not None:
            raise ServerUnavailable(f"it did not come up: it ended with {process.returncode}")
        if time.monotonic() > deadline:
            raise ServerUnavailable(f"it did not come up within {START_TIMEOUT_S:.0f} s: {error}")
        time.sleep(POLL_S)


def ask(port: int, model: str, prompt: str, max_tokens: int) -> Reply:
    """One greedy chat of one turn, streamed."""
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens, "temperature": 0}
    fields = json.dumps(body | {"stream": True} | ({"model": model} if model else {}))
    connection = http.client.HTTPConnection(HOST, port, timeout=ANSWER_TIMEOUT_S)
    text, first_s, started = "", math.nan, time.perf_counter()
    try:
        connection.request("POST", "/v1/chat/completions", fields, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != http.HTTPStatus.OK:
            return Reply(error=f"status {answer.status}: {answer.read(200).decode(errors='replace')}")
        for line in answer:
            piece = piece_of(line)
            if piece and not text:
                first_s = time.perf_counter() - started
            text += piece
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Reply(text, first_s, f"{type(error).__name__}: {error}")
    finally:
        connection.close()
    return Reply(text, first_s) if text else Reply(error="the answer is empty")


def piece_of(line: bytes) -> str:
    """The text that a line of the stream adds. Errors: ValueError for a line that is no event, or tells of an error."""
    data = line.removeprefix(b"data:").strip()
    if not line.startswith(b"data:") or data == b"[DONE]":
        return ""
    event: dict[str, Any] = json.loads(data)
    if "error" in event:
        raise ValueError(str(event["error"]))
    return "".join(choice.get("delta", {}).get("content") or "" for choice in event.get("choices", []))


def load(port: int, model: str, prompts: Sequence[str], max_tokens: int, count: Count) -> dict[str, float]:
    """One client for each prompt, all at once: tokens/s of all together, waits for the first token, failures."""
    started = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as clients:
        replies = list(clients.map(lambda prompt: ask(port, model, prompt, max_tokens), prompts))
    seconds = time.perf_counter() - started
    firsts = sorted(reply.first_s for reply in replies if not math.isnan(reply.first_s))
    return {
        "tokens_per_s": sum(count(reply.text) for reply in replies) / seconds,
        "first_token_p95_ms": 1e3 * firsts[math.ceil(0.95 * len(firsts)) - 1] if firsts else math.nan,
        "failures": sum(bool(reply.error) for reply in replies),
    }


def servers_report(
    contenders: Sequence[Contender],
    prompts: Sequence[str],
    counts: Sequence[int],
    max_tokens: int,
    turns: int,
    count: Count,
    progress: Progress,
) -> dict[str, Any]:
    """``{server: {clients: {tokens_per_s, first_token_p95_ms, failures}}}``, medians of turns; ``unavailable``.

    Every turn has prompts of its own, so that none is known from an earlier one.
    """
    taken: dict[str, dict[int, list[dict[str, float]]]] = {}
    unavailable: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        started = {each: stack.enter_context(running(each)) for each in contenders}
        ports = {each: port for each, (port, _) in started.items()}
        for each, (port, process) in started.items():
            try:
                wait_for(port, process, each.model)
            except ServerUnavailable as reason:
                unavailable[each.name] = str(reason)
                del ports[each]
        order = list(ports)
        ahead = iter(prompts)
        for turn in range(turns):
            for clients in counts:
                own = [next(ahead) for _ in range(clients)]
                for each in [*order[turn % len(order) :], *order[: turn % len(order)]] if order else []:
                    found = load(ports[each], each.model, own, max_tokens, count)
                    taken.setdefault(each.name, {}).setdefault(clients, []).append(found)
                    progress(f"{each.name}, {clients} clients")
    return {name: {str(n): summary(loads) for n, loads in by_count.items()} for name, by_count in taken.items()} | {
        "unavailable": unavailable
    }


def summary(loads: Sequence[dict[str, float]]) -> dict[str, float]:
    """Medians of the turns, and all failures."""
    return {
        "tokens_per_s": round(statistics.median(each["tokens_per_s"] for each in loads), 1),
        "first_token_p95_ms": round(statistics.median(each["first_token_p95_ms"] for each in loads), 1),
        "failures": sum(each["failures"] for each in loads),
    }
