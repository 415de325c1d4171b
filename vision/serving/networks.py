"""Networks on ONNX Runtime, and in torch where nothing was exported."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vision.serving.folder import ModelError
from vision.serving.protocol import Outputs, Pixels

if TYPE_CHECKING:
    from torch import nn


class OnnxNetwork:
    """An exported network: one input, float32 in [0, 1]."""

    runtime = "onnxruntime"

    def __init__(self, session: Any) -> None:
        self.session = session
        self.input = session.get_inputs()[0].name

    def run(self, rows: Pixels) -> Outputs:
        """See ``Network``."""
        outputs: Outputs = self.session.run(None, {self.input: rows.astype(np.float32) / 255})
        return outputs


class SingleNetwork:
    """Another's export, asked for one image at a time: (value - ``mean``) / ``std`` of 0 to 255, RGB or ``bgr``.

    Answers are the named ``outputs``, an image's own axis before the others where the file leaves it out.
    """

    runtime = "onnxruntime"

    def __init__(
        self, session: Any, outputs: Sequence[str], bgr: bool = False, mean: float = 0.0, std: float = 1.0
    ) -> None:
        self.session, self.outputs = session, list(outputs)
        self.input = session.get_inputs()[0].name
        self.bgr, self.mean, self.std = bgr, mean, std

    def run(self, rows: Pixels) -> Outputs:
        """See ``Network``."""
        values = ((rows[:, ::-1] if self.bgr else rows).astype(np.float32) - self.mean) / self.std
        found = [self.session.run(self.outputs, {self.input: row[None]}) for row in values]
        return [
            np.stack([part.reshape(part.shape[-2:]) if part.ndim < 4 else part[0] for part in parts])
            for parts in zip(*found, strict=True)
        ]


def with_free_size(file: Path, num_threads: int) -> Any:
    """A session of a file whose input has one size, which it frees. Errors: ModelError."""
    if find_spec("onnx") is None:
        raise ModelError(f"{file} needs onnx, which frees the size of its input: pip install 'dovetail-server[vision]'")
    import onnx

    model = onnx.load(file)
    weights = {entry.name for entry in model.graph.initializer}  # old files list them among the inputs
    for value in (*model.graph.input, *model.graph.output):
        for axis in (0, 2, 3) if value.name not in weights else ():
            value.type.tensor_type.shape.dim[axis].dim_param = f"{value.name}_{axis}"
    del model.graph.value_info[:]
    return open_session(model.SerializeToString(), num_threads)


class TorchNetwork:
    """A module that maps images in [0, 1] to a tensor or a tuple of them."""

    runtime = "torch"

    def __init__(self, module: nn.Module, num_threads: int) -> None:
        import torch

        torch.set_num_threads(num_threads)
        self.module = module.eval()

    def run(self, rows: Pixels) -> Outputs:
        """See ``Network``."""
        import torch

        with torch.inference_mode():
            outputs = self.module(torch.from_numpy(rows).float() / 255)
        return [output.numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]


def open_session(file: Path | bytes, num_threads: int) -> Any:
    """An ONNX Runtime session on the CPU, of a file or of its bytes. Errors: ModelError."""
    named = "the model" if isinstance(file, bytes) else str(file)
    if find_spec("onnxruntime") is None:
        raise ModelError(f"{named} needs onnxruntime: pip install 'dovetail-server[vision]'")
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, InvalidProtobuf

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # old exports warn once a tensor; errors are raised
    try:
        source = file if isinstance(file, bytes) else str(file)
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except (Fail, InvalidArgument, InvalidGraph, InvalidProtobuf) as error:
        raise ModelError(f"{named} is no ONNX model this runtime takes: {error}") from error
