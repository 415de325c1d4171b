import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from drafters.drafter import DrafterError
from drafters.proposal import Budget
from server.targets.context import DrafterRoom, slot_capacity


def test_a_slot_holds_the_largest_tree_below_the_last_position() -> None:
    assert slot_capacity(100, [Budget(rows=16, top_k=2, depth=5)]) == 116
    assert slot_capacity(100, [Budget(rows=8, top_k=10, depth=7)]) == 170, "the drafter keeps every row it expanded"


@pytest.mark.parametrize(
    "fields",
    [
        {"num_blocks": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
        {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64},
    ],
    ids=["a drafter's fields", "a language model's"],
)
def test_a_drafter_that_fits_no_longer_is_refused_by_name(tmp_path: Path, fields: dict[str, int]) -> None:
    folder = tmp_path / "my-drafter"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    save_file({"w": torch.zeros(2**18)}, folder / "model.safetensors")
    row_bytes = 2 * 2 * 2 * 16 * 4
    DrafterRoom(4, 4096, 16384, 1.1 * 2**20 + 16384 * row_bytes).check(folder, fields, torch.device("cpu"))
    with pytest.raises(DrafterError, match=r"drafter my-drafter takes 9 MiB on cpu with 4 requests .* 8 MiB are left"):
        DrafterRoom(4, 4096, 16384, 2**20 * 8.4).check(folder, fields, torch.device("cpu"))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heaps")
def test_threads_allocate_from_few_heaps() -> None:
    code = """
import ctypes, sys, threading
from server.app import share_arenas
share_arenas()
held, gate = [], threading.Barrier(12)
def work():
    gate.wait()
    held.append(bytearray(100_000))
    gate.wait()
threads = [threading.Thread(target=work) for _ in range(12)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
libc.malloc_info(0, ctypes.c_void_p(libc.fdopen(1, b"w")))
libc.fflush(None)
"""
    own = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    answer = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True, check=True)
    assert 1 <= answer.stdout.count("<heap nr=") <= 2
