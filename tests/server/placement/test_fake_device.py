"""The fake second device is as strict as a real one, and counts."""

import gc

import pytest
import torch
from torch.nn import functional

from fake_device import DeviceLost, fake_device

DEVICE = torch.device("fake", 0)


@torch.inference_mode()
def test_it_computes_what_the_cpu_computes_and_counts_what_crosses() -> None:
    with fake_device() as device:
        here = torch.arange(12.0).view(3, 4)
        there = here.to(DEVICE, torch.float16)
        assert (there.device.type, device.up_bytes, device.down_bytes) == ("fake", 24, 0), "converted before it goes"
        heads = there.float()[None, None]
        attended = functional.scaled_dot_product_attention(heads, heads, heads).cpu()
        heads = here[None, None]
        assert torch.allclose(attended, functional.scaled_dot_product_attention(heads, heads, heads))
        assert device.down_bytes == 48
        assert (there @ there.T).argmax(dim=-1).tolist() == [2, 2, 2] and device.down_bytes == 48 + 24
        there[:, 1:2].copy_(torch.full((3, 1), 7.0))
        assert there.cpu()[:, 1].tolist() == [7.0] * 3 and device.up_bytes == 24 + 6
        assert torch.tensor([[1, 2]], device=DEVICE).device.type == "fake" and device.up_bytes == 30 + 16
        assert torch.nn.Linear(4, 5).to(DEVICE)(there.float()).device.type == "fake"


def test_devices_do_not_mix() -> None:
    with fake_device(), pytest.raises(RuntimeError, match="same device"):
        torch.zeros(3, device=DEVICE) + torch.ones(3)


def test_its_memory_ends_and_is_given_back() -> None:
    with fake_device(limit=100) as device:
        first = torch.zeros(20, device=DEVICE)
        with pytest.raises(torch.OutOfMemoryError, match="80 bytes of 100 used"):
            torch.zeros(10, device=DEVICE)
        view = first[:5]
        assert device.used == 80
        del first, view
        gc.collect()
        assert device.used == 0 and device.peak == 80


def test_it_dies_where_it_is_told_to() -> None:
    with fake_device() as device:
        there = torch.zeros(3, device=DEVICE)
        device.dies_at = device.operations + 2
        there = there + 1
        for _ in range(2):
            with pytest.raises(DeviceLost):
                there + 1


def test_a_slow_bus_is_counted_not_waited_for() -> None:
    with fake_device(gb_per_s=1e-3, latency_s=0.5) as device:
        torch.zeros(1000, device=DEVICE).cpu()
        assert device.bus_s == pytest.approx(0.5 + 4000 / 1e6)
