"""Plans for a recipe: for `gpc-dist plan`, and for the devices at hand (`engine.plan: auto`)."""

from __future__ import annotations

import logging
import math
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from gpc_dist.config import Config, EncoderConfig, EngineConfig
from gpc_dist.distributed import deepspeed_config
from gpc_dist.distributed.world import World, encoder_dtype
from gpc_dist.encoder.frozen import encoder_path, not_loaded
from gpc_dist.encoder.shapes import known_config, shape_names
from gpc_dist.errors import UserError
from gpc_dist.planner.devices import GIB, Device, device_at_hand
from gpc_dist.planner.dry_run import ModelSpec
from gpc_dist.planner.planner import HEAD_ROOM, Estimate, Planner, recommend, why
from gpc_dist.planner.regime import regimes_for
from gpc_dist.planner.timing import Cluster
from gpc_dist.planner.workload import describe

log = logging.getLogger(__name__)

_HEAP = 2.0
"""On a CPU, memory for each byte in use: glibc's heap keeps what was freed. Measured: up to 1.7."""


@dataclass(frozen=True)
class Choice:
    """What is recommended, and why, in a phrase."""

    estimate: Estimate
    why: str


def planned(config: Config, world: World, outputs: int) -> Config:
    """`config` with what `engine.plan: auto` chooses for the devices at hand, the same on every rank.

    Raises:
        UserError: nothing fits, on every rank.
    """
    if config.engine.plan == "none":
        return config
    found = world.gather({"host": socket.gethostname(), "device": asdict(device_at_hand(world.device))})
    values: dict[str, Any] | str = ""
    if found is not None:
        try:
            values = plan_for(config, [(each["host"], Device(**each["device"])) for each in found], outputs)
        except UserError as error:
            values = str(error)  # raised on every rank, so that none waits for another
    values = world.from_main(values)
    if isinstance(values, str):
        raise UserError(values)
    engine = EngineConfig.model_validate(config.engine.model_dump() | values | {"plan": "none"})
    return config.model_copy(update={"engine": engine})


def plan_for(config: Config, found: Sequence[tuple[str, Device]], outputs: int) -> dict[str, Any]:
    """The values of `config.PLANNED` for ranks on these hosts and devices.

    Raises:
        UserError: nothing fits, or as `make_planner`.
    """
    hosts = Counter(host for host, _ in found)
    per_node = max(hosts.values())
    device = min((device for _, device in found), key=lambda device: device.memory_gib)
    if device.is_cpu:
        device = replace(device, memory_gib=device.memory_gib / per_node / _HEAP)
    cluster = Cluster(device, len(hosts), per_node)
    planner = make_planner(config, device, outputs)
    choice = choose(planner, cluster, config.engine)
    said = reason(choice, cluster, config.engine)
    if choice is None:
        raise UserError(said)
    chosen = choice.estimate
    values = {
        "zero_stage": chosen.regime.zero_stage,
        "offload_param": chosen.regime.offload,
        "hpz": chosen.regime.hpz,
        "activation_checkpointing": chosen.regime.recompute,
        "micro_batch_tokens": chosen.most_rows * planner.workload.row_tokens,
    }
    log.info("engine.plan: %s. %s", ", ".join(f"{key} {value}" for key, value in values.items()), said)
    return values


def choose(planner: Planner, cluster: Cluster, engine: EngineConfig) -> Choice | None:
    """The recommendation among the regimes that this configuration can run and that give the same results."""
    regimes = [
        regime
        for regime in regimes_for(cluster.nodes, cluster.per_node)
        if regime.quantize == engine.quantize
        and (regime.offload != "nvme" or engine.nvme_path is not None)
        and not (regime.offload == "cpu" and cluster.device.is_cpu)
    ]
    estimates = [planner.estimate(regime, cluster) for regime in regimes]
    chosen = recommend(estimates)
    return None if chosen is None else Choice(chosen, why(chosen, estimates))


def make_planner(config: Config, device: Device, outputs: int) -> Planner:
    """The planner for a run's encoder, adapter and batch.

    Raises:
        UserError: the encoder is not frozen, or its configuration cannot be found.
    """
    if config.adapter.trains_encoder:
        raise UserError(
            "the planner counts with a frozen encoder: give another adapter.method than fine-tuning"
        )
    dtype = encoder_dtype(config.engine, torch.device("cpu" if device.is_cpu else "cuda"))
    if config.engine.dtype == "auto" and not device.is_cpu:
        dtype = torch.bfloat16  # this machine may have no GPU; the planned one has
    train = config.train
    rows = math.ceil(train.batch_tokens / config.data.max_length) if train.batch_tokens else train.batch_size
    encoder = encoder_config(config.encoder)
    workload = describe(
        ModelSpec(
            encoder,
            dtype,
            config.adapter,
            outputs,
            states_given=config.engine.state_cache != "none",
        ),
        optimizer=train.optimizer,
        max_length=config.data.max_length,
        rows=rows,
    )
    engine = config.engine.model_copy(
        update={
            "zero_stage": 3,
            "offload_param": "none",
            "hpz": False,
            "ds_config": config.engine.ds_config if config.engine.zero_stage == 3 else None,
        }
    )
    zero3 = deepspeed_config.resolve(config.model_copy(update={"engine": engine}), 1, dtype)
    zero3 = deepspeed_config.with_sizes(zero3, encoder.hidden_size)
    # a CPU rank has the host's table in its own memory
    on_device = config.engine.token_table == "device" or device.is_cpu
    return Planner(workload, zero3["zero_optimization"], on_device)


def encoder_config(config: EncoderConfig) -> Any:
    """The encoder's configuration: from its folder or the local cache, from the known shapes, or from the Hub.

    Raises:
        UserError: none of them has it.
    """
    from transformers import AutoConfig

    path = encoder_path(config)
    try:
        return AutoConfig.from_pretrained(
            path, revision=config.revision, local_files_only=True, trust_remote_code=False
        )
    except Exception:  # a damaged file raises a dozen types
        if (known := known_config(config.path)) is not None:
            return known
    try:
        return AutoConfig.from_pretrained(path, revision=config.revision, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"{not_loaded(config, 'configuration', error)}, or a known shape: {', '.join(shape_names())}"
        ) from None


def reason(choice: Choice | None, cluster: Cluster, engine: EngineConfig) -> str:
    """One sentence: what is recommended and why, or what to do when nothing fits."""
    device = f"{cluster.size} x {cluster.device.name} with {cluster.device.memory_gib:.1f} GiB"
    if choice is None:
        remedy = "use more or larger devices, a shorter data.max_length, or a smaller encoder"
        if engine.quantize == "none":
            remedy += ", or engine.quantize int8"
        return f"No regime fits on {device}, {HEAD_ROOM:.0%} kept free: {remedy}."
    chosen = choice.estimate
    return (
        f"Recommended: {chosen.regime.name} ({choice.why}), on {device}, {HEAD_ROOM:.0%} kept free: "
        f"{chosen.memory.total / GIB:.2f} GiB with {chosen.micro_rows} rows at once, of at most {chosen.most_rows}."
    )
