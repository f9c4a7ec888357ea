"""Private parts of PyTorch: those of the planner's dry run, and the hooks of a module."""

from __future__ import annotations

import copy
from collections import OrderedDict

from gpc_dist.private import checked, require

with checked("torch"):
    from torch import UntypedStorage, nn
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    require(UntypedStorage, "_cdata")

__all__ = ["FakeTensorMode", "TorchDispatchMode", "copy_without_hooks", "storage_key", "tree_leaves"]


def storage_key(storage: UntypedStorage) -> int:
    """The same for all Python objects that stand for a storage, as long as it lives."""
    return storage._cdata


def copy_without_hooks(module: nn.Module) -> nn.Module:
    """A module with the same weights and submodules, and with forward hooks of its own: none yet."""
    twin = copy.copy(module)
    twin._forward_hooks = OrderedDict()
    twin._forward_pre_hooks = OrderedDict()
    return twin
