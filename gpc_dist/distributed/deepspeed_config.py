"""What DeepSpeed is given: a packaged regime, with what the user's own file asks for and the run's values filled in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gpc_dist.config import Config, EngineConfig
from gpc_dist.deepspeed_file import is_own, packaged, read
from gpc_dist.deepspeed_keys import KEYS, OFFLOAD, ZERO, Fate, leaves
from gpc_dist.errors import UserError

log = logging.getLogger(__name__)

_AUTO = "auto"
_HPZ = "zero_hpz_partition_size"
_SIZES: dict[str, Callable[[int], int]] = {
    "reduce_bucket_size": lambda hidden: hidden * hidden,
    "stage3_prefetch_bucket_size": lambda hidden: int(0.9 * hidden * hidden),
    "stage3_param_persistence_threshold": lambda hidden: 10 * hidden,
}
"""What the trainer of transformers takes for "auto", for an encoder of this width."""


def regime(config: EngineConfig) -> str:
    """Name of the packaged regime that a configuration starts from."""
    offload = "" if config.offload_param == "none" else f"-offload-{config.offload_param}"
    return f"zero{config.zero_stage}{offload}"


def used(config: Config, world_size: int) -> bool:
    """Whether DeepSpeed has a part in a run: where an encoder is sharded, or trained in parts."""
    return config.engine.zero_stage == 3 or trains(config, world_size)


def trains(config: Config, world_size: int) -> bool:
    """Whether DeepSpeed's engine trains the encoder: where something of it is partitioned."""
    stage = config.engine.zero_stage
    return config.adapter.trains_encoder and (stage == 3 or (stage > 0 and world_size > 1))


def resolve(config: Config, world_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """The DeepSpeed configuration of a run, with no value left to DeepSpeed's defaults: what the user's file leaves
    out, or leaves to be chosen as "auto", is as in the packaged regime. "auto" stays where it depends on the encoder or
    on where ranks are: see `with_sizes` and `with_groups`.

    Raises:
        UserError: see `deepspeed_file.read`; or the ranks cannot be divided into groups as hpZ needs.
    """
    engine, train = config.engine, config.train
    values = packaged(regime(engine))
    # for other programs: the adapter has an optimizer of its own (distributed/optimizer.py)
    del values["optimizer"]
    own = _own(engine)
    for name, value in own.items():
        if KEYS[name].fate in (Fate.GIVEN, Fate.TRAINED):
            _put(values, name, value)
    if engine.zero_stage == 3:
        zero = values[ZERO]
        zero["zero_quantized_nontrainable_weights"] = engine.quantize != "none"
        ranks = own.get(f"{ZERO}.{_HPZ}", _AUTO) if engine.hpz else 1
        zero[_HPZ] = ranks if ranks == _AUTO else _group_size(int(ranks), world_size)
    if engine.offload_param == "nvme":
        values[ZERO]["offload_param"]["nvme_path"] = str(engine.nvme_path)
    # DeepSpeed requires train_batch = micro_batch x accumulation x ranks; a step of this program may be cut
    # unevenly, so it is told the nearest whole micro-batch
    micro = max(1, train.batch_size // world_size)
    return values | {
        "train_batch_size": micro * world_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.clip_norm or 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": False},
    }


def with_sizes(values: dict[str, Any], hidden_size: int) -> dict[str, Any]:
    """The configuration with the sizes for an encoder of this width where the user's file has "auto"."""
    zero = values[ZERO]
    return values | {
        ZERO: zero | {key: of(hidden_size) for key, of in _SIZES.items() if zero.get(key) == _AUTO}
    }


def with_groups(values: dict[str, Any], hosts: Sequence[str]) -> dict[str, Any]:
    """The configuration with the ranks of a machine as hpZ's groups, unless the user's file has their size.

    Args:
        hosts: of each rank.

    Raises:
        UserError: machines have different numbers of ranks, or not in one sequence.
    """
    if values[ZERO].get(_HPZ) != _AUTO:
        return values
    ranks = hosts.count(hosts[0])
    machines = len(set(hosts))
    in_sequence = all(len(set(hosts[first : first + ranks])) == 1 for first in range(0, len(hosts), ranks))
    if len(hosts) != ranks * machines or not in_sequence:
        raise UserError(
            "engine.hpz needs equally many ranks on each machine, numbered one after the other there: start them so "
            "(in Slurm --ntasks-per-node and --distribution=block), or give engine.hpz false"
        )
    size = _group_size(ranks, len(hosts))
    if size == 1:
        log.warning("engine.hpz: %d ranks on each of %d machines are plain ZeRO-3", ranks, machines)
    return values | {ZERO: values[ZERO] | {_HPZ: size}}


def _group_size(ranks: int, world_size: int) -> int:
    """The ranks of one of hpZ's groups; 1, which is plain ZeRO-3, where one group would hold each shard twice.

    Raises:
        UserError: such groups do not divide the ranks.
    """
    if ranks >= world_size:
        return 1
    if world_size % ranks:
        sizes = [str(size) for size in range(2, world_size) if world_size % size == 0]
        raise UserError(
            f"{ZERO}.{_HPZ} {ranks} of engine.ds_config does not divide {world_size} ranks: take "
            f"{' or '.join([*sizes, 'another number of ranks'])}"
        )
    return ranks


def warn_of_unused(config: Config, world_size: int, values: dict[str, Any]) -> None:
    """Say what the user's own file asks for that is not used, or not as it stands there.

    Args:
        values: see `resolve`.
    """
    said = []
    for name, value in _own(config.engine).items():
        key = KEYS[name]
        if key.fate is Fate.SET:
            said += [f"{name} is {values[name]}, set from {key.note}"] * _differs(value, values[name])
        elif name == f"{ZERO}.{_HPZ}" and value > 1 == values[ZERO].get(_HPZ):
            said.append(f"{name} {value}: one group would hold each shard twice")
        elif key.fate is Fate.UNUSED and key.asks(value):
            said.append(f"{name}: {key.note}")
        elif (
            not used(config, world_size)
            and name != f"{ZERO}.stage"
            and key.fate is not Fate.REFUSED
            and key.asks(value)
        ):
            said.append(f"{name}: DeepSpeed has no part at stage {config.engine.zero_stage}")
        elif key.fate is Fate.TRAINED and not config.adapter.trains_encoder:
            said.append(f"{name}: it matters to fine-tuning alone")
    if said:
        log.warning(
            "engine.ds_config %s is not used as it stands: %s", config.engine.ds_config, "; ".join(said)
        )


def _own(engine: EngineConfig) -> dict[str, Any]:
    """What the user's own file says, by the names of the table."""
    if engine.ds_config is None or not is_own(engine.ds_config):
        return {}
    return {
        name: value
        for name, value in leaves(read(engine.ds_config))
        if name in KEYS and value is not None
        if value != _AUTO or name.removeprefix(f"{ZERO}.") in _SIZES
        if not name.startswith(f"{OFFLOAD}.") or engine.offload_param != "none"
    }


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        values = values[section]
    values[last] = int(value) if KEYS[name].kind is int and value != _AUTO else value


def _differs(value: Any, wanted: Any) -> bool:
    if isinstance(value, dict) and isinstance(wanted, dict):
        return any(each != _AUTO and wanted.get(key) != each for key, each in value.items())
    return bool(value != wanted)
