"""Private parts of DeepSpeed: partitioning weights as they are read, int8 shards, the state of its ZeRO optimizers, and
what it compiles and says."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpc_dist.private import checked, require, without
from gpc_dist.tensors import Held, whole

# DeepSpeed's autotuner would import MLflow, which takes seconds and memory on every rank
with checked("deepspeed"), without("mlflow"):
    from deepspeed import DeepSpeedConfig, ops
    from deepspeed.accelerator import get_accelerator
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
    from deepspeed.runtime.zero import Init, partition_parameters
    from deepspeed.utils import groups
    from deepspeed.utils.logging import set_log_level_from_string

    require(
        Init,
        "_convert_to_zero_parameters",
        "_convert_to_deepspeed_param",
        "get_partition_rank",
        "num_partitions",
    )
    require(groups, "_get_zero_param_intra_parallel_group")
    require(partition_parameters, "CUDAQuantizer")
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


def kept_parts(parameter: Any) -> tuple[dict[str, Tensor], Tensor | None]:
    """What this rank keeps of a partitioned parameter between passes: by what they are, its shards that are in memory,
    flat, and the scales of int8 ones; and the whole, if it is so small that every rank has it once it was gathered."""
    shards = {}
    for kind, name in (("shard", "ds_tensor"), ("second shard", "ds_secondary_tensor")):
        shard = getattr(parameter, name)
        if shard is None or shard.status != PartitionedParamStatus.AVAILABLE:
            continue
        shards[kind] = shard
        if (scales := getattr(shard, "ds_quant_scale", None)) is not None:
            shards[f"scales of {kind}"] = scales
    gathered = parameter.ds_status == partition_parameters.ZeroParamStatus.AVAILABLE
    return shards, parameter if parameter.ds_persist and gathered else None


def check(ds_config: dict[str, Any]) -> None:
    """Let DeepSpeed itself judge a configuration.

    Raises:
        ValueError: it is not valid, in DeepSpeed's words.
    """
    try:
        DeepSpeedConfig(ds_config)
    except Exception as error:  # it raises a dozen types, AssertionError among them
        raise ValueError(" ".join(str(error).split())) from None


def partition(
    module: nn.Module,
    read: Callable[[nn.Parameter, int, Tensor], None] | None,
    ds_config: dict[str, Any],
    quantizer: Any = None,
    matrices: Collection[nn.Parameter] = (),
) -> None:
    """Partition the parameters of a module over the ranks, in place.

    `zero.Init` broadcasts every tensor from rank 0, which must hold it; with `read`, a rank's parts of it are read into
    their place in one buffer that all tensors have in turn, and partitioned from there.

    Args:
        read: reads the elements of a parameter, which is on the meta device, from a position on (of the flattened
            parameter) into a flat tensor; None for a module that is in memory, whose values rank 0 gives.
        quantizer: keeps the shards of `matrices` as int8, in which they are gathered, too:
            `quantize(shard) -> values, scales` and `dequantize(values, scales, dtype=None)`.
    """

    class OwnInit(Init):
        def _convert_to_zero_parameters(self, param_list: Any) -> None:
            # it quantises a shard before it has values, and then rounds these to whole numbers
            self.quantized_nontrainable_weights = False
            parameters = list(dict.fromkeys(param_list))  # layers may share weights
            if read is not None and parameters[0].is_meta:
                self._read_shards(parameters, read)
                return
            # in memory: all of a module, or what is trained beside one and joins it later
            super()._convert_to_zero_parameters(parameters)
            for parameter in parameters:
                self._keep_int8(parameter)

        def _read_shards(
            self, parameters: Sequence[Any], read: Callable[[nn.Parameter, int, Tensor], None]
        ) -> None:
            largest = max(p.numel() * p.dtype.itemsize for p in parameters)
            buffer = torch.empty(largest, dtype=torch.uint8, device=self.local_device)
            for parameter in parameters:
                count = parameter.numel()
                whole = buffer[: count * parameter.dtype.itemsize].view(parameter.dtype).view(parameter.shape)
                torch.utils.swap_tensors(parameter, nn.Parameter(whole, requires_grad=False))
                self._convert_to_deepspeed_param(parameter)
                length = -(-count // self.num_partitions)
                parts = [(length, self.get_partition_rank())]
                if self.zero_param_process_group is not None:  # hpZ's second shard
                    parts.append(
                        (length * self.num_partitions // self.num_ranks_in_param_group, self.rank_in_group)
                    )
                for size, place in parts:
                    start = min(size * place, count)
                    read(parameter, start, whole.view(-1)[start : start + size])
                parameter.partition()
                self._keep_int8(parameter)

        def _keep_int8(self, parameter: Any) -> None:
            if quantizer is None or parameter not in matrices:
                return
            for name in ("ds_tensor", "ds_secondary_tensor"):
                if (shard := getattr(parameter, name)) is not None:
                    values, scales = quantizer.quantize(shard)
                    values = get_accelerator().pin_memory(values) if self.pin_memory else values
                    values.ds_quant_scale = scales
                    for kept in ("ds_numel", "status", "final_location"):
                        setattr(values, kept, getattr(shard, kept))
                    setattr(parameter, name, values)
            gather = parameter.all_gather_coalesced

            def gather_each(params: Any, *arguments: Any, **options: Any) -> _Gathering:
                # together, it would take their scales for those of groups of one length, and round the weights
                ordered = sorted(params, key=lambda each: each.ds_id)
                return _Gathering([gather([each], *arguments, **options) for each in ordered])

            parameter.all_gather_coalesced = gather_each

    if quantizer is not None:
        partition_parameters.CUDAQuantizer = lambda: quantizer  # its own is compiled, for GPUs alone
        Init.quantizer_module = quantizer  # where it is looked for, but not put, on a single rank
    group = groups._get_zero_param_intra_parallel_group()  # of an encoder before this one
    OwnInit(module=module, config_dict_or_path=ds_config, zero_param_parallel_group=group)


class _Gathering:
    """Collectives that are waited for together, as DeepSpeed waits for one."""

    def __init__(self, handles: list[Any]):
        self._handles = handles

    def wait(self, **options: Any) -> None:
        while self._handles:
            self._handles.pop(0).wait(**options)


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
