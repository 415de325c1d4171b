"""Weights averaged over the steps of a training, with the batch-normalisation statistics that belong to them.

The statistics gathered while training are those of the weights as they moved; averaged weights make other maps. A
network evaluated with statistics that are not its own can find nothing at all, so they are re-estimated over training
batches before every evaluation and before saving (Izmailov et al., arXiv 1803.05407, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback

from kernels.training import AfterStep, BeforeEvaluation, TrainingReport

# Enough for the statistics to settle, a few per cent of the steps between two evaluations.
STATISTICS_BATCHES = 20
BEST = "best"  # folder in a training's output: the best evaluation's network, as it would be served

Network = TypeVar("Network", bound=nn.Module)
Batch = Mapping[str, Tensor]
Tensors = tuple[Tensor, ...] | list[Tensor]


def ramped_decay(decay: float, updates: int) -> float:
    """The decay after ``updates`` steps: (1 + n) / (10 + n) until that exceeds ``decay``, as TensorFlow's average.

    A short run would else keep its random initialisation: 0.998 of it in each step leaves 13 % after 1,000.
    """
    return min(decay, (1 + updates) / (10 + updates))


class MovingAverage(nn.Module, Generic[Network]):
    """An exponential average of a network's weights; its first update copies them."""

    def __init__(self, model: Network, decay: float) -> None:
        super().__init__()

        def move(averages: Tensors, values: Tensors, updates: Tensor | int) -> None:
            weight = 1 - ramped_decay(decay, int(updates))
            moving = [pair for pair in zip(averages, values, strict=True) if pair[0].is_floating_point()]
            torch._foreach_lerp_([average for average, _ in moving], [value for _, value in moving], weight)

        self.averaged = AveragedModel(model, multi_avg_fn=move).requires_grad_(False)

    @property
    def network(self) -> Network:
        """The network with averaged weights."""
        return cast("Network", self.averaged.module)

    def update(self, model: Network) -> None:
        """Move towards the weights of ``model``; called after each optimiser step."""
        self.averaged.update_parameters(model)


class KeepAverage(Generic[Network]):
    """What a training does for the average of its task, if it has one.

    ``show(network, batch)`` passes a training batch through the network; ``batches()`` yields them.
    """

    def __init__(
        self,
        task: nn.Module,
        model: Network,
        average: MovingAverage[Network] | None,
        show: Callable[[Network, Batch], object],
        batches: Callable[[], Iterable[Batch]],
    ) -> None:
        self.task, self.model, self.average, self.show, self.batches = task, model, average, show, batches

    @property
    def callbacks(self) -> list[TrainerCallback]:
        """Move the average after each step, and give it statistics of its own before each evaluation."""
        return [AfterStep(self.move), BeforeEvaluation(self.settle)]

    def move(self) -> None:
        """After an optimiser's step."""
        if self.average is not None:
            self.average.update(self.model)

    def settle(self) -> None:
        """Re-estimate the statistics of the average."""
        if self.average is not None:
            reestimate(self.task, self.average.network, self.show, islice(self.batches(), STATISTICS_BATCHES))


def kept_best(report: TrainingReport, output: str, steps: int) -> Path | None:
    """The folder of the best evaluation's network, which ``KeepBest`` wrote; None where that was the last one."""
    folder = Path(output) / BEST
    return folder if report.best and report.best["step"] < steps and folder.is_dir() else None


@torch.no_grad()
def reestimate(
    task: nn.Module, network: Network, show: Callable[[Network, Batch], object], batches: Iterable[Batch]
) -> None:
    """Batch-normalisation statistics of ``network``, a part of ``task``, as plain means over ``batches``.

    Nothing else changes: the generators and the mode of ``task`` are as before.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    if not layers:
        return
    momenta, was_training = [layer.momentum for layer in layers], task.training
    device = next(network.parameters()).device
    with torch.random.fork_rng():
        torch.manual_seed(0)
        task.eval()
        network.train()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
        for batch in batches:
            show(network, {name: value.to(device) for name, value in batch.items()})
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    task.train(was_training)


def training_batches(
    data: Dataset[Any], batch_size: int, collate: Callable[[list[Any]], dict[str, Tensor]], workers: int = 0
) -> Iterable[Batch]:
    """Shuffled batches of ``data``, the same at every call of an epoch."""
    num_samples = len(data)  # type: ignore[arg-type]
    return DataLoader(
        data, batch_size, shuffle=True, generator=torch.Generator().manual_seed(0), collate_fn=collate,
        drop_last=num_samples >= batch_size, num_workers=workers,
    )  # fmt: skip
