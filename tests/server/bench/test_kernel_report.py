import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from kernels import native
from kernels.linear_lowbit import bench
from server.bench import beside, kernel_report
from server.bench.whole_model import filled_target, profile_verify, random_model

TINY = bench.ModelShape(64, 96, 2, 4, 2, 128)


def entry(engine: str, rows: int, ms: float, **fields: object) -> dict:
    fixed = {"shape": "1B", "scope": "products", "weights": "int4", "group": 32, "context": 0, "layers": 16}
    return fixed | {"engine": engine, "rows": rows, "ms": ms, "ms_best": ms} | fields


def test_a_slow_first_row_is_called_out() -> None:
    results = [entry("ours", rows, ms) for rows, ms in ((1, 12.0), (2, 10.0), (4, 11.0))]
    results += [entry("ours", rows, ms, scope="model") for rows, ms in ((1, 10.4), (2, 10.0), (4, 11.0))]
    results += [entry("torch int4pack", rows, ms) for rows, ms in ((1, 90.0), (2, 10.0), (4, 11.0))]
    checks = kernel_report.honest_checks(results)
    assert [(check["scope"], check["t1_over_min_t2_t4"], check["holds"]) for check in checks] == [
        ("products", 1.2, False), ("model", 1.04, True),
    ]  # fmt: skip


def test_shares_of_the_bandwidth() -> None:
    report = {"stream_gb_per_s": 40.0, "results": [entry("ours", 1, 10.0, bytes=360_000_000)]}
    assert list(kernel_report.stream_shares(report).values()) == [pytest.approx(0.9)]


def test_flatness_compares_each_context_with_the_shortest() -> None:
    results = [entry("ours", rows, ms, scope="model", context=8192) for rows, ms in ((1, 10.0), (8, 18.0))]
    results += [entry("ours", rows, ms, scope="model", context=128) for rows, ms in ((1, 8.0), (8, 12.0))]
    results += [entry("ours", rows, ms) for rows, ms in ((1, 8.0), (8, 12.0))]
    found = kernel_report.flatness(results)
    assert [(line["context"], line["t8_over_t1"], line["over_shortest"]) for line in found] == [
        (128, 1.5, 1.0), (8192, 1.8, 1.2),
    ]  # fmt: skip


@pytest.mark.skipif(native.library() is None, reason="the native kernels are not built")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_products_and_models_in_one_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(bench.SHAPES, "tiny", TINY)
    options = bench.BenchOptions(["tiny"], ["int4", "bf16"], rows=(1, 2, 4), rounds=1, groups=(32,))
    report = kernel_report.bench_kernels(options, ["products", "model"], [8, 4], [], lambda _: None)
    seen = {(e["scope"], e["context"], e["engine"], e["weights"]) for e in report["results"]}
    assert {("model", context, "ours", w) for context in (4, 8) for w in ("int4", "bf16")} <= seen
    assert ("llama.cpp" in report["skipped"]) == (("model", 4, "llama.cpp", "int4") not in seen)
    assert len(report["checks"]) == 6 and len(report["outside_products"]) == 12
    assert all(entry["ms"] > 0 for entry in report["results"])
    assert len(report["parts"]) == 12 and "beside" not in report
    report["skipped"] = {"OpenVINO": "NOT INSTALLED: pip install openvino"}
    said = kernel_report.remarks(report)
    assert len(said) == 20 and "OpenVINO: NOT INSTALLED: pip install openvino" in said
    kernel_report.plot(report, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_the_tables_fit_80_columns_with_every_figure() -> None:
    slow = {1: 1234.5, 2: 2345.6, 4: 4321.0, 8: 8765.4, 16: 20000.0}
    results = [entry("torch dynamic int8", rows, ms, group=None) for rows, ms in slow.items()]
    results += [entry("ours", rows, 10.0 + rows, bytes=10**8) for rows in slow]
    results += [entry("ours", rows, 20.0 + rows, scope="model", context=64) for rows in slow]
    report = {"stream_gb_per_s": 10.0, "dot_gmac_per_s": 1.0, "hardware": "a machine", "results": results}
    console = Console(width=80, record=True, file=io.StringIO())
    for table in kernel_report.tables(report):
        console.print(table)
    text = console.export_text()
    assert text.count("16 rows") == 2 and "1B products int4" in text and "1B model int4 at 64" in text
    for figure in ("2e+04 x16.2", "8.77e+03 x7.1", "18 x1.64", "91%", "36 x1.71"):
        assert figure in text


@pytest.mark.skipif(native.library() is None, reason="the native kernels are not built")
def test_a_profiled_pass_is_accounted_for() -> None:
    packed = random_model(TINY, "int8", 16)
    with torch.inference_mode():
        target = filled_target(packed, 4, rows=8)
        entry = profile_verify(target, 8)
        with native.profiled() as nothing:
            pass
    parts = entry["parts_ms"]
    assert set(parts) == set(native.PARTS) and nothing == []
    for part in ("norms", "quantising", "products", "rope", "attention", "activation", "head"):
        assert parts[part] > 0, part
    # Every thread's laps fill the time between its first and its last: no part can be longer than all passes.
    assert sum(parts.values()) <= 1.01 * entry["ms"] and parts["products"] < entry["ms"]


@pytest.mark.skipif(native.library() is None, reason="the native kernels are not built")
def test_passes_beside_busy_processes_are_set_against_the_fair_share(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = iter([100.0, 40.0, 40.0, 8.0])
    monkeypatch.setattr(beside, "passes_per_s", lambda *_: next(speeds))
    monkeypatch.setattr(beside, "num_threads", lambda: 2)
    found = beside.in_turns({"ours": int, "llama.cpp": int}, [2], rounds=1, seconds=0.0)
    assert [(e["engine"], e["beside"], e["of_idle"], e["fair_share"], e["of_fair_share"]) for e in found] == [
        ("ours", 0, 1.0, 1.0, 1.0), ("llama.cpp", 0, 1.0, 1.0, 1.0),
        ("ours", 2, 0.4, 0.5, 0.8), ("llama.cpp", 2, 0.2, 0.5, 0.4),
    ]  # fmt: skip
    report = {"beside": [{"shape": "1B", "weights": "int4"} | entry for entry in found]}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(*kernel_report.beside_tables(report))
    assert "llama.cpp" in (text := console.export_text()) and "0.80" in text


def test_unknown_scopes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown: head; known are products, model"):
        kernel_report.bench_kernels(bench.BenchOptions(), ["head"], [64], [], lambda _: None)
