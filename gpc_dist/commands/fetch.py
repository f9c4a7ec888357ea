"""`gpc-dist fetch`."""

from __future__ import annotations

from typing import Any

from gpc_dist import config
from gpc_dist.commands.command import Command, add_recipe


def run(options: Any, settings: dict[str, str], _: list[str]) -> int:
    chosen = config.load(options.recipe, settings)
    from gpc_dist.cluster.fetch import run_fetch

    return run_fetch(chosen)


COMMAND = Command(
    "Download what a recipe needs: encoder, tokenizer and data.",
    add_recipe,
    run,
    "For compute nodes without network: run it on a login node that shares the cache (HF_HOME) with them, and\n"
    "submit with HF_HUB_OFFLINE=1.",
    settings="recipe",
)
