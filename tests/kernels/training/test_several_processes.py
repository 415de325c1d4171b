"""Two processes of one run, as torchrun starts them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.training.run import first_rows, real_rows

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import json, os, sys
from io import StringIO
import torch
from rich.console import Console
from kernels.training import TrainingOptions, run

class Mean(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.guess = torch.nn.Parameter(torch.zeros(1))
        self.seen = []
    def forward(self, x):
        self.seen += [] if self.training else x.tolist()
        return {"loss": ((x - self.guess) ** 2).mean(), "mean": x.mean()}

data = [{"x": torch.tensor(float(n))} for n in range(8)]
options = TrainingOptions(sys.argv[1], steps=2, batch_size=2, optimizer="sgd", learning_rate=0.1, momentum=0.0,
                          clip_norm=0.0, schedule="constant", log_every=2, threads=1)
task = Mean()
report = run(task, data, options, eval_data=data[:5], console=Console(file=StringIO()))
print(json.dumps({"rank": os.environ["RANK"], "guess": task.guess.item(), "final": report.final,
                  "seen": task.seen}), flush=True)
"""


@pytest.mark.slow
def test_processes_share_gradients_figures_and_the_end(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path / "run")],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {answer["rank"] for answer in answers} == {"0", "1"}
    assert answers[0]["guess"] == pytest.approx(answers[1]["guess"])
    # Two steps of two batches of two are the whole set, so the figure is its mean whoever saw which part.
    assert [answer["final"]["mean"] for answer in answers] == [3.5, 3.5]
    # Five do not go into batches of two on two processes: what fills the last ones up is not counted.
    assert sorted(answers[0]["seen"] + answers[1]["seen"]) == [0, 1, 2, 3, 4]
    assert [answer["final"]["eval_mean"] for answer in answers] == [2, 2]
    assert (tmp_path / "run" / "checkpoint-2" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("samples", "batch_size", "processes"), [(5, 2, 2), (7, 3, 2), (14, 4, 2), (3, 4, 3), (9, 2, 4)]
)
def test_the_rows_that_fill_up_are_told_from_the_datas(samples: int, batch_size: int, processes: int) -> None:
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    batches = BatchSampler(range(samples), batch_size, drop_last=False)
    remainder = samples % (batch_size * processes)
    seen = []
    for process in range(processes):
        own = list(BatchSamplerShard(batches, processes, process, even_batches=True))
        seen += [index for batch in own[:-1] for index in batch]
        seen += own[-1][: real_rows(remainder, process, batch_size)]
    assert sorted(seen) == list(range(samples))


def test_a_batch_is_cut_where_it_holds_one_value_a_sample() -> None:
    batch = {"images": torch.zeros(4, 3), "labels": torch.arange(4), "skipped": torch.tensor([1])}
    cut = first_rows(batch, 2)
    assert (len(cut["images"]), cut["labels"].tolist(), cut["skipped"].tolist()) == (2, [0, 1], [1])
