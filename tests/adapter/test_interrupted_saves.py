"""A save that fails or is killed leaves the adapter that was there before."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpc_dist.adapter import GraftedEncoder, store

from .grafts import assert_loads, grafted, options, trained


def write_half(path: Path, _: Any) -> None:
    path.write_bytes(bytes(100))


def fail(*_: Any, **__: Any) -> None:
    raise OSError("no space left on device")


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_then(end: Callable[..., None]) -> Callable[..., None]:
    def save(path: Path, weights: Any) -> None:
        write_half(path, weights)
        end()

    return save


def saved_then_changed(folder: Path) -> tuple[GraftedEncoder, dict[str, torch.Tensor]]:
    """A graft whose adapter was saved and has been trained on since; and the saved tensors."""
    graft = grafted("bert", options("gated"))
    graft.save_pretrained(folder)
    saved = {name: tensor.detach().clone() for name, tensor in trained(graft).items()}
    with torch.no_grad():
        for parameter in trained(graft).values():
            parameter.add_(1)
    return graft, saved


def test_a_save_that_fails_leaves_the_previous_adapter_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graft, saved = saved_then_changed(tmp_path / "adapter")
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_stream", half_then(fail))
        with pytest.raises(OSError, match="no space left"):
            graft.save_pretrained(tmp_path / "adapter")
    assert_loads(tmp_path / "adapter", saved)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    graft.save_pretrained(tmp_path / "adapter")
    assert_loads(tmp_path / "adapter", trained(graft))


@pytest.mark.parametrize("moment", ["weights", "card", "rename"])
def test_a_save_that_is_killed_leaves_the_previous_adapter(tmp_path: Path, moment: str) -> None:
    graft, saved = saved_then_changed(tmp_path / "adapter")
    child = os.fork()
    if child == 0:
        if moment == "weights":
            store.write_stream = half_then(die)
        elif moment == "card":
            store.json.dumps = die
        else:
            Path.rename = die  # type: ignore[method-assign, assignment]
        try:
            graft.save_pretrained(tmp_path / "adapter")
        finally:
            os._exit(1)  # it should not have come so far
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert_loads(tmp_path / "adapter", saved)
    graft.save_pretrained(tmp_path / "adapter")
    assert_loads(tmp_path / "adapter", trained(graft))
