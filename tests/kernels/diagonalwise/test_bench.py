import json
from pathlib import Path

import pytest
import torch
from torch import nn

from kernels.diagonalwise import bench
from kernels.diagonalwise.bench import (
    BATCHES,
    DTYPES,
    GRID,
    BenchOptions,
    Cell,
    Geometry,
    WrongAnswerError,
    bench_layers,
    bench_nets,
    check_answers,
    ideal_megabytes,
    layer_contenders,
    layer_step,
    not_run,
)
from kernels.diagonalwise.bench_report import markdown, summarise, verdict, write_report
from kernels.diagonalwise.layer import DiagonalwiseConv2d
from kernels.diagonalwise.timing import Timing, compare

CPU = torch.device("cpu")


def exactly(ms: float) -> Timing:
    return Timing(ms, ms, ms)


def cell(work: str, **times: float) -> Cell:
    timings = {name: exactly(ms) for name, ms in times.items()}
    return Cell("net", Geometry(8, 8, 1), 1, "fp32", "nchw", work, 1.0, timings)


def test_grid_holds_the_layers_of_its_networks() -> None:
    assert {name: len(layers) for name, layers in GRID.items()} == {
        "mobilenet_v1_x1_0": 9, "fd_mobilenet_x1_0": 7, "snet146": 7, "menet_228_12x1_g3": 6,
    }  # fmt: skip
    assert {g.kernel for g in GRID["snet146"]} == {5}


def test_a_small_grid_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.GRID, "menet_228_12x1_g3", (Geometry(6, 8, 2), Geometry(4, 5, 1, 5)))
    options = BenchOptions(("menet_228_12x1_g3",), (1, 2), ("fp32",), passes=("forward", "step"), warmups=0, repeats=1)
    seen: list[Cell] = []
    cells = bench_layers(options, CPU, seen.append)
    assert seen == cells
    assert len(cells) == 2 * 2 * 1 * 2 * 2
    names = {"native", "diagonalwise_m8", "diagonalwise_m16", "diagonalwise_m32", "diagonalwise_dense", "masked"}
    assert all(set(c.timings) == names for c in cells)
    nets = bench_nets(
        {"tiny": lambda: nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.AdaptiveAvgPool2d(1), nn.Flatten())},
        CPU, batch=2, image_size=8, warmups=0, repeats=1,
    )  # fmt: skip
    assert set(nets["tiny"]) == ways("native", "refactored", "tuned")
    report = write_report(cells, nets, {"tf32": "no GPU"}, {"cpu": "some"}, tmp_path / "out" / "bench.json")
    kept = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert kept["verdict"] == report["verdict"]
    assert len(kept["cells"]) == len(cells)
    assert (kept["hardware"], kept["not_run"]) == ({"cpu": "some"}, {"tf32": "no GPU"})
    assert {"summary", "networks"} <= kept.keys()
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")


def ways(*names: str) -> set[str]:
    return {f"{name}_{layout}" for name in names for layout in ("nchw", "channels_last")}


def test_compiled_networks_take_part_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda model: compiled.append(model))
    nets = bench_nets(
        {"tiny": lambda: nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.AdaptiveAvgPool2d(1), nn.Flatten())},
        CPU, batch=2, image_size=8, warmups=0, repeats=1, compiled=True,
    )  # fmt: skip
    assert set(nets["tiny"]) == ways("native", "refactored", "tuned", "compiled_native", "compiled_refactored")
    assert sum(isinstance(layer, DiagonalwiseConv2d) for model in compiled for layer in model) == 2
    assert len(compiled) == 4


def test_wrong_answers_are_never_timed() -> None:
    geometry = Geometry(6, 8, 1)

    def wrong(layer: nn.Conv2d) -> nn.Conv2d:
        layer.weight.data[0, 0, 0, 0] += 1e-3
        return layer

    check_answers(geometry, layer_contenders(geometry, CPU, compiled=False), CPU)
    with pytest.raises(WrongAnswerError, match="wrong_one is wrong for Geometry"):
        check_answers(geometry, {"wrong_one": wrong}, CPU)


@pytest.mark.parametrize(("work", "wanted"), [
    ("forward", 0), ("input_gradient", 1), ("weight_gradient", 1), ("step", 2),
])  # fmt: skip
def test_a_pass_computes_its_gradients_only(work: str, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch.autograd, "grad", lambda y, inputs, dy: asked.append(len(inputs)))
    layer_step(Geometry(4, 6, 1).build(), torch.randn(1, 4, 6, 6), work)()
    assert asked == ([wanted] if wanted else [])


