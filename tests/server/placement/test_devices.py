"""A device that fails is told from a program that is wrong, and a card that cannot be measured is left out."""

import pytest
import torch
from torch.nn import functional

from server.placement import machine
from server.placement.devices import is_device_failure
from server.placement.what_if import GPU_TFLOPS, this_machine


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA driver error: unknown error"),
        RuntimeError("CUDA driver initialization failed, you might not have a CUDA gpu."),
        RuntimeError("Unexpected error from cudaGetDeviceCount(). Error 804: CUDA unknown error - this may be due to"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
        RuntimeError("Found no NVIDIA driver on your system."),
        RuntimeError("No CUDA GPUs are available"),
        RuntimeError("HIP error: out of memory"),
    ],
)
def test_a_device_that_fails_is_known_by_its_error(error: Exception) -> None:
    assert is_device_failure(error)


def test_a_mistake_in_a_program_is_no_failure_of_a_device() -> None:
    with pytest.raises(RuntimeError) as shapes:
        functional.linear(torch.ones(2, 3), torch.ones(4, 5))
    mixed = RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
    )
    for error in (
        shapes.value,
        mixed,
        RuntimeError("shape '[2, 3]' is invalid for input of size 5"),
        ValueError("CUDA"),
    ):
        assert not is_device_failure(error)


def test_a_card_that_is_full_is_left_out_and_said_and_the_others_keep_their_numbers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def measure(device: torch.device) -> machine.Gpu:
        if device.index == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return machine.Gpu("card", 8 * 2**30, 7 * 2**30, 200.0, 33.0, 12.0, 11.0, 9.0, 8.0, device.index)

    monkeypatch.setattr(machine, "cpu_limits", lambda: (20.0, 300.0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(machine, "measure_gpu", measure)
    found = machine.measure_machine()
    assert "cuda:0 cannot be measured: OutOfMemoryError" in caplog.text and [gpu.index for gpu in found.gpus] == [1]
    assert this_machine(found, 1).gpu_tflops == 33.0
    assert this_machine(found, 0).gpu_tflops == GPU_TFLOPS and this_machine(found, 0).vram is None
