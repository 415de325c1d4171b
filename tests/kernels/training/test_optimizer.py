import copy
from typing import Any

import pytest
import torch
from torch import nn

from kernels.training import RecipeError, TrainingOptions
from kernels.training.optimizer import MuonWithAdamW, create_optimizer, create_schedule, freeze


def options(**changes: Any) -> TrainingOptions:
    return TrainingOptions(**({"output": "x", "steps": 10, "learning_rate": 0.1} | changes))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4, bias=False))
    net[3].weight.requires_grad_(False)
    return net


def take_steps(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        net(torch.tensor([step % 5, (step + 2) % 5])).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_state_round_trip(name: str) -> None:
    whole, broken = model(), model()
    optimizer = create_optimizer(whole, options(optimizer=name))
    take_steps(whole, optimizer, 6)
    first = create_optimizer(broken, options(optimizer=name))
    take_steps(broken, first, 3)
    state = copy.deepcopy(first.state_dict())
    second = create_optimizer(broken, options(optimizer=name))
    second.load_state_dict(state)
    for step in range(3, 6):
        second.zero_grad()
        broken(torch.tensor([step % 5, (step + 2) % 5])).square().sum().backward()
        second.step()
    assert all(torch.equal(v, broken.state_dict()[k]) for k, v in whole.state_dict().items())


def test_muon_takes_hidden_matrices_and_nothing_else() -> None:
    net = model()
    optimizer = create_optimizer(net, options(optimizer="muon"))
    assert isinstance(optimizer, MuonWithAdamW)
    muon, adamw = optimizer.parts
    assert [p.shape for group in muon.param_groups for p in group["params"]] == [(4, 4)]
    assert muon.param_groups[0]["params"][0] is net[1].weight
    rest = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert rest == {id(p) for p in (net[0].weight, net[1].bias, net[2].weight, net[2].bias)}


def test_learning_rates_written_into_groups_reach_the_parts() -> None:
    net = model()
    optimizer = create_optimizer(net, options(optimizer="muon"))
    for loaded in (False, True):
        if loaded:
            optimizer.load_state_dict(optimizer.state_dict())
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        before = copy.deepcopy(net.state_dict())
        take_steps(net, optimizer, 1)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_vectors_are_decayed_only_on_request(name: str) -> None:
    net = model()
    vectors = {id(p) for p in net.parameters() if p.ndim == 1}
    for decay_vectors in (False, True):
        settings = options(optimizer=name, weight_decay=0.1, decay_vectors=decay_vectors)
        decay = {id(p): g["weight_decay"] for g in create_optimizer(net, settings).param_groups for p in g["params"]}
        assert {decay[key] for key in vectors} == {0.1 if decay_vectors else 0.0}
        assert {value for key, value in decay.items() if key not in vectors} == {0.1}


def test_sgd_follows_the_recipe() -> None:
    group = create_optimizer(model(), options(optimizer="sgd", momentum=0.8, nesterov=True)).param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.1, 0.8, True)


def test_step_schedule() -> None:
    settings = options(optimizer="sgd", schedule="step", schedule_options={"every": 3, "factor": 0.1}, warmup_steps=1)
    optimizer = create_optimizer(model(), settings)
    schedule = create_schedule(optimizer, settings)
    assert schedule is not None
    rates = []
    for _ in range(7):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.01, 0.01, 0.01, 0.001])
    assert create_schedule(optimizer, options()) is None


def test_the_learning_rate_drops_at_the_listed_steps() -> None:
    changes = {"schedule": "step", "schedule_options": {"at": [4, 7], "factor": 0.1}, "warmup_steps": 1}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = create_schedule(optimizer, options(**changes))
    assert schedule is not None
    rates = []
    for _ in range(9):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.5, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])


class Task(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({
            "body": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "bodyguard": nn.Linear(4, 4),
            "head": nn.Linear(4, 2),
        })  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model["head"](self.model["bodyguard"](self.model["body"](x)))


def test_what_is_frozen_keeps_its_weights_and_its_statistics() -> None:
    torch.manual_seed(0)
    task, wish = Task(), options(optimizer="sgd", freeze=("body",))
    before = {name: value.clone() for name, value in task.state_dict().items()}
    freeze(task, wish)
    optimizer = create_optimizer(task, wish)
    task.train()
    task(torch.randn(8, 4) + 3).square().sum().backward()
    optimizer.step()
    moved = {name for name, value in task.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"model.{part}.{kind}" for part in ("bodyguard", "head") for kind in ("weight", "bias")}


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_parts_have_rates_of_their_own(name: str) -> None:
    task = Task()
    rates = {"body": 0.1, "body.1": 0.5}
    optimizer = create_optimizer(task, options(optimizer=name, rates=rates, muon_learning_rate=0.1))
    found = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    names = {parameter: found[id(value)] for parameter, value in task.named_parameters()}
    assert {key: round(rate, 6) for key, rate in names.items() if key.startswith("model.body.")} == {
        "model.body.0.weight": 0.01, "model.body.0.bias": 0.01, "model.body.1.weight": 0.05, "model.body.1.bias": 0.05,
    }  # fmt: skip
    assert {rate for key, rate in names.items() if not key.startswith("model.body.")} == {0.1}


def test_names_of_nothing_and_freezing_everything_are_refused() -> None:
    for wish, words in (
        ({"freeze": ("bode",)}, "parts are body, bodyguard, head"),
        ({"rates": {"x": 0.1}}, "begins so"),
    ):
        with pytest.raises(RecipeError, match=words):
            freeze(Task(), options(**wish))
            create_optimizer(Task(), options(**wish))
    task, wish = Task(), options(freeze=("body", "bodyguard", "head"))
    freeze(task, wish)
    with pytest.raises(RecipeError, match="leaves nothing"):
        create_optimizer(task, wish)
    with pytest.raises(RecipeError, match="above 0"):
        options(rates={"body": 0})
