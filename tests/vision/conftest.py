from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

COLOURS = {"blue": (20, 30, 200), "green": (20, 200, 40), "red": (220, 30, 20)}


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """``train`` and ``val`` with three classes of noisy plain colours, 12 and 4 images each."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for name, colour in COLOURS.items():
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for n in range(count):
                noise = generator.normal(0, 40, (36, 40, 3)) + np.array(colour)
                Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(folder / f"{n}.png")
    return tmp_path / "images"


@pytest.fixture
def tiny_recipe(image_folder: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A recipe that trains in about a second; keyword arguments change keys of the table they name."""

    def recipe(**changes: dict[str, Any]) -> dict[str, Any]:
        tables: dict[str, Any] = {
            "model": {"backbone": "fd_mobilenet_x0_25"},
            "data": {"kind": "folder", "root": str(image_folder), "image_size": 32, "resize": 36},
            "augmentation": {"crop": "resized", "scale": [0.5, 1.0], "color_jitter": 0.1},
            "task": {"label_smoothing": 0.1},
            "training": {
                "output": str(tmp_path / "run"), "steps": 6, "batch_size": 8, "optimizer": "sgd",
                "learning_rate": 0.05, "log_every": 2, "save_every": 100, "threads": 1,
            },
        }  # fmt: skip
        for table, values in changes.items():
            tables[table] = tables.get(table, {}) | values
        return tables

    return recipe
