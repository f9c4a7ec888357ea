"""DeepSpeed, imported as the ranks of a job need it."""

from __future__ import annotations

import os
from types import ModuleType

from gpc_dist import own_folders
from gpc_dist.distributed.world import World


def import_deepspeed(world: World, compiles: bool = False) -> ModuleType:
    """DeepSpeed with the ranks of the job joined to it; on CPUs it compiles nothing, unless it has to.

    Args:
        compiles: one of its operators is used that are compiled on any device.

    Raises:
        MachineError: it is missing, or of a version that this program was not checked with.
    """
    # it reads both when it is imported
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    if world.device.type != "cpu" or compiles:
        own_folders.keep_compiled_code()
    from gpc_dist.private import deepspeed as private

    private.say_less()
    if world.device.type == "cpu":
        private.compile_nothing()
    import deepspeed

    deepspeed.init_distributed(verbose=False)
    return deepspeed
