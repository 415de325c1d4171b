import json
import signal
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset

from kernels.training import RecipeError, TrainingDivergedError, TrainingOptions, TrainingReport, run
from kernels.training.run import last_checkpoint


class Points(Dataset[dict[str, Tensor]]):
    """Inputs whose noise depends on the epoch, as augmentation does."""

    def __init__(self, count: int = 40) -> None:
        self.count = count
        self.epoch = 0
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.epochs.append(epoch)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.epoch + index)
        x = torch.randn(6, generator=generator)
        return {"x": x, "y": x.sum()}


class Regression(nn.Module):
    """Dropout draws from the global generator, batch normalisation carries statistics: both must survive a resume."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))
        self.steps = 0
        self.interrupt_at: int | None = None

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.steps += 1
            if self.steps == self.interrupt_at:
                signal.raise_signal(signal.SIGINT)
        error = self.net(x).squeeze(1) - y
        return {"loss": (error**2).mean(), "absolute_error": error.abs().mean().detach()}


def options(output: Path, **changes: Any) -> TrainingOptions:
    values = {"steps": 12, "batch_size": 8, "learning_rate": 0.01, "log_every": 2, "save_every": 100, "threads": 1}
    return TrainingOptions(output=str(output), **(values | changes))


def train(task: nn.Module, settings: TrainingOptions, **kwargs: Any) -> TrainingReport:
    data = kwargs.pop("data", None) or Points()
    return run(task, data, settings, console=Console(file=StringIO()), **kwargs)


STEP_SCHEDULE = {"schedule": "step", "schedule_options": {"every": 4, "factor": 0.1}}


@pytest.mark.parametrize("changes", [
    {"loader_workers": 1}, {"optimizer": "muon", "precision": "bf16"},
    {"optimizer": "sgd", "accumulation": 2, "batch_size": 4, **STEP_SCHEDULE},
], ids=["adamw-worker", "muon-bf16", "sgd-accumulation"])  # fmt: skip
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    # Five batches an epoch: the checkpoint after step 7 lies inside the second epoch.
    whole, broken, resumed = Regression(), Regression(), Regression()
    train(whole, options(tmp_path / "whole", **changes))
    broken.interrupt_at = 7 * changes.get("accumulation", 1)
    report = train(broken, options(tmp_path / "broken", **changes))
    assert not report.finished
    assert Path(report.checkpoint).name == "checkpoint-7"
    report = train(resumed, options(tmp_path / "broken", **changes), resume=True)
    assert report.finished
    assert resumed.steps == 5 * changes.get("accumulation", 1)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_interrupt_saves_stops_and_gives_the_signal_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    task = Regression()
    task.interrupt_at = 3
    report = train(task, options(tmp_path))
    assert task.steps == 3
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    assert (report.finished, report.checkpoint) == (False, str(tmp_path / "checkpoint-3"))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_failed_run_gives_the_signal_back(tmp_path: Path) -> None:
    class Broken(Regression):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            raise RuntimeError("no kernel for this")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="no kernel for this"):
        train(Broken(), options(tmp_path))
    assert signal.getsignal(signal.SIGINT) is before


def test_changed_recipe_is_refused(tmp_path: Path) -> None:
    train(Regression(), options(tmp_path, steps=2), recipe={"training": {"steps": 2}})
    with pytest.raises(RecipeError, match=r"the recipe changed since checkpoint-2 .*recipe\.json"):
        train(Regression(), options(tmp_path, steps=4), recipe={"training": {"steps": 4}}, resume=True)


def test_used_folder_is_refused_without_resume(tmp_path: Path) -> None:
    train(Regression(), options(tmp_path, steps=2))
    with pytest.raises(RecipeError, match="already holds checkpoint-2; resume it"):
        train(Regression(), options(tmp_path, steps=2))


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    first, second = Regression(), Regression()
    train(first, options(tmp_path, steps=4), eval_data=Points(8))
    report = train(second, options(tmp_path, steps=4), eval_data=Points(8), resume=True)
    assert report.finished
    assert second.steps == 0
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())
    assert report.best["step"] == 4


def test_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    train(Regression(), options(tmp_path, steps=4, save_every=2))
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-6" / "model.safetensors").write_bytes(b"")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def test_history_and_plot_are_written(tmp_path: Path) -> None:
    report = train(Regression(), options(tmp_path, evaluate_every=6), eval_data=Points(10))
    rows = json.loads((tmp_path / "training.json").read_text())
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == [2, 4, 6, 8, 10, 12]
    assert all({"loss", "absolute_error", "learning_rate", "grad_norm"} <= row.keys() for row in training)
    evaluations = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [6, 12]
    assert all("eval_absolute_error" in row for row in evaluations)
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert report.final["eval_loss"] == evaluations[-1]["eval_loss"]
    best = min(evaluations, key=lambda row: row["eval_loss"])
    assert report.best == best


def test_evaluation_figures_weigh_every_sample_alike(tmp_path: Path) -> None:
    task = Regression()
    report = train(task, options(tmp_path, steps=2), eval_data=Points(11))
    data = [Points(11)[i] for i in range(11)]
    with torch.no_grad():
        task.eval()
        x, y = (torch.stack([sample[key] for sample in data]) for key in ("x", "y"))
        expected = task(x, y)
    assert report.final["eval_absolute_error"] == pytest.approx(expected["absolute_error"].item(), rel=1e-5)
    assert report.final["eval_loss"] == pytest.approx(expected["loss"].item(), rel=1e-5)


def test_data_is_told_the_epoch(tmp_path: Path) -> None:
    data = Points()
    train(Regression(), options(tmp_path, steps=11, save_every=7), data=data)
    assert data.epochs == sorted(data.epochs)
    assert set(data.epochs) == {0, 1, 2}


def test_a_loss_that_is_not_a_number_ends_the_run(tmp_path: Path) -> None:
    class Diverging(Regression):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"loss": super().forward(x, y)["loss"] * float("nan")}

    with pytest.raises(TrainingDivergedError, match="the loss is nan at step 2; lower the learning rate"):
        train(Diverging(), options(tmp_path))


def test_accumulated_batches_equal_one_large_batch(tmp_path: Path) -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(6, 1)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"loss": ((self.layer(x).squeeze(1) - y) ** 2).mean()}

    weights = []
    for batch_size, accumulation in ((8, 1), (4, 2)):
        task = Linear()
        folder = tmp_path / str(batch_size)
        train(task, options(folder, steps=5, optimizer="sgd", batch_size=batch_size, accumulation=accumulation))
        weights.append(task.layer.weight.detach())
    torch.testing.assert_close(*weights)


def test_fp16_without_a_gpu_is_refused(tmp_path: Path) -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    with pytest.raises(RecipeError, match="needs a GPU"):
        train(Regression(), options(tmp_path, precision="fp16"))


def test_old_checkpoints_are_removed(tmp_path: Path) -> None:
    train(Regression(), options(tmp_path, steps=8, save_every=2, keep_checkpoints=2))
    assert sorted(f.name for f in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
