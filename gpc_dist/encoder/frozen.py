"""Finding, loading and placing the frozen encoder, of which each rank reads only its own part, and thawing it for
methods that train it."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpc_dist.adapter.families import TESTED, EncoderParts, locate, probe
from gpc_dist.adapter.fingerprint import PICKLED, SAFETENSORS, stored_tensors, weight_files
from gpc_dist.adapter.pretrained import encoder_path, load_whole
from gpc_dist.config import EncoderConfig, EngineConfig
from gpc_dist.distributed.world import World
from gpc_dist.encoder.sharding import is_sharded, shard, shard_for_training
from gpc_dist.encoder.skeleton import Drawn, freeze, give_values, skeleton_model
from gpc_dist.encoder.weights import check_sums, match
from gpc_dist.errors import MachineError, UserError
from gpc_dist.tensors import Stored

log = logging.getLogger(__name__)


def load_tokenizer(config: EncoderConfig) -> Any:
    """The encoder's tokenizer.

    Raises:
        UserError: no tokenizer could be loaded.
        MachineError: `sentencepiece` is missing, and the tokenizer needs it.
    """
    from transformers import AutoTokenizer

    path = encoder_path(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=config.revision, trust_remote_code=False)
        tokenizer("\N{SNOWMAN}")  # a vocabulary without an unknown token is refused on use only
        return tokenizer
    except Exception as error:  # damaged files raise a dozen types in transformers and tokenizers
        if "tiktoken" in str(error):  # what transformers tries when a SentencePiece model cannot be read
            error = _unread_pieces()
        raise not_loaded(config, "tokenizer", error) from None


def _unread_pieces() -> ValueError:
    if importlib.util.find_spec("sentencepiece") is None:
        raise MachineError(
            "sentencepiece is not installed, which reads tokenizers of T5 and others: pip install sentencepiece"
        )
    return ValueError("its SentencePiece model is damaged: fetch it again")


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder that is not placed yet."""

    parts: EncoderParts
    places: dict[nn.Parameter, Stored] | dict[nn.Parameter, Drawn] | None
    """Places in files of the weights that are still to be read, or what is drawn instead; None if all are in memory."""
    files: Sequence[Path] = ()
    """Those its weights come from; for a Hub id, in the snapshot of the revision in the cache."""

    def read_table(self) -> None:
        """Read the token table, in place, if it is still to be read."""
        table: Any = self.parts.token_embeddings.weight
        if self.places is not None and table in self.places:
            _materialise(table, self.places.pop(table), torch.device("cpu"))


def load_encoder(config: EncoderConfig, dtype: torch.dtype, world: World, table: bool = True) -> Encoder:
    """The pretrained encoder, frozen and in eval mode. Of its weights only the token table is read; `place` reads
    the others. A checkpoint of a family this project's tests do not cover is loaded whole by `transformers`.

    Args:
        table: read the token table at once; else see `Encoder.read_table`.

    Raises:
        UserError: nothing to load, damaged files, missing or unexpected weights, or a family that cannot hold
            a prompt.
    """
    with _named(config):
        model_config, files = find_checkpoint(config, check=world.local_rank == 0)
        if model_config.model_type not in TESTED:
            parts = locate(freeze(load_whole(files, model_config, dtype)))
            probe(parts)
            return Encoder(parts, None, files)
    model, places = matched_skeleton(config, model_config, files, dtype)
    parts = locate(model)
    encoder = Encoder(parts, places, files)
    if table:
        encoder.read_table()
    return encoder


def find_checkpoint(config: EncoderConfig, check: bool = True) -> tuple[Any, list[Path]]:
    """The configuration (of `transformers`) and the weight files of an encoder.

    Args:
        check: compare the files with their sums, where `encoder.checksum` asks for it.

    Raises:
        UserError: nothing to load, damaged files, or sums that differ.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    path = encoder_path(config)
    logging.disable_progress_bar()
    with _named(config):
        model_config = AutoConfig.from_pretrained(path, revision=config.revision, trust_remote_code=False)
        files = weight_files(path, config.revision)
        if not files:
            raise FileNotFoundError(f"it holds no {SAFETENSORS} and no {PICKLED}")
    if config.checksum and check:
        check_sums(files)
    return model_config, files


def matched_skeleton(
    config: EncoderConfig, model_config: Any, files: Sequence[Path], dtype: torch.dtype
) -> tuple[Any, dict[nn.Parameter, Stored]]:
    """An encoder without its weights, see `skeleton.skeleton_model`, and the places of these.

    Raises:
        UserError: damaged files, or see `weights.match`.
    """
    with _named(config):
        model = skeleton_model(model_config, dtype)
    return model, match(model, stored_tensors(files))


@contextmanager
def _named(config: EncoderConfig) -> Iterator[None]:
    """Say of which encoder an error is that a library raises."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # damaged files raise a dozen types in transformers and torch
        raise not_loaded(config, "encoder", error) from None


