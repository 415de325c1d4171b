"""A face-quality scorer of a few bytes: the mean red of an aligned face is its score. No torch."""

import json
from pathlib import Path
from typing import Any

FACE_QUALITY, FORMAT = "face-quality", "dovetail-face-quality"

CONFIG = {
    "format": FORMAT,
    "width": 1,
    "scale": {"midpoint": 0.5, "width": 0.1},
    "licence": "MIT",
    "description": "redness",
    "labels": {},
}


def write_tiny_scorer(folder: Path, **config: Any) -> Path:
    """A served folder: config.json and model.onnx, with the exporter's names and shapes."""
    import onnx
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["colour"]),
        helper.make_node("Gather", ["colour", "red"], ["column"], axis=1),
        helper.make_node("Reshape", ["column", "flat"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "redness",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 112, 112])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch"])],
        [
            helper.make_tensor("red", TensorProto.INT64, [1], [0]),
            helper.make_tensor("flat", TensorProto.INT64, [1], [-1]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    values = CONFIG | config
    helper.set_model_props(model, {FACE_QUALITY: json.dumps(values), "weights_sha256": "d1"})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    onnx.save(model, folder / "model.onnx")
    return folder
