"""A saved model of any kind as one ONNX file, whose answers are compared with torch's before it takes its name."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from vision.serving.folder import CONFIG_FILE, ONNX_FILE, WEIGHTS_FILE, file_digest, read_config, replacing
from vision.serving.load import DIGEST_KEY
from vision.serving.networks import open_session
from vision.serving.protocol import ExportError, Outputs, Parity, Traced
from vision.serving.quantize import FIRST_INT8_LAYERS, quantize
from vision.serving.registry import kind_of

logger = logging.getLogger(__name__)

OPSET = 18
NEEDED = ("onnx", "onnxscript", "onnxruntime")
CHECKED_BATCHES = (1, 3)


def export_model(
    folder: Path, output: Path | None = None, *, image_size: int | None = None, calibration: Tensor | None = None
) -> dict[str, Any]:
    """Write the model saved in ``folder`` as the ONNX file ``output``, check it with ONNX Runtime, and report.

    ``output`` None writes it beside the weights, where the server looks for it. Its input ``images`` is float
    [B, 3, S, S], RGB in [0, 1], for any B; config.json and a digest of the weights are in its metadata. With rows of
    ``calibration`` uint8 [N, 3, S, S] weights and activations have 8 bits, from the earliest convolution with which the
    answers hold; every other row is kept apart to check that. Errors: ModelError; ExportError where a package is
    missing, the model has no such export, or the file's answers are not torch's: an older file stays as it was.
    """
    require_packages()
    kind = kind_of(read_config(folder / CONFIG_FILE), str(folder))
    traced = kind.trace(folder, image_size)
    if traced.sees_nothing:
        logger.warning("%s", traced.sees_nothing)
    output = output or folder / ONNX_FILE
    metadata = {**traced.metadata, kind.name: json.dumps(traced.config), DIGEST_KEY: file_digest(folder / WEIGHTS_FILE)}
    with replacing(output) as file, TemporaryDirectory() as scratch:
        plain = file if calibration is None else Path(scratch) / "plain.onnx"
        write(traced, plain, metadata)
        if calibration is None:
            parity = traced.compare(answers(traced, plain, [traced.images(count) for count in CHECKED_BATCHES]))
        else:
            parity = write_int8(traced, plain, file, calibration, metadata)
        if parity.fault:
            raise ExportError(f"{output} {parity.fault}; it was removed")
    head = {"file": str(output), "opset": OPSET, "image_size": traced.image_size}
    return head | dict(parity.figures) | {"bytes": output.stat().st_size}


def write_int8(traced: Traced, plain: Path, file: Path, calibration: Tensor, metadata: dict[str, str]) -> Parity:
    """The file with the most 8-bit layers whose answers hold, else the last one tried, with what is wrong with it."""
    if traced.compare_int8 is None:
        raise ExportError("only face-quality models have an export in 8 bits")
    images = [part.float() / 255 for part in torch.split(calibration[1::2], CHECKED_BATCHES[-1])]
    for layer in FIRST_INT8_LAYERS:
        quantize(plain, file, calibration[::2], layer, metadata)
        parity = traced.compare_int8(answers(traced, file, images))
        if not parity.fault:
            break
    return Parity({**parity.figures, "first_int8_layer": layer}, parity.fault)


def require_packages() -> None:
    """Errors: ExportError naming what must be installed."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ExportError(f"export needs {', '.join(missing)}: pip install 'dovetail-server[vision]'")


def write(traced: Traced, output: Path, metadata: dict[str, str]) -> None:
    """Trace with a free batch size and save one file that holds the weights."""
    program = trace_module(traced.module.eval(), traced.image_size, traced.outputs)
    program.model.metadata_props.update(metadata)
    # What torch notes at every node, its line of source among it: a file given away holds no paths.
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    program.save(output, external_data=False)


def trace_module(module: nn.Module, side: int, outputs: Sequence[str]) -> Any:
    """An ONNX program of ``module`` over images [B, 3, side, side]. Errors: ExportError."""
    program = torch.onnx.export(
        module, (torch.rand(2, 3, side, side),), dynamo=True, opset_version=OPSET, verbose=False,
        input_names=["images"], output_names=list(outputs), dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
    )  # fmt: skip
    if program is None:
        raise ExportError("torch returned no ONNX program")
    return program


@torch.no_grad()
def answers(traced: Traced, file: Path, batches: Sequence[Tensor]) -> list[tuple[Outputs, Outputs]]:
    """Torch's and the file's outputs for every batch of images in [0, 1]."""
    session = open_session(file, torch.get_num_threads())

    def in_torch(images: Tensor) -> Outputs:
        if traced.expected is not None:
            return traced.expected(images)
        found = traced.module(images)
        return [output.numpy() for output in (found if isinstance(found, tuple) else (found,))]

    return [(in_torch(images), session.run(None, {"images": images.numpy()})) for images in batches]
