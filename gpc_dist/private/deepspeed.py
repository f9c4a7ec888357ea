"""Private parts of DeepSpeed: partitioning weights as they are read, the state of its ZeRO optimizers, and what it
compiles and says."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpc_dist.private import checked, require, without
from gpc_dist.tensors import Held, whole

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
    # it calls collectives by names that newer versions of torch deprecate
    deprecated = ".*(all_gather_into_tensor|reduce_scatter_tensor).*"
    warnings.filterwarnings("ignore", message=deprecated, category=FutureWarning)


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
            if not parameters[0].is_meta:  # what is trained beside the module, and joins it later
                super()._convert_to_zero_parameters(param_list)
                return
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


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has partitioned a parameter over the ranks."""
    return hasattr(parameter, "ds_tensor")


def held(parameter: nn.Parameter) -> Held:
    """What this rank has of a parameter, which is not gathered at the moment; without what ZeRO-3 pads it with."""
    if not is_partitioned(parameter):
        return whole(parameter)
    found: Any = parameter
    size = found.ds_tensor.ds_numel
    start = min(size * dist.get_rank(), found.ds_numel)
    return Held(found.ds_shape, start, found.ds_tensor.detach()[: min(size, found.ds_numel - start)])


@dataclass(frozen=True)
class Place:
    """Where a ZeRO optimizer has the flat part of a parameter that this rank updates."""

    start: int
    """Elements of the flattened parameter before the part."""
    count: int
    flat: nn.Parameter
    """What the inner optimizer updates: parts of several parameters, float32 `[n]`."""
    offset: int
    """Of the part in `flat`."""

    def of(self, flat: Tensor) -> Tensor:
        """The part `[count]` of `flat`, or of what the inner optimizer keeps for it, as a view."""
        return flat.detach()[self.offset : self.offset + self.count]


def place_of(parameter: nn.Parameter, engine: Any) -> Place:
    """The place of a trained parameter in the optimizer of an engine with ZeRO 1, 2 or 3."""
    optimizer, rank = engine.optimizer, dist.get_rank()
    if is_partitioned(parameter):
        part = held(parameter)
        group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        return Place(part.start, len(part.values), optimizer.fp32_partitioned_groups_flat[group], offset)
    for parameters, whole_group, flat in zip(
        optimizer.bit16_groups,
        optimizer.bit16_groups_flat,
        optimizer.single_partition_of_fp32_groups,
        strict=True,
    ):
        if any(parameter is each for each in parameters):
            # the weights are views of the group, whose equal parts are the ranks'
            begin = (parameter.data_ptr() - whole_group.data_ptr()) // parameter.element_size()
            mine = len(flat) * rank
            first, last = max(begin, mine), min(begin + parameter.numel(), mine + len(flat))
            return Place(first - begin, max(0, last - first), flat, first - mine)
    raise AssertionError("not one of the parameters that the engine trains")


def skip_nonfinite(engine: Any) -> None:
    """Let `engine.step` leave out an update from gradients that are not finite, as it does for float16 alone."""
    engine.optimizer.check_grad_overflow = True
