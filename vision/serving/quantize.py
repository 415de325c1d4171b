"""An exported file with 8-bit weights and activations, by ONNX Runtime's static quantisation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

# Early maps carry the fine differences, so 8 bits begin where the answers still hold, and never after half the layers.
FIRST_INT8_LAYERS = (0, 2, 4, 6, 8)
POOL_AND_HEAD = ("ReduceMean", "Gemm", "Squeeze", "Sigmoid")
CALIBRATION_BATCH = 32


def quantize(plain: Path, output: Path, rows: Tensor, first_layer: int, metadata: Mapping[str, str]) -> None:
    """8 bits from the convolution ``first_layer`` to the last, weights by channel, ranges from ``rows`` uint8 [N, ...].

    Weights keep to 7 bits (``reduce_range``): without VNNI a processor adds pairs of 8-bit products in 16 bits, which
    overflow, and the file may be run on any.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[Tensor] = iter(torch.split(rows, CALIBRATION_BATCH))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": (batch.float() / 255).numpy()}

    with TemporaryDirectory() as scratch:
        prepared = Path(scratch) / "prepared.onnx"
        quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
        nodes = onnx.load(prepared).graph.node
        kept = [node.name for node in nodes if node.op_type == "Conv"][:first_layer]
        kept += [node.name for node in nodes if node.op_type in POOL_AND_HEAD]
        quantize_static(
            str(prepared), str(output), Reader(), quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=True,
            weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8, nodes_to_exclude=kept,
        )  # fmt: skip
    model = onnx.load(output)  # quantisation drops what the file says of itself
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.save(model, output)
