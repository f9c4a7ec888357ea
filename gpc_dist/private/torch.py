"""Private parts of PyTorch: those of the planner's dry run, the hooks of a module, and the timeout of groups."""

from __future__ import annotations

import copy
from collections import OrderedDict
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

from gpc_dist.private import checked, require

with checked("torch"):
    from torch import UntypedStorage, device, nn, ops
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.distributed import distributed_c10d
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    require(UntypedStorage, "_cdata")
    if "fake_device" not in FakeTensor.__annotations__:  # in older versions instances alone have it
        require(FakeTensor, "fake_device")
    DEVICE_OF = ops.prim.device.default
    require(FlopCounterMode(display=False), "mod_tracker")
    _TIMEOUTS = ("default_pg_timeout", "default_pg_nccl_timeout")
    require(distributed_c10d, "_get_default_timeout", *_TIMEOUTS)
    CPU_ATTENTION = ops.aten._scaled_dot_product_flash_attention_for_cpu
    CPU_ATTENTION_BACKWARD = ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

__all__ = [
    "CPU_ATTENTION",
    "CPU_ATTENTION_BACKWARD",
    "DEVICE_OF",
    "FakeTensorMode",
    "TorchDispatchMode",
    "copy_without_hooks",
    "device_of",
    "flop_counter_without_modules",
    "sdpa_flop_count",
    "set_group_timeout",
    "storage_key",
    "tree_leaves",
    "with_own_children",
]


def set_group_timeout(timeout: timedelta) -> None:
    """Set the timeout of process groups that are made without one from now on, as DeepSpeed makes its own: their ranks
    would wait for one that is lost for half an hour."""
    for name in _TIMEOUTS:
        setattr(distributed_c10d, name, timeout)


def storage_key(storage: UntypedStorage) -> int:
    """The same for all Python objects that stand for a storage, as long as it lives."""
    return storage._cdata


def device_of(tensor: FakeTensor) -> device:
    """What `DEVICE_OF` answers, as which PyTorch asks a fake tensor for its device again and again."""
    return tensor.fake_device


def with_own_children(module: nn.Module) -> nn.Module:
    """A module with the same weights, submodules and hooks, which can be given other submodules."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def copy_without_hooks(module: nn.Module) -> nn.Module:
    """A module with the same weights and submodules, and with forward hooks of its own: none yet."""
    twin = copy.copy(module)
    twin._forward_hooks = OrderedDict()
    twin._forward_pre_hooks = OrderedDict()
    return twin


def flop_counter_without_modules(formulas: dict[Any, Any]) -> FlopCounterMode:
    """A `FlopCounterMode` that does not attribute FLOPs to modules: its hooks on modules keep what activation
    checkpointing recomputes, and the peak of a dry run would double.

    Args:
        formulas: operator -> function of its arguments that gives its FLOPs, for operators that torch does not know.
    """
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    return counter


class _NoModules(nullcontext[None]):
    parents = frozenset({"Global"})
