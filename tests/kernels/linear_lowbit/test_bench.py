import importlib.util

import pytest
import torch

from kernels import native
from kernels.linear_lowbit import bench, bench_peers

TINY = bench.ModelShape(64, 96, 2, 4, 2, 128)
QUIET = pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning", "ignore::UserWarning")


class NoLimits(bench.Limits):
    def __init__(self) -> None:
        pass

    def measure(self) -> None:
        pass


def test_numbers_of_rows_take_turns_in_coming_first_and_are_reported_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SETTLE_S", 0.0)
    asked: list[int] = []

    def timed_pass(rows: int) -> float:
        asked.append(rows)
        return float(rows)

    samples = bench.measure_in_turns({"ours": timed_pass}, (1, 2, 4), 2, NoLimits())
    assert asked == [1, 2, 4, 2, 4, 1, 4, 1, 2]
    assert list(samples.items()) == [(("ours", 1), [1, 1]), (("ours", 2), [2, 2]), (("ours", 4), [4, 4])]


@QUIET
def test_every_engine_and_number_of_rows_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.SHAPES, "tiny", TINY)
    limits, said = bench.Limits(), []
    options = bench.BenchOptions(["tiny"], rows=(1, 3), rounds=1, layers=1)
    results, skipped = bench.bench_products(options, limits, said.append)
    seen = {(entry["weights"], entry["engine"], entry["rows"]) for entry in results}
    engines = {("int4", "torch int4pack"), ("int8", "torch dynamic int8"), ("bf16", "torch bf16")}
    engines |= {(weights, "ours") for weights in bench.BITS}
    for weights, name in (("int4", "ONNX Runtime"), ("int4", "OpenVINO"), ("int8", "OpenVINO")):
        assert (name in skipped) == ((weights, name, 1) not in seen)
        engines |= set() if name in skipped else {(weights, name)}
    assert seen == {(w, e, r) for w, e in engines for r in (1, 3)}
    assert all(entry["ms"] > 0 and entry["layers"] == 1 for entry in results) and len(said) == 3
    if native.library() is not None:
        machine = bench.describe_machine(limits)
        assert machine["stream_gb_per_s"] > 0 and native.instruction_set() in machine["hardware"]
        assert len(limits.dots) == 6


def test_missing_engines_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for create, name in ((bench_peers.openvino("int4"), "openvino"), (bench_peers.onnxruntime_int4, "onnxruntime")):
        with pytest.raises(bench_peers.EngineMissing, match=f"NOT INSTALLED: pip install {name}"):
            create([(32, 32)], 1)


def test_onnxruntime_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    engine = bench_peers.onnxruntime_int4([(32, 64), (96, 32)], 1)
    outputs = engine.run({64: torch.randn(3, 64), 32: torch.randn(3, 32)})
    assert [out.shape for out in outputs] == [(3, 32), (3, 96)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shapes": ["2B"]}, "unknown: 2B; known are smollm2-135m, 0.5B, 1B, 3B, 7B"),
        ({"weights": ["int3"]}, "unknown: int3; known are int4, int8, bf16"),
        ({"groups": [48]}, "unknown: 48; known are 16, 32, 64, 128"),
        ({"rows": [0]}, "must be at least 1"),
        ({"layers": 0}, "must be at least 1"),
    ],
)
def test_unknown_settings_are_refused_by_name(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.BenchOptions(**fields)


def test_a_shape_lists_every_product() -> None:
    assert len(bench.SHAPES["1B"].matrices()) == 65
    assert bench.BenchOptions(layers=3).shape("1B").num_layers == 3
