"""`gpc-dist fetch`: download what a recipe needs to the local caches, for machines without network."""

from __future__ import annotations

from pathlib import Path

import torch

from gpc_dist.config import Config
from gpc_dist.distributed.world import DTYPES, World
from gpc_dist.encoder.convert import convert
from gpc_dist.encoder.frozen import count_parameters, load_encoder, load_tokenizer
from gpc_dist.errors import EXIT_DONE
from gpc_dist.shown import shown
from gpc_dist.tasks import make_task, read_part, selection_part
from gpc_dist.tasks.holdout import Part


def run_fetch(config: Config, target: Path | None = None, dtype: str | None = None) -> int:
    """Read the data, tokenizer and encoder as training does, so that missing files are downloaded.

    Args:
        target: a folder for a copy of the encoder, see `encoder.convert`; none is made when not given.
        dtype: of the copy, named as `engine.dtype` is, which it is when not given; with `auto` bf16.

    Returns:
        The exit code.

    Raises:
        UserError: one of them cannot be loaded, or does not match the configuration.
    """
    task = make_task(config.task, config.data)
    parts: tuple[Part, ...] = ("train", selection_part(config.data))
    counts = [f"{len(read_part(task, config.data, part)):,} {part}" for part in parts]
    print(f"data: {shown(task.name)}, {' and '.join(counts)} examples")
    load_tokenizer(config.encoder)
    # matches every weight with the tables of the files, and reads only the token table
    encoder = load_encoder(config.encoder, torch.float32, World(0, 1, 0, torch.device("cpu")))
    print(f"encoder: {shown(config.encoder.path)}, {count_parameters(encoder.parts):,} parameters")
    if target is not None:
        if dtype is None:
            dtype = "bf16" if config.engine.dtype == "auto" else config.engine.dtype
        written = convert(config.encoder, target, DTYPES[dtype])
        size_mib = sum(written.values()) / 2**20
        print(
            f"copy: {shown(str(target))}, {size_mib:,.0f} MiB of {dtype} in {len(written)} files, for encoder.path"
        )
    return EXIT_DONE
