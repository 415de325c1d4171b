"""A detector of a few bytes: it calls each half of an image red or blue by its mean colour. No torch."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

DETECTIONS = "/v1/vision/detections"
SIZE = 32
CLASSES = ("red", "blue")
CONFIG = {
    "format": "dovetail-detector",
    "class_names": CLASSES,
    "licence": "MIT",
    "image_size": SIZE,
    "resize": "stretch",
    "description": "halves",
    "head": {"score_threshold": 0.05, "soft_nms_threshold": 0.5, "max_detections": 100},
}


def write_tiny_detector(folder: Path, **config: Any) -> Path:
    """A served folder: config.json and model.onnx, with the exporter's names and shapes."""
    import onnx
    from onnx import TensorProto, helper

    half = SIZE // 2
    boxes = [0, 0, half, SIZE, half, 0, SIZE, SIZE]
    nodes = [
        helper.make_node("AveragePool", ["images"], ["halves"], kernel_shape=[SIZE, half], strides=[SIZE, half]),
        helper.make_node("Squeeze", ["halves", "row"], ["columns"]),
        helper.make_node("Transpose", ["columns"], ["colours"], perm=[0, 2, 1]),
        helper.make_node("Gather", ["colours", "red_and_blue"], ["probabilities"], axis=2),
        helper.make_node("Shape", ["images"], ["batch"], start=0, end=1),
        helper.make_node("Concat", ["batch", "tail"], ["shape"], axis=0),
        helper.make_node("Expand", ["both"], ["boxes"]),
    ]
    nodes[-1].input.append("shape")
    graph = helper.make_graph(
        nodes,
        "halves",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["batch", 2, 4]),
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 2, 2]),
        ],
        [
            helper.make_tensor("row", TensorProto.INT64, [1], [2]),
            helper.make_tensor("red_and_blue", TensorProto.INT64, [2], [0, 2]),
            helper.make_tensor("tail", TensorProto.INT64, [2], [2, 4]),
            helper.make_tensor("both", TensorProto.FLOAT, [1, 2, 4], [float(value) for value in boxes]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    values = CONFIG | config
    helper.set_model_props(model, {"detector": json.dumps(values), "weights_sha256": "none"})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    onnx.save(model, folder / "model.onnx")
    return folder


def halves(left: str = "red", right: str = "black", size: tuple[int, int] = (64, 48)) -> Image.Image:
    """An image of two colours, left and right."""
    image = Image.new("RGB", size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    return image


def encoded(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    """The image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def b64(data: bytes) -> str:
    """A file as JSON carries it."""
    return base64.b64encode(data).decode()


def as_part(data: bytes, name: str = "image") -> tuple[str, tuple[str, bytes, str]]:
    """A file as a part of a form."""
    return (name, ("a.png", data, "image/png"))


async def ask(client: httpx.AsyncClient, data: bytes, **fields: Any) -> httpx.Response:
    """What is on one image."""
    return await client.post(DETECTIONS, json={"image": b64(data), **fields})
