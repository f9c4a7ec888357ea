"""`gpc-dist import` and `gpc-dist export`: adapters of PEFT's as adapters of this program, and the other way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpc_dist import config as configuration
from gpc_dist.adapter.fingerprint import identify, stored_tensors
from gpc_dist.adapter.lane import Adapter
from gpc_dist.adapter.peft import Base, read_peft, write_peft
from gpc_dist.adapter.store import load_adapter, save_adapter
from gpc_dist.config import Config, EncoderConfig
from gpc_dist.encoder.frozen import find_checkpoint
from gpc_dist.encoder.skeleton import build_skeleton
from gpc_dist.errors import EXIT_DONE, UserError
from gpc_dist.tasks import make_task

_POOLER = "pooler.dense."


def run_import(folder: Path, output: Path, overrides: Mapping[str, str]) -> int:
    """`gpc-dist import --peft`: write an adapter of PEFT's as one of this program.

    Args:
        overrides: dotted keys: the encoder on which it was trained, and its task and data, if it is to be evaluated.

    Raises:
        UserError: it cannot be one, see `read_peft`; the encoder cannot be read; or it has not the task's outputs.
    """
    config = configuration.build({}, dict(overrides))
    base = _read_base(config.encoder)
    adapter = read_peft(folder, base)
    task = _task(config, adapter) if any(key.startswith("task.") for key in overrides) else {}
    save_adapter(output, adapter, base.identity, task)
    print(
        f"adapter of method prompt-tuning with {adapter.prompt_tokens} prompt tokens and {adapter.outputs} outputs "
        f"written to {output}"
    )
    return EXIT_DONE


def run_export(folder: Path, output: Path, overrides: Mapping[str, str]) -> int:
    """`gpc-dist export --peft`: write an adapter as a folder of PEFT's.

    Raises:
        UserError: PEFT cannot express it, see `write_peft`; or its encoder cannot be read.
    """
    adapter, card = load_adapter(folder)
    own = {"encoder": {"path": card.encoder.path, "revision": card.encoder.revision}}
    config = configuration.build(own, dict(overrides))
    base = _read_base(config.encoder)
    card.check_encoder(base.identity, base.shape)
    task_type = write_peft(output, adapter, base)
    beside = "" if task_type == "SEQ_CLS" else ", with its head beside it in head.safetensors"
    print(f"adapter of PEFT's type PROMPT_TUNING, task_type {task_type}, written to {output}{beside}")
    return EXIT_DONE


def _read_base(config: EncoderConfig) -> Base:
    """What the files of an encoder say of it; its weights are not read."""
    model_config, files = find_checkpoint(config)
    parts = build_skeleton(model_config, torch.float32)
    return Base(
        replace(identify(parts.encoder, files), path=config.path),
        parts.shape,
        model_config.num_attention_heads,
        parts.takes_token_types,
        _pooler(files),
    )


def _task(config: Config, adapter: Adapter) -> dict[str, Any]:
    """What the adapter's card says of its task, as that of a training does."""
    task = make_task(config.task, config.data)
    if adapter.outputs != task.outputs:
        raise UserError(
            f"the adapter has {adapter.outputs} outputs, and task '{task.name}' needs {task.outputs}: give the task it "
            "was trained for"
        )
    values = config.model_dump(mode="json")
    return {"task": values["task"], "data": values["data"]}


def _pooler(files: Sequence[Path]) -> dict[str, Tensor] | None:
    """The pooler in the files of a checkpoint."""
    found = {
        name.partition(_POOLER)[2]: place.loaded().float()
        for name, place in stored_tensors(files).items()
        if name.startswith((_POOLER, f"bert.{_POOLER}"))
    }
    return found if found.keys() == {"weight", "bias"} else None
