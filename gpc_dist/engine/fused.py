"""Elementwise chains of frozen encoders, each through one kernel of torch.

`transformers` writes T5's activation and norm operator by operator. On a GPU each operator reads and writes all
of `[B, P+T, inner size]`, so that a layer waits for memory longer than its matrix products take, and autograd
keeps what stands between them: four times the activation's input instead of once, three times the norm's.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


def fuse_elementwise(model: nn.Module) -> None:
    """Let the modules of a frozen encoder compute as above, in place; values change by rounding only."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "NewGELUActivation":
                setattr(module, name, nn.GELU(approximate="tanh"))
        if type(module).__name__ in ("T5LayerNorm", "MT5LayerNorm", "UMT5LayerNorm"):
            module.forward = MethodType(_norm, module)


def _norm(self: Any, states: Tensor) -> Tensor:
    """Root mean square norm over the last dimension."""
    if not states.is_cuda:
        # torch has one kernel for it on GPUs only; what it does elsewhere is no faster
        return type(self).forward(self, states)
    return F.rms_norm(states.to(self.weight.dtype), self.weight.shape, self.weight, self.variance_epsilon)
