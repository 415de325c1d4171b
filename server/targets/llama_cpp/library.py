"""llama.cpp's C interface: a file opened as a model and a context, and what the library says when it cannot.

Some files make the library end its whole process, by an assertion or a division by zero, and on some machines its own
faster products do (AMX tiles that the system does not let it use). So ``try_out`` runs a few rows of a file in a
process of its own first: this very module run as a script, which imports none of ours.
"""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import functools
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

INSTALL = "pip install 'dovetail-server[gguf]'"
TRIAL_LIMIT_S = 600
TRIAL_CELLS = 256
TRIAL_ROWS = (1, 2, 32)  # each has products of its own in the library
PROMPT_ROWS = 512  # rows that go through the layers at once
ERROR_LEVEL = 4  # of the library's log
CACHE_TYPES = {None: 1, "bf16": 30, "int8": 8}  # ggml's numbers of F16, BF16 and Q8_0


class LlamaCppError(ValueError):
    """The package is not installed, or the library refuses a file; the message gives its own words."""


@dataclass(frozen=True)
class ContextOptions:
    """num_cells: positions of all sequences together; num_sequences: sequence ids; kv_cache: of ``CACHE_TYPES``;
    gpu_layers: layers on a GPU that the library was built for; rearranged: weights may be laid out anew for the
    processor's fastest products."""

    num_cells: int
    num_sequences: int
    threads: int
    kv_cache: str | None = None
    gpu_layers: int = 0
    rearranged: bool = True


@dataclass(frozen=True)
class Row:
    """One row of a decode: where it stands and whose it is."""

    token_id: int
    position: int
    sequence_ids: Sequence[int]


