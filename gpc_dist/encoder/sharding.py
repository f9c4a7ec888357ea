"""ZeRO-3 over the frozen encoder: DeepSpeed shards it, and each rank reads its own shard from the checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gpc_dist import own_folders
from gpc_dist.adapter.families import EncoderParts
from gpc_dist.distributed.world import World
from gpc_dist.encoder.quantize import ShardQuantizer, shard_matrices
from gpc_dist.encoder.skeleton import Drawn
from gpc_dist.errors import UserError
from gpc_dist.tensors import Stored


def shard(
    parts: EncoderParts,
    places: Mapping[nn.Parameter, Stored | Drawn] | None,
    world: World,
    ds_config: dict[str, Any],
) -> None:
    """Partition the encoder over the ranks, in place.

    Each layer is gathered as a whole when it runs, and released after it.

    Args:
        places: places in files of a skeleton's weights, or what is drawn instead; None for an encoder that is whole
            in memory on every rank, whose values rank 0 gives.

    Raises:
        MachineError: DeepSpeed is missing, or of a version that this program was not checked with.
        UserError: offload to NVMe where DeepSpeed's operator for it cannot be built, a configuration that DeepSpeed
            refuses, or ranks that do not cut the matrices into what int8 needs.
    """
    # DeepSpeed reads both when it is imported
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    offload = ds_config["zero_optimization"].get("offload_param", {})
    if world.device.type != "cpu" or offload.get("device") == "nvme":
        own_folders.keep_compiled_code()  # of operators that are compiled
    from gpc_dist.private import deepspeed as private

    private.say_less()
    if world.device.type == "cpu":
        private.compile_nothing()
    if offload.get("device") == "nvme" and not private.can_use_nvme():
        raise UserError(
            "engine.offload_param nvme needs DeepSpeed's async_io operator, which cannot be built here: install libaio "
            "with its headers (libaio-dev) and a C++ compiler, or use engine.offload_param cpu"
        )
    int8: dict[str, Any] = {}
    if ds_config["zero_optimization"]["zero_quantized_nontrainable_weights"]:
        int8 = {"quantizer": ShardQuantizer(), "matrices": shard_matrices(parts.layers, world.size)}
    ds_config = _with_own_swap_folder(ds_config)
    import deepspeed

    encoder: Any = parts.encoder
    deepspeed.utils.set_z3_leaf_modules(encoder, [type(parts.layers[0])])
    deepspeed.init_distributed(verbose=False)
    try:
        private.check(ds_config)
    except ValueError as error:
        raise UserError(f"DeepSpeed refuses its configuration (engine.ds_config): {error}") from None

    def read(parameter: nn.Parameter, start: int, target: Tensor) -> None:
        assert places is not None
        places[parameter].read(start, target)

    private.partition(encoder, None if places is None else read, ds_config, **int8)
    deepspeed.initialize(model=encoder, config=ds_config)
    encoder.eval()


def _with_own_swap_folder(ds_config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with a new folder of this rank in `nvme_path`: there DeepSpeed removes, writes and reads files
    by names that it would have in common with other jobs and users of the machine."""
    zero = ds_config["zero_optimization"]
    offload = zero.get("offload_param", {})
    if offload.get("device") != "nvme":
        return ds_config
    place = Path(offload["nvme_path"])
    place.mkdir(parents=True, exist_ok=True)
    own = offload | {"nvme_path": str(own_folders.temporary(place))}
    return ds_config | {"zero_optimization": zero | {"offload_param": own}}
