"""The table of devices, and the one at hand."""

from __future__ import annotations

import pytest
import torch

from gpc_dist.errors import UserError
from gpc_dist.planner import devices
from gpc_dist.planner.devices import DEVICES, GIB, device_at_hand, device_named, find_device


def test_a_device_is_found_by_name_and_given_other_memory() -> None:
    assert find_device("H100").peak_tflops == 989.0
    assert find_device("a100-40", 36).memory_gib == 36


def test_an_unknown_device_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'tpu'.*h100.*a100-40.*cpu"):
        find_device("tpu")
    with pytest.raises(UserError, match="--gpu-memory-gib 0"):
        find_device("h100", 0)


@pytest.mark.parametrize(
    ("product", "memory_gib", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100-80"),
        ("NVIDIA L40S", 44.5, "l40s"),
        ("NVIDIA L4", 22.0, "l4"),
        ("NVIDIA A10", 22.0, "a10"),
        ("NVIDIA RTX A4000", 15.6, "a4000"),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 19.5, "a100-40"),
        ("a GPU of next year", 170.0, "b200"),
    ],
)
def test_products_are_recognised(product: str, memory_gib: float, name: str) -> None:
    assert device_named(product, memory_gib).name == name


def test_the_cpu_at_hand_has_the_hosts_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "available_bytes", lambda: 3 * GIB)
    device = device_at_hand(torch.device("cpu"))
    assert device.is_cpu
    assert device.memory_gib == 3


@pytest.mark.gpu
def test_the_gpu_at_hand_has_its_own_free_memory() -> None:
    device = device_at_hand(torch.device("cuda", 0))
    assert device.name in DEVICES
    assert 0 < device.memory_gib <= torch.cuda.get_device_properties(0).total_memory / GIB