def test_ideal_traffic() -> None:
    x = torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16)
    assert ideal_megabytes(x, Geometry(4, 8, 1), "forward") == pytest.approx(2 * (512 + 512) / 1e6)
    assert ideal_megabytes(x, Geometry(4, 8, 2), "step") == pytest.approx(3 * 2 * (512 + 128) / 1e6)


def test_summary_and_verdict() -> None:
    cells = [
        cell("step", native=10, diagonalwise_m8=5, masked=40),
        cell("step", native=10, diagonalwise_m8=20, masked=40),
        cell("forward", native=1, diagonalwise_m8=3),
    ]
    rows = {(row["pass"], row["contender"]): row for row in summarise(cells)}
    assert rows["step", "diagonalwise_m8"]["geometric_mean_ratio"] == pytest.approx(1.0)
    assert (rows["step", "diagonalwise_m8"]["won"], rows["step", "diagonalwise_m8"]["cells"]) == (0.5, 2)
    assert (rows["step", "diagonalwise_m8"]["best"], rows["step", "diagonalwise_m8"]["worst"]) == (0.5, 2.0)
    assert rows["step", "masked"]["geometric_mean_ratio"] == pytest.approx(4.0)
    assert rows["forward", "diagonalwise_m8"]["cells"] == 1
    table = markdown(summarise(cells)).splitlines()
    assert table[0] == "| pass | type | layout | diagonalwise_m8 | masked |"
    assert table[2:] == ["| step | fp32 | nchw | 1.00 | 4.00 |", "| forward | fp32 | nchw | 3.00 | - |"]
    said = verdict(cells, {})
    assert "in 1 of 2 training steps of a layer (fp32 nchw stride 1: 1 of 2); its time is 1.00 of native's" in said
    assert "Whole networks were not measured" in said
    assert "No whole training steps" in verdict(cells[2:], {})
    assert "in 0 of 1 training steps of a layer; its time is 2.00" in verdict(cells[1:], {})
    nets = {"net": {"native_nchw": exactly(9), "native_channels_last": exactly(4), "refactored_nchw": exactly(6),
                    "refactored_channels_last": exactly(8), "tuned_nchw": exactly(9)}}  # fmt: skip
    assert "native's time: net 1.50 refactored, 2.25 tuned." in verdict(cells, nets)


def test_what_is_not_run_is_said_with_the_reason() -> None:
    whole = BenchOptions(batches=BATCHES, dtypes=tuple(DTYPES), compiled=True)
    assert set(not_run(whole, CPU)) == {"tf32", "triton", "max-autotune", "cudnn"}
    assert not_run(whole, torch.device("cuda")) == {}
    part = not_run(BenchOptions(("snet146",), (1, 64), ("fp32",), ("nchw",), ("step",)), torch.device("cuda"))
    assert set(part) == {
        "networks fd_mobilenet_x1_0, menet_228_12x1_g3, mobilenet_v1_x1_0", "batches 16, 256",
        "dtypes bf16, fp16, tf32", "layouts channels_last", "passes forward, input_gradient, weight_gradient",
        "torch.compile",
    }  # fmt: skip


def test_tf32_is_allowed_in_its_own_cells_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.GRID, "snet146", (Geometry(4, 5, 1, 5),))
    allowed: list[bool] = []

    def compare(*_: object) -> dict[str, Timing]:
        allowed.append(torch.backends.cudnn.allow_tf32)
        return {"native": exactly(1)}

    monkeypatch.setattr(bench, "compare", compare)
    monkeypatch.setattr(bench, "needs_gpu", lambda _: {})
    bench_layers(BenchOptions(("snet146",), (1,), ("fp32", "tf32"), ("nchw",), ("step",)), CPU)
    assert allowed == [False, True]


def test_compiled_contenders_are_compiled_in_both_modes_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(nn.Conv2d, "compile", lambda self, mode: asked.append(mode))
    for device in (CPU, torch.device("cuda")):
        builders = layer_contenders(Geometry(8, 8, 1), device, compiled=True)
        for name, build in builders.items():
            if name.endswith("compiled"):
                build(Geometry(8, 8, 1).build())
    assert asked == ["default"] * 2 + ["default", "max-autotune"] * 2


def test_a_cell_ends_when_its_time_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    steps = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    compare(steps, CPU, warmups=1, repeats=100, limit_s=0.0)
    assert calls == ["a", "b"] * 4, "one warm-up and the fewest repeats"


def test_unknown_parts_of_the_grid_are_named() -> None:
    with pytest.raises(ValueError, match="networks resnet50 are not known; allowed are mobilenet_v1_x1_0"):
        BenchOptions(networks=("resnet50",))
    with pytest.raises(ValueError, match="dtypes fp8"):
        BenchOptions(dtypes=("fp8",))
