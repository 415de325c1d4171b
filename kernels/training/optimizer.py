"""Optimisers and schedules a recipe may name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from kernels.training.options import TrainingOptions


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for matrices of hidden layers, AdamW for the rest, behind one optimiser's interface.

    Both come from torch; this class only joins their parameter groups and their state, because Muon refuses anything
    that is not a matrix and a trainer wants one optimiser.
    """

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer) -> None:
        self.parts = (muon, adamw)
        super().__init__([*muon.param_groups, *adamw.param_groups], defaults={})
        # The scheduler writes learning rates into these groups, so they must be the parts' own dictionaries.
        self.param_groups = [*muon.param_groups, *adamw.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both parts."""
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """States of both parts, under their positions."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both parts."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def create_optimizer(task: nn.Module, options: TrainingOptions) -> torch.optim.Optimizer:
    """The recipe's optimiser over the task's trainable parameters."""
    trainable: list[Tensor] = [p for p in task.parameters() if p.requires_grad]
    if options.optimizer == "sgd":
        return torch.optim.SGD(
            decay_groups(trainable, options),
            lr=options.learning_rate,
            momentum=options.momentum,
            nesterov=options.nesterov,
        )
    if options.optimizer == "adamw":
        return adamw(trainable, options)
    tables = {id(m.weight) for m in task.modules() if isinstance(m, nn.Embedding)}
    hidden = [p for p in trainable if p.ndim == 2 and id(p) not in tables]
    chosen = {id(p) for p in hidden}
    muon = torch.optim.Muon(hidden, lr=options.muon_learning_rate, weight_decay=0.0, adjust_lr_fn="original")
    return MuonWithAdamW(muon, adamw([p for p in trainable if id(p) not in chosen], options))


def adamw(parameters: list[Tensor], options: TrainingOptions) -> torch.optim.AdamW:
    """torch's fused AdamW."""
    groups = decay_groups(parameters, options)
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas, fused=True)


def decay_groups(parameters: list[Tensor], options: TrainingOptions) -> list[dict[str, Any]]:
    """Parameter groups with the recipe's weight decay, vectors apart unless they are decayed as well."""
    spared = set() if options.decay_vectors else {id(p) for p in parameters if p.ndim < 2}
    groups = [
        {"params": [p for p in parameters if id(p) not in spared], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if id(p) in spared], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def create_schedule(optimizer: torch.optim.Optimizer, options: TrainingOptions) -> LambdaLR | None:
    """The schedules transformers does not have; None leaves the others to it."""
    if options.schedule != "step":
        return None
    every, drops = options.schedule_options.get("every"), options.schedule_options.get("at", ())
    factor, warmup = options.schedule_options["factor"], options.warmup_steps

    def scale(step: int) -> float:
        passed = step // every if every else sum(step >= drop for drop in drops)
        return float(min(1.0, (step + 1) / (warmup + 1)) * factor**passed)

    return LambdaLR(optimizer, scale)
