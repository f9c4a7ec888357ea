"""What happens in a process as a fault: a function `_on_<kind>` for each kind that is no signal."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.faults.inject import Fault, Watch

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGUSR2")


def happen(watch: Watch, fault: Fault) -> None:
    """Let a fault happen in this process."""
    if fault.kind in SIGNALS:
        for pid in watch.pids(fault.target):
            os.kill(pid, signal.Signals[fault.kind])
    else:
        globals()[f"_on_{fault.kind}"](watch, fault)


def _on_pause(watch: Watch, fault: Fault) -> None:
    """Stand still for a while."""
    pids = watch.pids(fault.target)
    _later(fault.detail, "CONT", pids)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)


def _later(after_ms: int, name: str, pids: Sequence[int]) -> None:
    """Send a signal from a process of its own: this one may stand still then, or be gone."""
    words = ["sh", "-c", f"sleep {after_ms / 1000}; kill -{name} {' '.join(map(str, pids))}"]
    subprocess.Popen(words, start_new_session=True, stderr=subprocess.DEVNULL)


def _on_exporter_kill(watch: Watch, fault: Fault) -> None:
    """The exporter is killed after some time."""
    assert watch.exporter is not None
    _later(fault.detail, "KILL", [watch.exporter])


def _on_exporter_end(watch: Watch, fault: Fault) -> None:
    """The exporter is asked to end after some time, as a batch system asks all processes of a job."""
    assert watch.exporter is not None
    _later(fault.detail, "TERM", [watch.exporter])


def _on_exporter_pause(watch: Watch, fault: Fault) -> None:
    """The exporter stands still for some seconds, after some time."""
    assert watch.exporter is not None
    _later(fault.detail, "STOP", [watch.exporter])
    _later(fault.detail + 4000, "CONT", [watch.exporter])


def _on_stop(watch: Watch, _: Fault) -> None:
    """Stand still for ever."""
    os.kill(os.getpid(), signal.SIGSTOP)


def _on_raise(*_: Any) -> None:
    raise ValueError("injected")


def _on_memory(*_: Any) -> None:
    """As torch says it of a CPU."""
    import torch

    torch.empty(2**60, dtype=torch.uint8)


def _on_nan(*_: Any) -> None:
    """From now on every loss of this rank."""
    from gpc_dist.training import trainer

    backward = trainer.backward
    trainer.backward = lambda *arguments: backward(*arguments) * float("nan")


def _on_gradient(_: Watch, fault: Fault) -> None:
    """A bit of the next step's gradients."""
    from gpc_dist.training import trainer

    backward = trainer.backward

    def backward_and_flip(session: Any, optimizers: Any, step: Any) -> Any:
        losses = backward(session, optimizers, step)
        trainer.backward = backward
        _flip(next(p.grad for p in step.lanes[0].adapter.parameters() if p.grad is not None), fault.detail)
        return losses

    trainer.backward = backward_and_flip


def _on_weight(watch: Watch, fault: Fault) -> None:
    """A bit of the frozen encoder, in this rank's memory."""
    parameters = list(watch.run.session.model.encoder.parameters())
    parameter = parameters[fault.detail % len(parameters)]
    _flip(getattr(parameter, "ds_tensor", parameter), fault.detail)


def _on_adapter(watch: Watch, fault: Fault) -> None:
    """A bit of the trained parameters, in this rank's memory."""
    parameters = list(watch.run.adapter.parameters())
    _flip(parameters[fault.detail % len(parameters)], fault.detail)


def _flip(tensor: Any, bit: int) -> None:
    import torch

    octets = tensor.detach().view(-1).view(torch.uint8)
    octets[bit // 8 % len(octets)] ^= 1 << bit % 8


def _on_error(_: Watch, fault: Fault) -> None:
    """A call of the system fails."""
    raise OSError(fault.detail, os.strerror(fault.detail))


def _on_quota(_: Watch, fault: Fault) -> None:
    """From now on no file of this rank may have more bytes."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (fault.detail, hard))


def _on_deleted(watch: Watch, _: Fault) -> None:
    shutil.rmtree(watch.place.run)


def _on_moved(watch: Watch, _: Fault) -> None:
    watch.place.run.rename(watch.place.moved)


def _on_clock(_: Watch, fault: Fault) -> None:
    """The clock of this rank jumps, back or forth."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + fault.detail
    time.time_ns = lambda: now_ns() + fault.detail * 10**9


def _on_power(watch: Watch, _: Fault) -> None:
    """The machine loses its power, and what its disk has not promised to keep."""
    me = os.getpid()
    for pid in [*watch.pids("launcher"), *(pid for pid in watch.pids("ranks") if pid != me)]:
        if pid != me:
            os.kill(pid, signal.SIGKILL)
    watch.disk.cut()
    os.kill(me, signal.SIGKILL)


def _on_full(watch: Watch, fault: Fault) -> None:
    """Nobody may write more than these bytes: a file of somebody else has the rest of the disk."""
    room = os.statvfs(watch.place.disk)
    left = room.f_bavail * room.f_frsize - fault.detail
    with watch.place.filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, left))


def _on_readonly(watch: Watch, _: Fault) -> None:
    """The disk is mounted again, without the right to write: only files that are open may be written on."""
    disk = str(watch.place.disk)
    subprocess.run(["mount", "--bind", disk, disk], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", disk], check=True)


def _on_hold(watch: Watch, _: Fault) -> None:
    """Stand still until the campaign has tried something."""
    while not watch.place.released.exists():
        time.sleep(0.01)
