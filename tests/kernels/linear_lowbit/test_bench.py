import io
from pathlib import Path

import pytest
from rich.console import Console

from kernels import native
from kernels.linear_lowbit import bench

TINY = bench.ModelShape(64, 96, 2, 4, 2, 128)


@pytest.fixture
def result(monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setitem(bench.SHAPES, "tiny", TINY)
    return bench.bench_kernels(["tiny"], rows=(1, 3), rounds=1)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_engine_and_number_of_rows_is_reported(result: dict) -> None:
    seen = {(entry["weights"], entry["engine"], entry["rows"]) for entry in result["results"]}
    engines = {"int4": "torch int4pack", "int8": "torch dynamic int8", "bf16": "torch bf16"}
    assert seen == {(w, e, r) for w, peer in engines.items() for e in ("ours", peer) for r in (1, 3)}
    assert all(entry["ms"] > 0 and entry["scope"] == "products" for entry in result["results"])
    if native.library() is not None:
        assert result["stream_gb_per_s"] > 0 and native.instruction_set() in result["hardware"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_table_and_plot(result: dict, tmp_path: Path) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(bench.table(result))
    assert "torch int4pack" in console.export_text()
    bench.plot(result, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_unknown_shapes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown: 2B; known are 1B, 3B, 7B"):
        bench.bench_kernels(["2B"])


def test_a_shape_lists_every_product() -> None:
    assert len(bench.SHAPES["1B"].matrices()) == 65
