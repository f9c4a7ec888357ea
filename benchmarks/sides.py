"""The two sides of `gpu_t5.py` and `scaling.py`, each run in processes of its own on the same examples.

Ours is `gpc-dist bench`; the peer is `peer_t5.py`. Both give the same figures: `step_ms` (median), `tokens_per_s`
and `examples_per_s` over all measured steps, `padding_pct`, `peak_memory_mib` of each rank.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class SideError(Exception):
    """A side could not be measured; says why."""


@dataclass(frozen=True)
class Setting:
    """What both sides run."""

    shape: str
    device: str
    """cpu: float32; cuda: bf16."""
    lengths: str
    """See `gpc-dist bench --help`."""
    max_length: int
    batch_size: int
    """Examples per step, all ranks."""
    prompt_tokens: int
    steps: int
    ranks: int = 1


def run_ours(setting: Setting, overrides: dict[str, Any], encoder: Path | None = None) -> dict[str, Any]:
    """What `gpc-dist bench` finds.

    Args:
        overrides: configuration keys beyond those of the setting.
        encoder: see `write_encoder`; weights that each rank draws by itself when not given.

    Raises:
        SideError: with the command's last words.
    """
    keys = {
        "data.max_length": setting.max_length,
        "train.batch_size": setting.batch_size,
        "adapter.prompt_tokens": setting.prompt_tokens,
        "engine.device": setting.device,
        "engine.dtype": "bf16" if setting.device == "cuda" else "fp32",
        "engine.ranks": setting.ranks,
        **overrides,
    }
    with tempfile.TemporaryDirectory() as scratch:
        recipe, out = Path(scratch) / "defaults.yaml", Path(scratch) / "found.json"
        recipe.write_text("{}\n")
        command = [sys.executable, "-m", "gpc_dist", "bench", str(recipe), "--json", str(out)]
        command += ["--lengths", setting.lengths, "--steps", str(setting.steps)]
        command += ["--encoder.path", str(encoder)] if encoder else ["--shape", setting.shape]
        command += [word for key, value in keys.items() for word in (f"--{key}", str(value).lower())]
        _run(command, dict(os.environ))
        return json.loads(out.read_text())


def run_peer(setting: Setting, encoder: Path, stage: int | None, recompute: bool) -> dict[str, Any]:
    """What `peer_t5.py` finds.

    Args:
        encoder: see `write_encoder`.
        stage: ZeRO stage; plain PyTorch without DeepSpeed when None.
        recompute: with activation checkpointing.

    Raises:
        SideError: out of memory, or its last words.
    """
    with tempfile.TemporaryDirectory() as scratch:
        examples, out = Path(scratch) / "examples.npz", Path(scratch) / "found.json"
        _write_examples(setting, examples)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(setting.ranks)]
        command += ["--standalone", "--local-addr", "127.0.0.1", str(HERE / "peer_t5.py")]
        command += ["--encoder", str(encoder), "--examples", str(examples), "--out", str(out)]
        command += ["--device", setting.device, "--batch-size", str(setting.batch_size)]
        command += ["--prompt-tokens", str(setting.prompt_tokens)]
        command += ["--stage", str(stage)] if stage is not None else []
        command += ["--gradient-checkpointing"] if recompute else []
        environment = os.environ | {"DS_ACCELERATOR": setting.device}
        if setting.device == "cpu":
            environment["GLOO_SOCKET_IFNAME"] = "lo"  # gloo would look the host's name up to choose one
        _run(command, environment)
        found = json.loads(out.read_text())
    if "out_of_memory" in found:
        raise SideError("out of memory")
    return found


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SideError("\n".join(done.stderr.strip().splitlines()[-40:]))


def missing_packages(stage: int | None) -> list[str]:
    """What the peer would need and is not installed here."""
    needed = ["peft"] if stage is None else ["peft", "deepspeed"]
    return [name for name in needed if find_spec(name) is None]


def prebuild_peer() -> None:
    """Build the operator that DeepSpeed's CPU ranks would otherwise all build at once."""
    command = [sys.executable, str(HERE / "peer_loop.py"), "--prebuild"]
    subprocess.run(command, check=True, capture_output=True)


def write_encoder(shape: str, dtype: str, folder: Path) -> None:
    """An encoder of this shape with random weights, as a checkpoint without a tokenizer: a file, or several of a GB.

    Args:
        dtype: float32 or bfloat16.
    """
    import torch

    from gpc_dist.adapter.families import locate
    from gpc_dist.distributed.memory import trim_heap
    from gpc_dist.encoder.shapes import known_config
    from gpc_dist.encoder.skeleton import fill_random, skeleton_model

    model = skeleton_model(known_config(shape), getattr(torch, dtype))
    fill_random(locate(model), torch.device("cpu"))
    model.save_pretrained(folder, max_shard_size="1GB")
    # otherwise all of it stays in this process, beside those that are measured
    del model
    gc.collect()
    trim_heap()


def write_tokenizer(folder: Path) -> None:
    """The packaged encoder's tokenizer, into a checkpoint without one: a run wants one, and no figure depends on it."""
    from transformers import AutoTokenizer

    from gpc_dist.config import EncoderConfig
    from gpc_dist.encoder.frozen import encoder_path

    AutoTokenizer.from_pretrained(encoder_path(EncoderConfig())).save_pretrained(folder)


def _write_examples(setting: Setting, file: Path) -> None:
    """The examples that `gpc-dist bench` makes, for the peer."""
    import numpy as np

    from gpc_dist.bench.synthetic import draw_lengths, synthetic
    from gpc_dist.encoder.shapes import known_config

    model_config = known_config(setting.shape)
    assert model_config is not None
    lengths = draw_lengths(setting.lengths, setting.steps * setting.batch_size, setting.max_length)
    made = synthetic(lengths, model_config.vocab_size)
    assert made.targets is not None
    np.savez(file, ids=made.segment_ids, lengths=lengths, labels=made.targets)
