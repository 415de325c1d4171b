"""Classifiers as ONNX files, checked against torch before they are called done."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vision.backbones.backbone import Backbone
from vision.backbones.checkpoint import load_backbone

OPSET = 18
NEEDED = ("onnx", "onnxscript", "onnxruntime")
CHECKED_BATCHES = (1, 3)
TOLERANCE = 1e-4


class ExportError(RuntimeError):
    """The export cannot be made, or its answers are not torch's."""


@dataclass(frozen=True)
class ExportReport:
    """``max_difference`` is the largest deviation of a logit from torch's, relative to the largest logit."""

    file: str
    opset: int
    image_size: int
    max_difference: float
    bytes: int


class NormalizedClassifier(nn.Module):
    """A backbone that takes plain RGB images in [0, 1]: the normalisation travels inside the exported file."""

    def __init__(self, model: Backbone) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> logits [B, classes]."""
        logits: Tensor = self.model(self.model.normalization(images))
        return logits


def export_classifier(checkpoint: Path, output: Path, *, image_size: int | None = None) -> ExportReport:
    """Write the backbone saved in ``checkpoint`` as the ONNX file ``output``, and check it with ONNX Runtime.

    Input ``images`` is float [B, 3, ``image_size``, ``image_size``], RGB in [0, 1], for any B; output ``logits`` is
    [B, classes]. Class names and preprocessing are in the file's metadata. ``image_size`` None takes the checkpoint's.
    Errors: CheckpointError; ExportError where a package is missing or the file's answers differ from torch's by more
    than 1e-4 of the largest logit (it is then removed, and an older file left as it was).
    """
    require_packages()
    backbone = load_backbone(checkpoint)
    side = image_size or backbone.preprocessing.image_size
    model = NormalizedClassifier(backbone).eval()
    with unchecked(output) as file:
        write(model, file, side)
        difference = compare(model, file, side)
        if not difference <= TOLERANCE:
            raise ExportError(
                f"{output} answered {difference:.2e} apart from torch (allowed {TOLERANCE:.0e}); it was removed"
            )
    return ExportReport(str(output), OPSET, side, difference, output.stat().st_size)


@contextmanager
def unchecked(output: Path) -> Iterator[Path]:
    """A file to write and to check in the place of ``output``, whose name it takes at the end of the block.

    A server may read an older ``output`` meanwhile; where the block fails that stays, and the new file goes.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    file = output.with_name(f".{output.name}.unchecked")
    try:
        yield file
        file.replace(output)
    finally:
        file.unlink(missing_ok=True)


def require_packages() -> None:
    """Errors: ExportError naming what must be installed."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ExportError(f"export needs {', '.join(missing)}: pip install 'dovetail-server[vision]'")


def write(model: NormalizedClassifier, output: Path, side: int) -> None:
    """Trace ``model`` with a free batch size and save one file that holds the weights."""
    example = torch.rand(2, 3, side, side)
    program = torch.onnx.export(
        model, (example,), dynamo=True, opset_version=OPSET, verbose=False,
        input_names=["images"], output_names=["logits"], dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
    )  # fmt: skip
    if program is None:
        raise ExportError("torch returned no ONNX program")
    backbone = model.model
    program.model.metadata_props["class_names"] = json.dumps(backbone.class_names)
    program.model.metadata_props["backbone"] = backbone.name
    program.model.metadata_props["resize"] = str(backbone.preprocessing.resize)
    forget_traces(program)
    program.save(output, external_data=False)


def forget_traces(program: torch.onnx.ONNXProgram) -> None:
    """Take off what torch notes at every node, its line of source among it: a file given away holds no paths."""
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()


def compare(model: NormalizedClassifier, file: Path, side: int) -> float:
    """Largest difference of ONNX Runtime's logits from torch's over random images, relative to the largest logit."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch in CHECKED_BATCHES:
        images = torch.rand(batch, 3, side, side, generator=generator)
        with torch.no_grad():
            expected = model(images).numpy()
        (answer,) = session.run(["logits"], {"images": images.numpy()})
        worst = max(worst, float(np.abs(answer - expected).max() / max(np.abs(expected).max(), 1e-6)))
    return worst
