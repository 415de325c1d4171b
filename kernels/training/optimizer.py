"""Optimisers and schedules a recipe may name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR

from kernels.training.options import RecipeError, TrainingOptions

NETWORK = "model."  # what a task calls the network that it trains


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


def freeze(task: nn.Module, options: TrainingOptions) -> None:
    """Take the parts that ``options.freeze`` names out of the training. Errors: RecipeError for a name of nothing."""
    for prefix in options.freeze:
        for parameter in part_of(task, prefix, "freeze"):
            parameter.requires_grad_(False)
        for name, module in task.named_modules():
            if isinstance(module, _BatchNorm) and is_part(name, prefix):
                # The trainer sets the whole task to training again before every step.
                module.register_forward_pre_hook(lambda own, _: own.train(False) and None)


def part_of(task: nn.Module, prefix: str, key: str) -> list[nn.Parameter]:
    """The parameters of a part of the task's network. Errors: RecipeError where there are none."""
    found = [parameter for name, parameter in task.named_parameters() if is_part(name, prefix)]
    if not found:
        parts = sorted({name.removeprefix(NETWORK).partition(".")[0] for name, _ in task.named_parameters()})
        raise RecipeError(f"training.{key} names {prefix!r}, and no parameter begins so; parts are {', '.join(parts)}")
    return found


def is_part(name: str, prefix: str) -> bool:
    """Whether a parameter or module of a task belongs to the part ``prefix`` of its network."""
    return f"{name.removeprefix(NETWORK)}.".startswith(f"{prefix.rstrip('.')}.")


def rates_of(task: nn.Module, options: TrainingOptions) -> dict[int, float]:
    """By what the learning rate of parameters, by their ``id``, is multiplied. Errors: RecipeError."""
    rates: dict[int, float] = {}
    for prefix in sorted(options.rates, key=len):
        rates |= {id(parameter): options.rates[prefix] for parameter in part_of(task, prefix, "rates")}
    return rates


def create_optimizer(task: nn.Module, options: TrainingOptions) -> torch.optim.Optimizer:
    """The recipe's optimiser over the task's trainable parameters. Errors: RecipeError where none is left."""
    trainable: list[Tensor] = [p for p in task.parameters() if p.requires_grad]
    if not trainable:
        raise RecipeError(f"training.freeze = {list(options.freeze)} leaves nothing to train")
    rates = rates_of(task, options)
    if options.optimizer == "sgd":
        return torch.optim.SGD(
            groups_of(trainable, options, options.learning_rate, rates),
            lr=options.learning_rate,
            momentum=options.momentum,
            nesterov=options.nesterov,
        )
    if options.optimizer == "adamw":
        return adamw(trainable, options, rates)
    tables = {id(m.weight) for m in task.modules() if isinstance(m, nn.Embedding)}
    hidden = [p for p in trainable if p.ndim == 2 and id(p) not in tables]
    chosen = {id(p) for p in hidden}
    groups = [group | {"weight_decay": 0.0} for group in groups_of(hidden, options, options.muon_learning_rate, rates)]
    muon = torch.optim.Muon(groups, lr=options.muon_learning_rate, weight_decay=0.0, adjust_lr_fn="original")
    return MuonWithAdamW(muon, adamw([p for p in trainable if id(p) not in chosen], options, rates))


def adamw(parameters: list[Tensor], options: TrainingOptions, rates: Mapping[int, float]) -> torch.optim.AdamW:
    """torch's fused AdamW."""
    groups = groups_of(parameters, options, options.learning_rate, rates)
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas, fused=True)


def groups_of(
    parameters: list[Tensor], options: TrainingOptions, learning_rate: float, rates: Mapping[int, float]
) -> list[dict[str, Any]]:
    """Parameter groups by weight decay, vectors apart unless they are decayed as well, and by learning rate."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for spared in (False, True):
        for parameter in parameters:
            if (parameter.ndim < 2 and not options.decay_vectors) == spared:
                key = (learning_rate * rates.get(id(parameter), 1.0), 0.0 if spared else options.weight_decay)
                groups.setdefault(key, []).append(parameter)
    return [{"params": own, "lr": rate, "weight_decay": decay} for (rate, decay), own in groups.items()]


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
