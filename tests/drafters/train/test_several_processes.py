"""A drafter trained by two processes, as torchrun starts them: one prepares the features, both read and train."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import json, os, sys
from functools import partial
from pathlib import Path
import numpy as np
import torch
from drafters.train.capture import capture, describe, missing_shards
from drafters.train.drafter_task import train_drafter
from drafters.train.feature_source import OnTheFlySource, packed_windows
from kernels.training.processes import is_first_process, num_processes, wait_until

folder, asked = Path(sys.argv[1]), []
embedding = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))

def compute(token_ids):
    asked.append(token_ids)
    return torch.tanh(embedding[token_ids].roll(1, -1))

def load(data):
    samples, _ = packed_windows(data, 20)
    manifest = describe(samples, "tiny", 16)
    if not is_first_process():
        wait_until(lambda: not missing_shards(folder / "features", manifest), poll_s=0.05)
    return capture(samples, compute, folder / "features", manifest), None

def create_source(data, layers):
    return OnTheFlySource(compute, embedding, embedding, "tiny", partial(load, data))

report = train_drafter(
    {
        "drafter": {"intermediate_size": 24, "num_heads": 2, "num_kv_heads": 1},
        "data": {"target": "tiny", "tokens": str(folder / "tokens.npy"), "window_length": 8, "held_out_share": 0.0},
        "training": {"output": str(folder / "run"), "steps": 4, "batch_size": 2, "log_every": 2, "threads": 1},
    },
    create_source,
)
print(json.dumps({"rank": os.environ["RANK"], "size": num_processes(), "asked": len(asked), "final": report.final,
                  "checkpoint": report.checkpoint}), flush=True)
"""


@pytest.mark.slow
def test_two_processes_train_one_drafter(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 20, 200).astype(np.uint16))
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path)],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    answers = sorted(
        (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")), key=lambda a: a["rank"]
    )
    assert [(answer["rank"], answer["size"]) for answer in answers] == [("0", 2), ("1", 2)]
    assert [answer["asked"] for answer in answers] == [25, 0]  # windows of 8 of 200 tokens; the second only reads
    assert answers[0]["final"]["accuracy"] == answers[1]["final"]["accuracy"]
    assert answers[0]["checkpoint"] == answers[1]["checkpoint"] == str(tmp_path / "run" / "drafter")
    assert (tmp_path / "run" / "drafter" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "checkpoint-4" / "model.safetensors").is_file()