class Library:
    """The loaded library; its log goes nowhere but into error messages."""

    def __init__(self) -> None:
        """Errors: LlamaCppError without the package."""
        if importlib.util.find_spec("llama_cpp") is None:
            raise LlamaCppError(f"llama-cpp-python is not installed: {INSTALL} (a build of 10 to 15 minutes)")
        import llama_cpp

        self.api: Any = llama_cpp
        self.errors: collections.deque[str] = collections.deque(maxlen=8)

        def hear(level: int, text: bytes, _: Any) -> None:
            if level >= ERROR_LEVEL and (line := text.decode("utf-8", "replace").strip()):
                self.errors.append(line)

        self.callback = llama_cpp.llama_log_callback(hear)  # the library keeps only its address
        llama_cpp.llama_log_set(self.callback, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.max_sequences: int = llama_cpp.llama_max_parallel_sequences()

    def reason(self) -> str:
        """The first error since the last call: what follows it are its consequences."""
        first = self.errors[0] if self.errors else "the library gave no reason"
        self.errors.clear()
        return first


@functools.cache
def library() -> Library:
    """The one library of the process. Errors: LlamaCppError."""
    return Library()


class OpenModel:
    """A file's model and one context, whose key-value cells all sequences share."""

    def __init__(self, path: Path, options: ContextOptions) -> None:
        """Errors: LlamaCppError, in the library's words."""
        self.context: Any = None
        self.model: Any = None
        self.library = library()
        self.api = self.library.api
        self.library.errors.clear()
        self.model = self.api.llama_model_load_from_file(os.fsencode(path), self._model_options(options))
        if not self.model:
            raise LlamaCppError(self.library.reason())
        self._check_kind()
        self.context = self.api.llama_init_from_model(self.model, self._context_options(options))
        if not self.context:
            raise LlamaCppError(self.library.reason())
        self.memory: Any = self.api.llama_get_memory(self.context)

    def _model_options(self, options: ContextOptions) -> Any:
        settings = self.api.llama_model_default_params()
        settings.n_gpu_layers, settings.use_extra_bufts = options.gpu_layers, options.rearranged
        return settings

    def _context_options(self, options: ContextOptions) -> Any:
        settings = self.api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = options.num_cells
        settings.n_ubatch = min(PROMPT_ROWS, options.num_cells)
        settings.n_seq_max = options.num_sequences
        settings.n_threads = settings.n_threads_batch = options.threads
        settings.type_k = settings.type_v = CACHE_TYPES[options.kv_cache]
        # Flash attention's sums depend on where a row's cells lie; only low-bit values cannot do without it.
        settings.flash_attn_type = int(options.kv_cache == "int8")
        settings.embeddings = True
        settings.pooling_type = self.api.LLAMA_POOLING_TYPE_NONE
        settings.kv_unified = True  # a cell may belong to several sequences: that is how a tree's rows share one
        settings.swa_full = True  # rows of a sliding window can be dropped again only where none has slid out
        return settings

    def _check_kind(self) -> None:
        """Errors: LlamaCppError for models that cannot take rows back, or are no decoders."""
        for refused, what in (
            (self.api.llama_model_has_encoder(self.model), "it has an encoder; decoder-only models can be targets"),
            (not self.api.llama_model_has_decoder(self.model), "it has no decoder"),
            (self.api.llama_model_is_diffusion(self.model), "it writes by diffusion, not token by token"),
            (
                self.api.llama_model_is_recurrent(self.model) or self.api.llama_model_is_hybrid(self.model),
                "it has recurrent layers, whose state cannot drop a draft that was not accepted",
            ),
        ):
            if refused:
                raise LlamaCppError(f"this model cannot be a target: {what}")

    def decode(self, rows: Sequence[Row]) -> int:
        """Run rows, with logits and features of each; the library's status, 0 where it did."""
        batch = self.api.llama_batch_init(len(rows), 0, max(len(row.sequence_ids) for row in rows))
        try:
            batch.n_tokens = len(rows)
            for i, row in enumerate(rows):
                batch.token[i], batch.pos[i] = row.token_id, row.position
                batch.n_seq_id[i] = len(row.sequence_ids)
                for j, sequence_id in enumerate(row.sequence_ids):
                    batch.seq_id[i][j] = sequence_id
                batch.logits[i] = True
            self.library.errors.clear()
            status: int = self.api.llama_decode(self.context, batch)
            return status
        finally:
            self.api.llama_batch_free(batch)

    def close(self) -> None:
        """Give the memory back; twice does no harm."""
        if self.context:
            self.api.llama_free(self.context)
        if self.model:
            self.api.llama_model_free(self.model)
        self.context = self.model = None

    def __del__(self) -> None:
        self.close()


def try_out(path: Path, options: ContextOptions) -> ContextOptions:
    """Run rows of a file in a process of its own; the options with which that went well.

    Errors: LlamaCppError for whatever ends or stops that process.
    """
    cells = min(options.num_cells, TRIAL_CELLS)
    done = run_trial(path, dataclasses.replace(options, num_cells=cells))
    if done.returncode == -signal.SIGILL and options.rearranged:
        logger.warning("llama.cpp's fastest products are not allowed on this machine; its plain ones are used")
        return try_out(path, dataclasses.replace(options, rearranged=False))
    if done.returncode == 0:
        return options
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason given"]
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise LlamaCppError(f"llama.cpp ends its process on it ({name}): {lines[-1]}")
    raise LlamaCppError(lines[-1])


def run_trial(path: Path, options: ContextOptions) -> subprocess.CompletedProcess[bytes]:
    """This module as a script. Errors: LlamaCppError where it takes too long."""
    command = [sys.executable, "-P", __file__, str(path), json.dumps(dataclasses.asdict(options))]
    try:
        return subprocess.run(
            command, capture_output=True, timeout=TRIAL_LIMIT_S, check=False, stdin=subprocess.DEVNULL,
            env=os.environ | {"GGML_NO_BACKTRACE": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise LlamaCppError(f"llama.cpp had not run it after {TRIAL_LIMIT_S} s") from error


def main(path: str, settings: str) -> None:
    """Open, run a few rows and close, saying on the last line of stderr what is wrong."""
    try:
        opened = OpenModel(Path(path), ContextOptions(**json.loads(settings)))
        position = 0
        for count in TRIAL_ROWS:
            if opened.decode([Row(0, position + i, (0,)) for i in range(count)]) != 0:
                raise LlamaCppError(opened.library.reason())
            position += count
        opened.close()
    except LlamaCppError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
