"""Private parts of DeepSpeed: partitioning weights as they are read, and what it compiles and says."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gpc_dist.private import checked, require, without

# DeepSpeed's autotuner would import MLflow, which takes seconds and memory on every rank
with checked("deepspeed"), without("mlflow"):
    from deepspeed import ops
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.runtime.zero import Init
    from deepspeed.utils.logging import set_log_level_from_string

    require(
        Init,
        "_convert_to_zero_parameters",
        "_convert_to_deepspeed_param",
        "get_partition_rank",
        "num_partitions",
    )
    if "__compatible_ops__" not in build_shm_op.__code__.co_names:  # to ask for it runs compilers
        raise AttributeError("its shared-memory collective has no switch '__compatible_ops__'")


def say_less() -> None:
    """Keep DeepSpeed to warnings, without one that is its own affair."""
    set_log_level_from_string("warning")
    # it calls a collective by the name that newer versions of torch deprecate
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)


def compile_nothing() -> None:
    """Keep DeepSpeed from compiling its shared-memory collective on first use, by all ranks at once."""
    ops.__compatible_ops__ = defaultdict(bool)  # whichever operator it asks for is not there


def can_use_nvme() -> bool:
    """Whether the operator for offload to NVMe is there or can be built."""
    return bool(AsyncIOBuilder().is_compatible(verbose=False))


def partition_from_files(
    module: nn.Module, read: Callable[[nn.Parameter, int, Tensor], None], ds_config: dict[str, Any]
) -> None:
    """Partition over the ranks, in place, a module whose parameters are on the meta device.

    `zero.Init` broadcasts every tensor from rank 0, which must hold it; here a rank's part of it is read into its
    place in one buffer that all tensors have in turn, and partitioned from there.

    Args:
        read: reads the elements of a parameter from a position on (of the flattened parameter) into a flat tensor.
    """

    class InitFromFiles(Init):
        def _convert_to_zero_parameters(self, param_list: Any) -> None:
            parameters = list(dict.fromkeys(param_list))  # layers may share weights
            largest = max(p.numel() * p.dtype.itemsize for p in parameters)
            buffer = torch.empty(largest, dtype=torch.uint8, device=self.local_device)
            for parameter in parameters:
                count = parameter.numel()
                whole = buffer[: count * parameter.dtype.itemsize].view(parameter.dtype).view(parameter.shape)
                torch.utils.swap_tensors(parameter, nn.Parameter(whole, requires_grad=False))
                self._convert_to_deepspeed_param(parameter)
                length = -(-count // self.num_partitions)
                start = min(length * self.get_partition_rank(), count)
                read(parameter, start, whole.view(-1)[start : start + length])
                parameter.partition()

    InitFromFiles(module=module, config_dict_or_path=ds_config)
