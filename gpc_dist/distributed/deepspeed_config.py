"""The DeepSpeed configuration of a run: a shipped regime with the run's own values filled in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gpc_dist.config import Config, EngineConfig
from gpc_dist.errors import UserError
from gpc_dist.files import read_text
from gpc_dist.parsing import parse_json
from gpc_dist.shipped import shipped_folder


def regime(config: EngineConfig) -> str:
    """Name of the shipped regime for `engine.zero_stage` and `engine.offload_param`."""
    offload = "" if config.offload_param == "none" else f"-offload-{config.offload_param}"
    return f"zero{config.zero_stage}{offload}"


def regimes() -> list[str]:
    return sorted(path.stem for path in shipped_folder("ds_configs").glob("*.json"))


def resolve(config: Config, world_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """The DeepSpeed configuration of a run, with no value left to DeepSpeed's defaults.

    Raises:
        UserError: no such file, invalid JSON, or a file whose ZeRO stage is not the configuration's.
    """
    engine, train = config.engine, config.train
    values = read(engine.ds_config or regime(engine))
    # DeepSpeed shards the frozen encoder; the adapter has an optimizer of its own (distributed/optimizer.py)
    values.pop("optimizer", None)
    zero = values.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else zero
    if stage != engine.zero_stage:
        raise UserError(
            f"engine.ds_config '{engine.ds_config}' has ZeRO stage {stage}, but engine.zero_stage is "
            f"{engine.zero_stage}: make them agree"
        )
    # DeepSpeed requires train_batch = micro_batch x accumulation x ranks; a step of this program may be cut
    # unevenly, so it is told the nearest whole micro-batch
    micro = max(1, train.batch_size // world_size)
    values |= {
        "train_batch_size": micro * world_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.clip_norm or 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": False},
    }
    if engine.offload_param == "nvme":
        values["zero_optimization"]["offload_param"]["nvme_path"] = str(engine.nvme_path)
    return values


def read(name: str) -> dict[str, Any]:
    """The values of a DeepSpeed JSON: a packaged regime, or a path.

    Raises:
        UserError: no such file, or invalid JSON.
    """
    path = Path(name) if name.endswith(".json") else shipped_folder("ds_configs") / f"{name}.json"
    if not path.is_file():
        raise UserError(f"engine.ds_config '{name}' is neither a JSON file nor one of {', '.join(regimes())}")
    values = parse_json(read_text(path), f"engine.ds_config {path}")
    if not isinstance(values, dict):
        raise UserError(f"engine.ds_config {path} is not a JSON object, as DeepSpeed's configuration is")
    return values