def not_loaded(config: EncoderConfig, what: str, error: Exception) -> UserError:
    """What to say about files of an encoder that a library cannot read."""
    log.debug("no %s could be loaded", what, exc_info=True)
    if "trust_remote_code" in str(error):
        return UserError(
            f"encoder.path '{config.path}': its {what} needs Python code that comes with it (auto_map in its files), "
            "and this program runs none: give an encoder of a family that transformers itself has"
        )
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return UserError(
        f"encoder.path '{config.path}': no {what} could be loaded ({reason}). Give a local folder, a Hub id that "
        "can be reached, or 'minilm'"
    )


def count_parameters(parts: EncoderParts) -> int:
    """N: frozen parameters, the token embeddings included; of a whole (not yet sharded) encoder."""
    modules = nn.ModuleList([parts.encoder, parts.token_embeddings])
    return sum(p.numel() for p in modules.parameters())


def place(
    encoder: Encoder,
    world: World,
    engine: EngineConfig,
    ds_config: dict[str, Any],
    half: EncoderParts | None = None,
    trained: bool = False,
) -> None:
    """Move the encoder, or a half of it, to where the run needs it, in place. The layers that are in no half stay where
    they are: what is not in memory is not read.

    At stages 0 to 2 every rank has all of it: on the CPU as a view of the checkpoint file where the dtype is the
    same, so that all ranks of a machine share one copy; on a GPU read in pieces. At stage 3 it is sharded
    (see `sharding.shard`). The token table leaves the encoder, which is given `inputs_embeds`: a step needs
    a few hundred of its rows, and gathering all of them would be the largest collective of the step.

    Args:
        trained: the encoder is to be fine-tuned; at stage 3 its token table is then sharded too.

    Raises:
        UserError, MachineError: see `sharding.shard`.
    """
    parts, places = half or encoder.parts, encoder.places
    model: Any = parts.encoder
    model.set_input_embeddings(_NoTable())
    table: Any = parts.token_embeddings.weight
    if engine.token_table == "device" and not table.is_meta:
        parts.token_embeddings.to(world.device)
    if engine.zero_stage == 3 and trained:
        shard_for_training(parts, places, world, ds_config)
        return
    if engine.zero_stage == 3:
        shard(parts, places, world, ds_config)
        return
    for layer in parts.layers:
        _read_module(layer, places, world.device)
        if engine.quantize != "none":
            from gpc_dist.encoder.quantize import quantize_layer

            quantize_layer(layer, engine.quantize)
    _read_module(model, places, world.device)
    model.to(world.device)


def thaw(parts: EncoderParts) -> None:
    """Make every weight of a placed encoder trainable, in place. Each that is not sharded gets a storage of its own,
    row by row, because it may be a view of the checkpoint file.

    Raises:
        UserError: the encoder was thawed before, so its weights are no longer the checkpoint's.
    """
    modules = nn.ModuleList([parts.encoder, parts.token_embeddings])
    for parameter in modules.parameters():
        if parameter.requires_grad:
            raise UserError("this encoder is being fine-tuned by another run: load one for each run")
        if not is_sharded(parameter):
            give_values(parameter, parameter.detach().clone(memory_format=torch.contiguous_format))
        parameter.requires_grad_(True)


class _NoTable(nn.Module):
    """Placeholder for the token table."""


def _read_module(
    module: nn.Module, places: Mapping[nn.Parameter, Stored | Drawn] | None, device: torch.device
) -> None:
    for parameter in module.parameters():
        if places is not None and parameter.device.type == "meta":
            _materialise(parameter, places[parameter], device)


def _materialise(parameter: nn.Parameter, place: Stored | Drawn, device: torch.device) -> None:
    if device.type == "cpu" and parameter.dtype == place.dtype:
        values = place.mapped()
    else:
        values = torch.empty(place.shape, dtype=parameter.dtype, device=device)
        place.read(0, values.view(-1))
    give_values(parameter, values)
