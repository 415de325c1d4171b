"""Networks on ONNX Runtime, and in torch where nothing was exported."""

from __future__ import annotations

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


def open_session(file: Path, num_threads: int) -> Any:
    """An ONNX Runtime session on the CPU. Errors: ModelError."""
    if find_spec("onnxruntime") is None:
        raise ModelError(f"{file} needs onnxruntime: pip install 'dovetail-server[vision]'")
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, InvalidProtobuf

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except (Fail, InvalidArgument, InvalidGraph, InvalidProtobuf) as error:
        raise ModelError(f"{file} is no ONNX model this runtime takes: {error}") from error
