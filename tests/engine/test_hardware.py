"""The table of devices, and the memory of this host."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gpc_dist.engine import hardware
from gpc_dist.engine.hardware import DEVICES, GIB, available_bytes, device_at_hand, device_named, find_device
from gpc_dist.errors import UserError


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
        ("a GPU of next year", 170.0, "b200"),
    ],
)
def test_products_are_recognised(product: str, memory_gib: float, name: str) -> None:
    assert device_named(product, memory_gib).name == name


def free_on_the_host(monkeypatch: pytest.MonkeyPatch, groups: Path, available: int) -> None:
    """Let this be a machine with so many free bytes, whose control groups stand in this folder."""
    monkeypatch.setattr(hardware.psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    monkeypatch.setattr(hardware, "CGROUPS", groups)


def test_the_cpu_at_hand_has_the_hosts_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free_on_the_host(monkeypatch, tmp_path, 3 * GIB)
    device = device_at_hand(torch.device("cpu"))
    assert device.is_cpu
    assert device.memory_gib == 3


@pytest.mark.gpu
def test_the_gpu_at_hand_has_its_own_free_memory() -> None:
    device = device_at_hand(torch.device("cuda", 0))
    assert device.name in DEVICES
    assert 0 < device.memory_gib <= torch.cuda.get_device_properties(0).total_memory / GIB


def test_a_control_group_limits_what_is_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 100\n")
    free_on_the_host(monkeypatch, tmp_path, 5000)
    assert available_bytes() == 400
    (tmp_path / "memory.max").write_text("9000\n")
    assert available_bytes() == 5000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes() == 5000
