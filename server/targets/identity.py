"""Which model this is, by its files: two models with one identity give the same rows for the same tokens."""

from __future__ import annotations

import hashlib
from pathlib import Path

from server.own_models import is_gguf
from server.targets.gguf.header import part_files

SAMPLES, SAMPLE_BYTES = 256, 4096


def model_identity(path: Path) -> str:
    """Of a folder or a GGUF file: configuration and tokenizer whole, weights by size, time of change and samples.

    Reading all of them would take as long as loading them.
    """
    total = hashlib.blake2b(digest_size=16)
    files = part_files(path) if is_gguf(path) else sorted([*path.glob("*.json"), *path.glob("*.safetensors")])
    for file in files:
        state = file.stat()
        total.update(f"{file.name} {state.st_size}".encode())
        if file.suffix == ".json":
            total.update(file.read_bytes())
            continue
        total.update(str(state.st_mtime_ns).encode())
        with file.open("rb") as stream:
            for sample in range(SAMPLES):
                stream.seek(sample * max(state.st_size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
                total.update(stream.read(SAMPLE_BYTES))
    return total.hexdigest()
