"""A scorer as ONNX, in fp32 and with 8-bit weights and activations, each checked against torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vision.assess import FACE_QUALITY
from vision.backbones.checkpoint import WEIGHTS_FILE
from vision.data.classification import to_tensor
from vision.data.faces import DegradedFaces
from vision.data.sources import InMemorySource, open_source
from vision.export import OPSET, ExportError, forget_traces, require_packages, unchecked
from vision.face_quality.alignment import FACE_SIZE
from vision.face_quality.checkpoint import load_scorer
from vision.face_quality.evaluate import spearman
from vision.face_quality.recognition import file_digest
from vision.face_quality.tinyfqnet import TinyFQNet, normalize_faces
from vision.predict import ONNX_FILE

TOLERANCE, INT8_TOLERANCE, INT8_SPEARMAN = 1e-4, 0.02, 0.995
CHECKED_BATCHES = (1, 3)
CALIBRATION_COPIES = 6
MAX_CALIBRATION = 512
# Early maps carry the fine differences, so 8 bits begin where the promise allows, and never after half of the layers.
FIRST_INT8_LAYERS = (0, 2, 4, 6, 8)
POOL_AND_HEAD = ("ReduceMean", "Gemm", "Squeeze", "Sigmoid")


@dataclass(frozen=True)
class ScorerExportReport:
    """``max_difference`` and ``mean_difference`` from torch's scores; ``spearman`` with them, None for random faces.

    Of an 8-bit file ``first_int8_layer`` is the convolution from which on weights and activations have 8 bits.
    """

    file: str
    opset: int
    precision: str
    first_int8_layer: int | None
    max_difference: float
    mean_difference: float
    spearman: float | None
    faces: int
    bytes: int


@dataclass(frozen=True)
class Calibration:
    """Faces that tell an 8-bit export its ranges; half of them, kept apart, check it."""

    kind: str
    root: Path
    split: str

    def faces(self) -> Tensor:
        """Photographs with defects, uint8 [N, 3, 112, 112]."""
        source = DegradedFaces(InMemorySource(open_source(self.kind, self.root, self.split)), CALIBRATION_COPIES)
        rows = np.linspace(0, len(source.labels), min(len(source.labels), MAX_CALIBRATION), endpoint=False)
        return torch.stack([to_tensor(source.read(int(row))) for row in rows])


class NormalizedScorer(nn.Module):
    """A scorer that takes plain RGB faces in [0, 1]."""

    def __init__(self, model: TinyFQNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, 112, 112] in [0, 1] -> scores [B]."""
        scores: Tensor = self.model(normalize_faces(images))
        return scores


def export_scorer(
    checkpoint: Path, output: Path | None = None, calibration: Calibration | None = None
) -> ScorerExportReport:
    """Write the scorer saved in ``checkpoint`` as the ONNX file ``output``, and check it with ONNX Runtime.

    ``output`` None writes it beside the weights, where the server looks for it. With ``calibration`` weights and
    activations have 8 bits, from the earliest convolution with which the scores hold. Input ``images`` float
    [B, 3, 112, 112], RGB in [0, 1]; output ``scores`` [B]. Errors: CheckpointError, DataError; ExportError where a
    package is missing or scores are further from torch's than 1e-4 (8 bits: 0.02, or ranks below a correlation of
    0.995); an older file is then left as it was.
    """
    require_packages()
    model, config = load_scorer(checkpoint)
    scorer = NormalizedScorer(model).eval()
    output = output or checkpoint / ONNX_FILE
    metadata = {
        FACE_QUALITY: json.dumps(dataclasses.asdict(config)),
        "weights_sha256": file_digest(checkpoint / WEIGHTS_FILE),
    }
    if calibration is None:
        generator = torch.Generator().manual_seed(0)
        faces = torch.randint(256, (sum(CHECKED_BATCHES), 3, FACE_SIZE, FACE_SIZE), generator=generator).byte()
        with unchecked(output) as file:
            write(scorer, file, metadata)
            report = checked(scorer, file, faces, "fp32")
        return dataclasses.replace(report, file=str(output))
    faces = calibration.faces()
    with TemporaryDirectory() as folder, unchecked(output) as file:
        plain = Path(folder) / "plain.onnx"
        write(scorer, plain, metadata)
        report = export_int8(scorer, plain, file, faces, metadata)
    return dataclasses.replace(report, file=str(output))


