"""Memory of this process and this host."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gpc_dist.config import EngineConfig
from gpc_dist.distributed import memory
from gpc_dist.distributed.memory import available_bytes, out_of_memory, peak_memory_mib

CPU = torch.device("cpu")


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_peak_memory_rises_with_what_is_held_and_never_falls() -> None:
    before = peak_memory_mib(CPU)
    held = torch.ones(int((before - resident_mib() + 128) * 2**18))
    risen = peak_memory_mib(CPU)
    assert risen == pytest.approx(before + 128, abs=32)
    del held
    assert peak_memory_mib(CPU) >= risen


def free_on_the_host(monkeypatch: pytest.MonkeyPatch, groups: Path, available: int) -> None:
    """Let this be a machine with so many free bytes, whose control groups stand in this folder."""
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    monkeypatch.setattr(memory, "CGROUPS", groups)


def test_a_tensor_that_finds_no_memory_is_told_in_one_line() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    for error in (caught.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory.\nMore.")):
        told = out_of_memory(error, EngineConfig())
        assert told is not None
        assert "\n" not in str(told)
        assert "engine.micro_batch_tokens" in str(told)
        assert "engine.zero_stage 3" in str(told)
    assert out_of_memory(RuntimeError("shapes do not match"), EngineConfig()) is None


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
