"""Averaged weights: how they move, and that the statistics they are used with are their own."""

import copy

import pytest
import torch
from torch import nn

from vision.tasks.averaging import MovingAverage, ramped_decay, reestimate, training_batches


def test_the_decay_ramps_up_to_what_was_asked() -> None:
    assert [ramped_decay(0.9, n) for n in (0, 8, 10_000)] == [0.1, 0.5, 0.9]


def test_a_short_run_forgets_where_it_began() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = MovingAverage(model, 0.998)
    for step in range(1000):
        nn.init.constant_(model.weight, 1.0 if step else 100.0)
        average.update(model)
    assert float(average.network.weight) == pytest.approx(1.0, abs=1e-3)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm2d(4))


def test_statistics_are_those_of_the_averaged_weights() -> None:
    model = network()
    average = MovingAverage(model, 0.9)
    average.update(model)
    nn.init.constant_(model[0].weight, 5.0)
    average.update(model)
    task = nn.ModuleList([model, average])
    images = torch.rand(12, 3, 8, 8)
    batches = [{"images": part} for part in images.split(4)]
    before = torch.get_rng_state()
    reestimate(task, average.network, lambda own, batch: own(batch["images"]), batches)
    maps = average.network[0](images)
    torch.testing.assert_close(average.network[1].running_mean, maps.mean(dim=(0, 2, 3)))
    assert not torch.allclose(average.network[1].running_mean, model[1].running_mean)
    assert torch.equal(torch.get_rng_state(), before)
    assert task.training and average.network[1].momentum == 0.1
    assert not average.network[0].weight.requires_grad


def test_statistics_do_not_depend_on_those_before() -> None:
    first = network()
    second = copy.deepcopy(first)
    second[1].running_mean.fill_(100)
    batches = [{"images": torch.rand(4, 3, 8, 8)}]
    for model in (first, second):
        reestimate(model, model, lambda own, batch: own(batch["images"]), batches)
    assert torch.equal(first[1].running_mean, second[1].running_mean)
    assert torch.equal(first[4].running_var, second[4].running_var)


def test_the_same_batches_come_at_every_call() -> None:
    data = [torch.tensor(n) for n in range(10)]

    def drawn() -> list[list[int]]:
        batches = training_batches(data, 4, lambda samples: {"n": torch.stack(samples)})  # type: ignore[arg-type]
        return [batch["n"].tolist() for batch in batches]

    assert drawn() == drawn()
    assert [len(batch) for batch in drawn()] == [4, 4]