def export_int8(
    scorer: NormalizedScorer, plain: Path, output: Path, faces: Tensor, metadata: dict[str, str]
) -> ScorerExportReport:
    """The export with the most 8-bit layers whose scores hold. Errors: ExportError where none does."""
    for layer in FIRST_INT8_LAYERS:
        quantize(plain, output, faces[::2], layer)
        restore_metadata(output, metadata)
        try:
            return checked(scorer, output, faces[1::2], "int8", layer)
        except ExportError as error:
            failure = error
    raise failure


def write(scorer: NormalizedScorer, output: Path, metadata: dict[str, str]) -> None:
    """Trace with a free batch size and save one file that holds the weights."""
    program = torch.onnx.export(
        scorer, (torch.rand(2, 3, FACE_SIZE, FACE_SIZE),), dynamo=True, opset_version=OPSET, verbose=False,
        input_names=["images"], output_names=["scores"], dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
    )  # fmt: skip
    if program is None:
        raise ExportError("torch returned no ONNX program")
    program.model.metadata_props.update(metadata)
    forget_traces(program)
    program.save(output, external_data=False)


def quantize(plain: Path, output: Path, faces: Tensor, first_layer: int) -> None:
    """ONNX Runtime's static quantisation from the convolution ``first_layer`` to the last, weights by channel."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[Tensor] = iter(torch.split(faces, 32))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": (batch.float() / 255).numpy()}

    prepared = plain.with_name("prepared.onnx")
    quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
    nodes = onnx.load(prepared).graph.node
    kept = [node.name for node in nodes if node.op_type == "Conv"][:first_layer]
    kept += [node.name for node in nodes if node.op_type in POOL_AND_HEAD]
    quantize_static(
        str(prepared), str(output), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8, nodes_to_exclude=kept,
    )  # fmt: skip


def restore_metadata(file: Path, metadata: dict[str, str]) -> None:
    """Quantisation drops what the file says of itself."""
    import onnx

    model = onnx.load(file)
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, file)


def checked(
    scorer: NormalizedScorer, file: Path, faces: Tensor, precision: str, first_int8_layer: int | None = None
) -> ScorerExportReport:
    """The file's scores against torch's. Errors: ExportError."""
    expected, found = torch_scores(scorer, faces), onnx_scores(file, faces)
    differences = np.abs(expected - found)
    correlation = spearman(expected, found) if precision == "int8" else None
    largest = float(differences.max())
    tolerance = TOLERANCE if precision == "fp32" else INT8_TOLERANCE
    if not largest <= tolerance or (correlation is not None and correlation < INT8_SPEARMAN):
        ranks = "" if correlation is None else f", rank correlation {correlation:.4f} (allowed {INT8_SPEARMAN})"
        raise ExportError(
            f"the export answered {largest:.2g} apart from torch (allowed {tolerance:g}){ranks}; it was removed"
        )
    return ScorerExportReport(
        str(file), OPSET, precision, first_int8_layer, largest, float(differences.mean()), correlation, len(faces),
        file.stat().st_size,
    )  # fmt: skip


@torch.no_grad()
def torch_scores(scorer: NormalizedScorer, faces: Tensor) -> NDArray[np.float64]:
    """Scores [N] in torch."""
    return np.asarray(torch.cat([scorer(part.float() / 255) for part in torch.split(faces, 64)]).double().numpy())


def onnx_scores(file: Path, faces: Tensor) -> NDArray[np.float64]:
    """Scores [N] of the file, in batches of one and of three."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    parts = [faces[: CHECKED_BATCHES[0]], *torch.split(faces[CHECKED_BATCHES[0] :], CHECKED_BATCHES[1])]
    answers = [session.run(["scores"], {"images": (part.float() / 255).numpy()})[0] for part in parts]
    return np.concatenate(answers).astype(np.float64)
