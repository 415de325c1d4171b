"""The products of other engines on the same shapes: torch, ONNX Runtime, OpenVINO. Weights are random.

Each engine answers one call with all products of a pass. ONNX Runtime and OpenVINO get all matrices as one graph, so
that their own overhead falls on a pass and not on a product.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Size = tuple[int, int]  # [out, in] of a matrix
Inputs = Mapping[int, Tensor]  # activations [rows, in] by in
_PROTOBUF_BYTES = 1_900_000_000  # a graph with its weights inside must stay below 2 GB


class EngineMissing(RuntimeError):
    """An engine cannot take part; the message says why, and how to change that."""


@dataclass(frozen=True)
class Engine:
    """One contestant: ``run`` multiplies the inputs with every matrix of the shape, in order."""

    name: str
    weights: str
    group: int | None
    run: Callable[[Inputs], object]
    dtype: torch.dtype
    num_bytes: int | None = None  # what a pass streams, where known


def one_by_one(sizes: Sequence[Size], products: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Inputs], object]:
    """A pass that calls one product after the other."""

    def run(inputs: Inputs) -> None:
        for product, (_, width) in zip(products, sizes, strict=True):
            product(inputs[width])

    return run


def torch_bf16(sizes: Sequence[Size], threads: int) -> Engine:  # noqa: ARG001 - torch's threads are set for all
    """torch's own bf16 product."""
    made = {size: torch.randn(size).to(torch.bfloat16) for size in set(sizes)}

    def product(weight: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: nn.functional.linear(x, weight)

    run = one_by_one(sizes, [product(made[size].clone()) for size in sizes])
    return Engine("torch bf16", "bf16", None, run, torch.bfloat16)


def torch_dynamic_int8(sizes: Sequence[Size], threads: int) -> Engine:  # noqa: ARG001
    """torch's dynamically quantised linear: int8 weights with one scale, activations quantised per tensor."""
    from torch.ao.nn.quantized.dynamic import Linear

    made = {
        size: torch.quantize_per_tensor(torch.randint(-127, 128, size).float() * 0.01, 0.01, 0, torch.qint8)
        for size in set(sizes)
    }

    def product(size: Size) -> Callable[[Tensor], Tensor]:
        layer: Any = Linear(size[1], size[0], bias_=False)  # type: ignore[no-untyped-call]
        layer.set_weight_bias(made[size], None)  # packs a copy
        return lambda x: layer(x)  # type: ignore[no-any-return]

    run = one_by_one(sizes, [product(size) for size in sizes])
    return Engine("torch dynamic int8", "int8", None, run, torch.float32)


def torch_int4(sizes: Sequence[Size], threads: int) -> Engine:  # noqa: ARG001
    """torch's int4 product for CPUs, groups of 32."""
    pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    made = {size: pack(torch.randint(0, 16, size, dtype=torch.int32), 1) for size in set(sizes)}

    def product(size: Size) -> Callable[[Tensor], Tensor]:
        packed = made[size].clone()
        scales = torch.full((size[1] // 32, size[0], 2), 0.01, dtype=torch.bfloat16)
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 32, scales)  # type: ignore[no-any-return]

    run = one_by_one(sizes, [product(size) for size in sizes])
    return Engine("torch int4pack", "int4", 32, run, torch.bfloat16)


def onnxruntime_int4(sizes: Sequence[Size], threads: int) -> Engine:
    """ONNX Runtime's MatMulNBits, blocks of 32, activations in int8 (accuracy level 4)."""
    if not (importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx")):
        raise EngineMissing("NOT INSTALLED: pip install onnxruntime onnx")
    if sum(out * width for out, width in sizes) * 5 // 8 > _PROTOBUF_BYTES:
        raise EngineMissing("the graph would be larger than 2 GB; take fewer --layers")
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    made = {size: random.integers(0, 256, (size[0], size[1] // 32, 16), dtype=np.uint8) for size in set(sizes)}
    nodes, weights, outputs = [], [], []
    for number, size in enumerate(sizes):
        scales = np.full(size[0] * size[1] // 32, 0.01, dtype=np.float32)
        weights += [numpy_helper.from_array(made[size], f"b{number}"), numpy_helper.from_array(scales, f"s{number}")]
        nodes.append(
            helper.make_node(
                "MatMulNBits", [f"x{size[1]}", f"b{number}", f"s{number}"], [f"y{number}"], domain="com.microsoft",
                N=size[0], K=size[1], bits=4, block_size=32, accuracy_level=4,
            )
        )  # fmt: skip
        outputs.append(helper.make_tensor_value_info(f"y{number}", TensorProto.FLOAT, ["rows", size[0]]))
    widths = sorted({width for _, width in sizes})
    inputs = [helper.make_tensor_value_info(f"x{width}", TensorProto.FLOAT, ["rows", width]) for width in widths]
    graph = helper.make_graph(nodes, "products", inputs, outputs, weights)
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(given: Inputs) -> object:
        return session.run(None, {f"x{width}": given[width].numpy() for width in widths})

    return Engine("ONNX Runtime", "int4", 32, run, torch.float32)


def openvino(weights: str) -> Callable[[Sequence[Size], int], Engine]:
    """OpenVINO with compressed weights in groups of 32 and dynamic quantisation of activations."""

    def create(sizes: Sequence[Size], threads: int) -> Engine:
        if not importlib.util.find_spec("openvino"):
            raise EngineMissing("NOT INSTALLED: pip install openvino")
        import openvino as ov
        from openvino import opset13 as ops

        random, kind = np.random.default_rng(0), ov.Type.u4 if weights == "int4" else ov.Type.u8
        middle, bits = (8, 4) if weights == "int4" else (128, 8)
        made = {size: random.integers(0, 256, size[0] * size[1] * bits // 8, dtype=np.uint8) for size in set(sizes)}
        widths = sorted({width for _, width in sizes})
        inputs = {width: ops.parameter([-1, width], np.float32, name=f"x{width}") for width in widths}
        results = []
        for out, width in sizes:
            shape = [out, width // 32, 32]
            codes = ops.constant(ov.Tensor(made[out, width], ov.Shape(shape), kind))
            centred = ops.subtract(ops.convert(codes, "f16"), ops.constant(np.float16(middle)))
            scales = ops.constant(np.full([out, width // 32, 1], 0.01, dtype=np.float16))
            matrix = ops.reshape(ops.multiply(centred, scales), ops.constant([out, width]), special_zero=False)
            product = ops.matmul(inputs[width], ops.convert(matrix, "f32"), transpose_a=False, transpose_b=True)
            results.append(ops.result(product))
        settings = {
            "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 32,
        }  # fmt: skip
        model = ov.Model(results, list(inputs.values()), "products")
        request = ov.compile_model(model, "CPU", settings).create_infer_request()

        def run(given: Inputs) -> object:
            return request.infer([given[width].numpy() for width in widths], share_inputs=True, share_outputs=True)

        return Engine("OpenVINO", weights, 32, run, torch.float32)

    return create


PEERS: dict[str, dict[str, Callable[[Sequence[Size], int], Engine]]] = {
    "int4": {"torch int4pack": torch_int4, "ONNX Runtime": onnxruntime_int4, "OpenVINO": openvino("int4")},
    "int8": {"torch dynamic int8": torch_dynamic_int8, "OpenVINO": openvino("int8")},
    "bf16": {"torch bf16": torch_bf16},
}
