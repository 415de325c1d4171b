"""Faces of discs, in the folders of the London set, and a recogniser of colours: what tests train and measure on."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from vision.face_quality.alignment import TEMPLATE

LANDMARKS = TEMPLATE * 2 + np.array([70.0, 60.0])
SIZE = 360


def drawn_face(person: int = 1, shift: tuple[int, int] = (0, 0)) -> Image.Image:
    """A face whose five features lie at ``LANDMARKS``, textured, coloured by the person."""
    texture = np.random.default_rng(person).integers(60, 200, (24, 24, 3), dtype=np.uint8)
    image = Image.fromarray(texture).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for place, (x, y) in enumerate(LANDMARKS):
        draw.ellipse((x - 12, y - 6, x + 12, y + 6), fill=(250 - 40 * place, person % 256, 20 * place))
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=(10, 10, 10))
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, -shift[0], 0, 1, -shift[1]))


def write_points(file: Path) -> None:
    """The set's 189 landmarks, those that matter at their places."""
    points = np.zeros((189, 2))
    points[[0, 1]] = LANDMARKS[:2]
    points[54], points[60] = LANDMARKS[2] - [4, 0], LANDMARKS[2] + [4, 0]
    points[[87, 93]] = LANDMARKS[3:]
    np.savetxt(file, points, fmt="%.2f")


def write_london(root: Path, people: tuple[str, ...]) -> Path:
    """Two photographs of each person."""
    for folder in ("neutral_front", "smiling_front"):
        (root / folder).mkdir(parents=True)
    rows = ["face_id,face_age,face_gender,face_eth"]
    for person in people:
        neutral = root / "neutral_front" / f"{person}_03.jpg"
        drawn_face(int(person)).save(neutral, quality=95)
        write_points(neutral.with_suffix(".pts.txt"))
        drawn_face(int(person), (14, -9)).save(root / "smiling_front" / f"{person}_08.jpg", quality=95)
        rows.append(f"{person},24,female,white" if int(person) % 2 else f"{person},,male,black")
    (root / "london_info.csv").write_text("\n".join(rows) + "\n")
    return root


def write_colour_recogniser(file: Path, cells: int = 8) -> Path:
    """An ONNX recogniser whose feature is the picture itself, small and without its mean."""
    import onnx
    from onnx import TensorProto, helper

    side = 112 // cells
    nodes = [
        helper.make_node("AveragePool", ["data"], ["cells"], kernel_shape=[side, side], strides=[side, side]),
        helper.make_node("Flatten", ["cells"], ["flat"]),
        helper.make_node("ReduceMean", ["flat"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("Sub", ["flat", "mean"], ["feature"]),
    ]
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, ["batch", 3, 112, 112])],
        [helper.make_tensor_value_info("feature", TensorProto.FLOAT, ["batch", 3 * cells * cells])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=9), file)
    return file
