"""A data set of coloured shapes that a detector learns in a minute."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

SHAPES = {"disc": (230, 60, 40), "square": (50, 90, 230)}


def draw_scene(generator: np.random.Generator, side: int) -> tuple[Image.Image, list[tuple[str, tuple[int, ...]]]]:
    """One or two shapes on noise; corners x1, y1, x2, y2 with the last pixel excluded."""
    image = Image.fromarray(generator.integers(90, 140, (side, side, 3), dtype=np.uint8))
    pen, shapes = ImageDraw.Draw(image), []
    for half in range(int(generator.integers(1, 3))):
        name = ("disc", "square")[int(generator.integers(2))]
        size = int(generator.integers(28, 44))
        x, y = (
            int(generator.integers(0, side - size)),
            half * side // 2 + int(generator.integers(0, side // 2 - size + 1)),
        )
        box = (x, y, x + size - 1, y + size - 1)
        (pen.ellipse if name == "disc" else pen.rectangle)(box, fill=SHAPES[name])
        shapes.append((name, (x, y, x + size, y + size)))
    return image, shapes


@pytest.fixture
def shapes_folder(tmp_path: Path) -> Path:
    """VOC's layout, 96 pixels square: 12 images in ``train``, 6 in ``val``."""
    root = tmp_path / "shapes"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        stems = [f"{split}{n}" for n in range(count)]
        (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(stems))
        for stem in stems:
            image, shapes = draw_scene(generator, 96)
            image.save(root / "JPEGImages" / f"{stem}.jpg", quality=95)
            objects = "".join(
                f"<object><name>{name}</name><bndbox><xmin>{box[0] + 1}</xmin><ymin>{box[1] + 1}</ymin>"
                f"<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
                for name, box in shapes
            )
            (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{objects}</annotation>")
    return root


@pytest.fixture
def detector_recipe(shapes_folder: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A recipe of a few quick steps; keyword arguments change keys of the table they name."""

    def recipe(**changes: dict[str, Any]) -> dict[str, Any]:
        tables: dict[str, Any] = {
            "model": {"backbone": "fd_mobilenet_x0_25", "anchor_scales": [24, 36, 52], "anchor_ratios": [1.0]},
            "data": {"kind": "voc", "root": str(shapes_folder), "image_size": 96, "cache_mib": 10},
            "augmentation": {"expand": 1.2, "crop_overlaps": []},
            "mining": {"regions": "ohem", "regions_per_image": 24, "anchors_per_image": 32},
            "task": {"proposals_before": 60, "proposals_after": 30, "warm_up_images": 8},
            "training": {
                "output": str(tmp_path / "run"), "steps": 4, "batch_size": 4, "optimizer": "adamw",
                "learning_rate": 3e-3, "clip_norm": 10.0, "log_every": 2, "save_every": 100, "threads": 1,
            },
        }  # fmt: skip
        for table, values in changes.items():
            tables[table] = tables.get(table, {}) | values
        return tables

    return recipe
