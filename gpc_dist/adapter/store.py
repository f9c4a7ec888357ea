"""The adapter folder: trained tensors (`adapter.safetensors`) and a card (`adapter_config.json`)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gpc_dist import __version__
from gpc_dist.adapter.fingerprint import EncoderIdentity
from gpc_dist.adapter.lane import Adapter, EncoderShape
from gpc_dist.config import AdapterConfig
from gpc_dist.errors import UserError
from gpc_dist.files import new_folder

WEIGHTS = "adapter.safetensors"
CARD = "adapter_config.json"
NAMES = (WEIGHTS, CARD)
"""The files of an adapter folder."""
_FORMAT = 1
_ENCODER = "encoder."
"""Prefix of the names of a fine-tuned encoder's tensors."""


@dataclass(frozen=True)
class AdapterCard:
    """The description of an adapter in its folder (`adapter_config.json`)."""

    adapter: AdapterConfig
    shape: EncoderShape
    outputs: int
    encoder: EncoderIdentity
    task: dict[str, Any] = field(default_factory=dict)
    """The task of the training, in the form that the writer chose; this module does not read it."""

    def check_encoder(self, found: EncoderIdentity) -> None:
        """Raise UserError if `found` is not the encoder on which the adapter was trained."""
        if found.sha256 != self.encoder.sha256:
            raise UserError(
                f"this adapter was trained on encoder '{self.encoder.path}' "
                f"(sha256 {self.encoder.sha256[:12]}), not on '{found.path}' "
                f"(sha256 {found.sha256[:12]}): load the encoder it names"
            )


def save_adapter(
    folder: str | Path,
    adapter: Adapter,
    encoder: EncoderIdentity,
    task: dict[str, Any] | None = None,
) -> None:
    """Write an adapter folder in one step: it holds the trained tensors and nothing else.

    Raises:
        UserError: there is a folder with other files.
    """
    card = {
        "format": _FORMAT,
        "gpc_dist": __version__,
        "adapter": adapter.config.model_dump(mode="json"),
        "shape": asdict(adapter.shape),
        "outputs": adapter.outputs,
        "encoder": encoder.dump(),
        "task": task or {},
    }
    tensors = {n: p.detach().cpu().contiguous() for n, p in adapter.named_parameters()}
    with new_folder(Path(folder), NAMES) as temporary:
        save_file(tensors, temporary / WEIGHTS)
        (temporary / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def read_card(folder: str | Path) -> AdapterCard:
    """Read the card of an adapter folder; raises UserError if it has none that this version can read."""
    path = Path(folder) / CARD
    if not path.is_file():
        raise UserError(f"no adapter in {folder}: {CARD} is missing")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        if card["format"] != _FORMAT:
            raise UserError(f"{path} has format {card['format']}; this version reads {_FORMAT}")
        if missing := AdapterConfig.model_fields.keys() - card["adapter"].keys():
            raise KeyError(*sorted(missing))
        return AdapterCard(
            AdapterConfig.model_validate(card["adapter"]),
            EncoderShape(**card["shape"]),
            card["outputs"],
            EncoderIdentity(**card["encoder"]),
            card["task"],
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a valid adapter card: {error!r}") from None


def load_adapter(folder: str | Path) -> tuple[Adapter, AdapterCard]:
    """Load the adapter of a folder (float32, on the CPU) and its card, without the weights of a fine-tuned
    encoder: see `load_tuned_encoder`.

    Raises:
        UserError: the folder has no adapter, a file is corrupt, or the tensors do not match the card.
    """
    card = read_card(folder)
    path = Path(folder) / WEIGHTS
    try:
        adapter = Adapter(card.adapter, card.shape, card.outputs)
        tensors = load_file(path)
        if card.adapter.trains_encoder:
            tensors = {name: t for name, t in tensors.items() if not name.startswith(_ENCODER)}
        adapter.load_state_dict(tensors)
    except (OSError, SafetensorError, RuntimeError, TypeError) as error:
        raise UserError(f"{path} cannot be loaded into its adapter: {error}") from None
    return adapter, card


def load_tuned_encoder(folder: str | Path, adapter: Adapter) -> None:
    """Load fine-tuned weights into the encoder that an adapter has taken (see `Adapter.take_encoder`).

    Raises:
        UserError: the file is corrupt, or its tensors are not those of this encoder.
    """
    path = Path(folder) / WEIGHTS
    # by name, because load_state_dict would expect weights that layers share once for each layer
    named = {n: p for n, p in adapter.named_parameters() if n.startswith(_ENCODER)}
    try:
        tensors = {n: t for n, t in load_file(path).items() if n.startswith(_ENCODER)}
        if differing := sorted(named.keys() ^ tensors.keys()):
            raise RuntimeError(f"{', '.join(differing[:3])} stands on one side only")
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(tensors[name])
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{path} cannot be loaded into its encoder: {error}") from None
