"""ZeRO-3 over the frozen encoder: DeepSpeed shards it, and each rank reads its own shard from the checkpoint."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gpc_dist.adapter.families import EncoderParts
from gpc_dist.distributed.world import World
from gpc_dist.encoder.skeleton import give_values
from gpc_dist.encoder.weights import Stored
from gpc_dist.errors import MachineError, UserError


def shard(
    parts: EncoderParts, places: Mapping[nn.Parameter, Stored] | None, world: World, ds_config: dict[str, Any]
) -> None:
    """Partition the encoder over the ranks, in place.

    Each layer is gathered as a whole when it runs, and released after it.

    Args:
        places: places in files of a skeleton's weights; None for an encoder that is whole in memory on
            every rank, whose values rank 0 gives.

    Raises:
        MachineError: DeepSpeed is missing.
        UserError: offload to NVMe where DeepSpeed's operator for it cannot be built.
    """
    encoder: Any = parts.encoder
    deepspeed = _import_deepspeed(world)
    _check_nvme(deepspeed, ds_config)
    deepspeed.utils.set_z3_leaf_modules(encoder, [type(parts.layers[0])])
    deepspeed.init_distributed(verbose=False)
    if places is not None:
        _init_from_files(deepspeed, encoder, places, ds_config)
    deepspeed.initialize(model=encoder, config=ds_config)
    encoder.eval()


def _init_from_files(
    deepspeed: Any, encoder: nn.Module, places: Mapping[nn.Parameter, Stored], ds_config: dict[str, Any]
) -> None:
    class InitFromFiles(deepspeed.zero.Init):  # type: ignore[misc, name-defined]
        """`zero.Init` broadcasts every tensor from rank 0, which must hold it. Here each rank reads its own part
        of a tensor into a buffer, which all tensors share, and partitions it from there."""

        def _convert_to_zero_parameters(self, param_list: Any) -> None:
            parameters = list(dict.fromkeys(param_list))  # layers may share weights
            largest = max(p.numel() * p.dtype.itemsize for p in parameters)
            buffer = torch.empty(largest, dtype=torch.uint8, device=self.local_device)
            for parameter in parameters:
                place = places[parameter]
                size = place.numel * parameter.dtype.itemsize
                whole = buffer[:size].view(parameter.dtype).view(parameter.shape)
                give_values(parameter, whole)
                self._convert_to_deepspeed_param(parameter)
                length = -(-place.numel // self.num_partitions)
                start = min(length * self.get_partition_rank(), place.numel)
                place.read(start, whole.view(-1)[start : start + length])
                parameter.partition()

    InitFromFiles(module=encoder, config_dict_or_path=ds_config)


def _check_nvme(deepspeed: Any, ds_config: dict[str, Any]) -> None:
    offload = ds_config["zero_optimization"].get("offload_param", {})
    if offload.get("device") != "nvme":
        return
    builder = deepspeed.ops.op_builder.AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        raise UserError(
            "engine.offload_param nvme needs DeepSpeed's async_io operator, which cannot be built here: install libaio "
            "with its headers (libaio-dev) and a C++ compiler, or use engine.offload_param cpu"
        )


def _import_deepspeed(world: World) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    try:
        import deepspeed
    except ImportError as error:
        raise MachineError(f"engine.zero_stage 3 needs deepspeed: {error}") from None
    deepspeed.utils.logging.set_log_level_from_string("warning")
    # DeepSpeed calls a collective by a name that newer versions of torch deprecate
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    if world.device.type == "cpu":
        # its shared-memory collective would be compiled on first use, by all ranks at once
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed
