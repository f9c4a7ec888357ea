"""ZeRO-3 over the encoder: DeepSpeed shards it, and each rank reads its own shard from the checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gpc_dist import own_folders
from gpc_dist.adapter.families import EncoderParts
from gpc_dist.distributed.world import World
from gpc_dist.distributed.zero_library import import_deepspeed
from gpc_dist.encoder.quantize import ShardQuantizer, shard_matrices
from gpc_dist.encoder.skeleton import Drawn
from gpc_dist.errors import UserError
from gpc_dist.tensors import Held, Stored, whole


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
    offload = ds_config["zero_optimization"].get("offload_param", {})
    deepspeed = import_deepspeed(world, compiles=offload.get("device") == "nvme")
    from gpc_dist.private import deepspeed as private

    if offload.get("device") == "nvme" and not private.can_use_nvme():
        raise UserError(
            "engine.offload_param nvme needs DeepSpeed's async_io operator, which cannot be built here: install libaio "
            "with its headers (libaio-dev) and a C++ compiler, or use engine.offload_param cpu"
        )
    int8: dict[str, Any] = {}
    if ds_config["zero_optimization"]["zero_quantized_nontrainable_weights"]:
        int8 = {"quantizer": ShardQuantizer(), "matrices": shard_matrices(parts.layers, world.size)}
    ds_config = _with_own_swap_folder(ds_config)
    encoder: Any = parts.encoder
    deepspeed.utils.set_z3_leaf_modules(encoder, [type(parts.layers[0])])
    _check(ds_config)
    _partition(encoder, places, ds_config, **int8)
    deepspeed.initialize(model=encoder, config=ds_config)
    encoder.eval()


def shard_for_training(
    parts: EncoderParts,
    places: Mapping[nn.Parameter, Stored | Drawn] | None,
    world: World,
    ds_config: dict[str, Any],
) -> None:
    """Partition the encoder and its token table over the ranks, in place, for a `ZeroOptimizer`, which lets DeepSpeed
    gather each module's weights when it runs. (DeepSpeed would reduce a whole layer's gradients as soon as that of the
    layer's input is there, and those of T5's relative bias come later.)

    Args:
        places: as for `shard`; an encoder that is whole in memory stays so until there is the optimizer.

    Raises:
        MachineError, UserError: as `shard`.
    """
    import_deepspeed(world)
    _check(ds_config)
    if places is not None:
        _partition(nn.ModuleList([parts.token_embeddings, parts.encoder]), places, ds_config)


def _check(ds_config: dict[str, Any]) -> None:
    from gpc_dist.private import deepspeed as private

    try:
        private.check(ds_config)
    except ValueError as error:
        raise UserError(f"DeepSpeed refuses its configuration (engine.ds_config): {error}") from None


def _partition(
    module: nn.Module,
    places: Mapping[nn.Parameter, Stored | Drawn] | None,
    ds_config: dict[str, Any],
    **int8: Any,
) -> None:
    from gpc_dist.private import deepspeed as private

    def read(parameter: nn.Parameter, start: int, target: Tensor) -> None:
        assert places is not None
        places[parameter].read(start, target)

    private.partition(module, None if places is None else read, ds_config, **int8)


def held(parameter: nn.Parameter) -> Held:
    """What this rank has of a parameter of a placed encoder."""
    if not is_sharded(parameter):
        return whole(parameter)
    from gpc_dist.private import deepspeed as private

    return private.held(parameter)


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether this rank has a part of a parameter only."""
    if "deepspeed" not in sys.modules:  # its import takes seconds
        return False
    from gpc_dist.private import deepspeed as private

    return private.is_partitioned(parameter)


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
