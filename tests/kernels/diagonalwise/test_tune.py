import random
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from kernels.diagonalwise import DiagonalwiseConv2d, TuningTable, tune
from kernels.diagonalwise.timing import Step, Timing, compare
from kernels.diagonalwise.tune import NATIVE, Choice, fastest

IMAGES = torch.zeros(2, 8, 6, 6)


def block(stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(8, 8, 3, stride, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, bias=False)
    )


class Scripted:
    """Runs every step once and answers with given times."""

    def __init__(self, **timings: Timing) -> None:
        self.timings = timings
        self.calls = 0

    def __call__(self, steps: Mapping[str, Step], device: torch.device) -> dict[str, Timing]:
        self.calls += 1
        for step in steps.values():
            step()
        slow = Timing(50, 50, 50)
        if "tuned" in steps and "tuned" not in self.timings:
            return {"native": slow, "tuned": slow}
        return {name: self.timings.get(name, slow) for name in steps}


def run(model: nn.Module, measure: Scripted, table: TuningTable | None = None) -> list[Choice]:
    return tune(model, IMAGES, table=table, measure=measure)


def test_the_fastest_clear_winner_is_taken() -> None:
    model = block()
    measure = Scripted(
        native=Timing(9, 10, 11), diagonalwise_m16=Timing(4, 5, 6), diagonalwise_m32=Timing(2, 3, 8)
    )  # fmt: skip
    (choice,) = run(model, measure)
    assert (choice.layer, choice.chosen) == ("0", "diagonalwise_m32")
    assert isinstance(model[0], DiagonalwiseConv2d)


@pytest.mark.parametrize("rival", [Timing(5, 9.5, 10), Timing(8.9, 9, 9.1), Timing(20, 30, 40)])
def test_native_stays_unless_beaten_beyond_noise(rival: Timing) -> None:
    model = block()
    layer = model[0]
    (choice,) = run(model, Scripted(native=Timing(9, 10, 11), diagonalwise_m8=rival))
    assert choice.chosen == NATIVE
    assert model[0] is layer


def test_what_is_chosen_is_never_slower_than_native_in_the_measurement() -> None:
    generator = random.Random(0)
    for _ in range(200):
        timings = {}
        for name in (NATIVE, "diagonalwise_m8", "diagonalwise_m16", "triton"):
            timings[name] = Timing(*sorted(generator.uniform(1, 5) for _ in range(3)))
        chosen = fastest(timings)
        assert timings[chosen].median_ms <= timings[NATIVE].median_ms
        assert chosen == NATIVE or timings[chosen].upper_ms < timings[NATIVE].lower_ms


def test_equal_layers_are_measured_once_and_tables_are_reused() -> None:
    table = TuningTable()
    measure = Scripted(native=Timing(1, 1, 1))
    choices = run(nn.Sequential(block(), block(), block(2)), measure, table)
    assert [choice.layer for choice in choices] == ["0.0", "1.0", "2.0"]
    assert measure.calls == len(table.timings) == 2
    run(block(), measure, table)
    assert measure.calls == 2


def test_layout_type_and_mode_are_measured_apart() -> None:
    table = TuningTable()
    measure = Scripted(native=Timing(1, 1, 1))
    tune(block(), IMAGES, table=table, measure=measure)
    tune(block(), IMAGES.to(memory_format=torch.channels_last), table=table, measure=measure)
    tune(block().double(), IMAGES.double(), table=table, measure=measure)
    tune(block().eval(), IMAGES, table=table, measure=measure)
    assert measure.calls == 4
    assert len(table.timings) == 4


def test_tuning_leaves_values_statistics_and_gradients_alone() -> None:
    model = block()
    x = torch.randn(2, 8, 6, 6)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    tune(model, x, measure=Scripted(native=Timing(9, 9, 9), diagonalwise_m8=Timing(1, 1, 1)))
    assert isinstance(model[0], DiagonalwiseConv2d)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_tuning_again_may_go_back_to_native() -> None:
    model = block()
    run(model, Scripted(native=Timing(9, 9, 9), diagonalwise_m8=Timing(1, 1, 1)))
    run(model, Scripted(native=Timing(1, 1, 1)))
    assert type(model[0]) is nn.Conv2d


def test_layers_that_win_alone_and_lose_together_stay_native() -> None:
    model = block()
    times = {"native": Timing(9, 9, 9), "diagonalwise_m8": Timing(1, 1, 1)}
    (choice,) = run(model, Scripted(**times, tuned=Timing(9.5, 10, 10)))
    assert choice.chosen == NATIVE and choice.timings["diagonalwise_m8"].median_ms == 1
    assert type(model[0]) is nn.Conv2d
    (choice,) = run(model, Scripted(**times, tuned=Timing(8, 10, 10)))
    assert choice.chosen == "diagonalwise_m8", "within noise the layers' own times decide"


def test_the_real_measurement_runs() -> None:
    (choice,) = tune(block(), IMAGES)
    assert set(choice.timings) == {NATIVE, "diagonalwise_m8", "diagonalwise_m16", "diagonalwise_m32"}
    assert all(0 < t.lower_ms <= t.median_ms <= t.upper_ms for t in choice.timings.values())


def test_contenders_take_turns() -> None:
    order: list[str] = []
    compare({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, torch.device("cpu"), 1, 2)
    assert order == ["a", "b"] * 3
