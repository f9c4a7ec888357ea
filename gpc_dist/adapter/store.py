"""The adapter folder: trained tensors (`adapter.safetensors`) and a card (`adapter_config.json`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpc_dist import __version__
from gpc_dist.adapter.fingerprint import EncoderIdentity
from gpc_dist.adapter.lane import Adapter, EncoderShape, Origin
from gpc_dist.config import AdapterConfig
from gpc_dist.errors import UserError
from gpc_dist.files import new_folder, read_small_json, read_text, sha256
from gpc_dist.shown import one_line
from gpc_dist.tensors import Held, Stored, Stream, check_like, read_header, stream, whole, write_stream
from gpc_dist.typed import check_as

WEIGHTS = "adapter.safetensors"
CARD = "adapter_config.json"
NAMES = (WEIGHTS, CARD)
"""The files of an adapter folder."""
README = "README.md"
"""The model card that may stand beside them (`hub.model_card`)."""
MARK = "<!-- written by gpc-dist -->"
"""A line of each model card that this program wrote."""
_FORMAT = 1
_ENCODER = "encoder."
"""Prefix of the names of a fine-tuned encoder's tensors."""
_START = "init_from"
"""A key of `AdapterConfig` that cards leave out: `origin` says what it led to, and a path means nothing elsewhere."""
_ADDED = {"first_layer": 0, "head_layers": "last", "head_hidden": False, "prompt_mlp": None, _START: None}
"""Keys of `AdapterConfig` that cards, or older ones, lack, with what an adapter did without them."""
_MOST_LAYERS = 1000
"""Of an encoder; a card that names more would have as many cells made before one is compared with a tensor."""


@dataclass(frozen=True)
class AdapterCard:
    """The description of an adapter in its folder (`adapter_config.json`)."""

    adapter: AdapterConfig
    shape: EncoderShape
    outputs: int
    encoder: EncoderIdentity
    task: dict[str, Any] = field(default_factory=dict)
    """The task of the training, in the form that the writer chose; this module does not read it."""
    weights_sha256: str | None = None
    """SHA-256 of `adapter.safetensors`; None in a folder that was written before cards had it."""
    origin: Origin | None = None
    """The adapter that it started from (`adapter.init_from`)."""

    def check_encoder(self, found: EncoderIdentity, shape: EncoderShape) -> None:
        """Raise UserError if an encoder is not the one on which the adapter was trained, or has other sizes than the
        card says."""
        if found.sha256 != self.encoder.sha256:
            raise UserError(
                f"this adapter was trained on encoder '{self.encoder.path}' "
                f"(sha256 {self.encoder.sha256[:12]}), not on '{found.path}' "
                f"(sha256 {found.sha256[:12]}): load the encoder it names"
            )
        if shape != self.shape:
            raise UserError(
                f"this adapter's card gives its encoder {_sizes(self.shape)}, and '{found.path}' has {_sizes(shape)}: "
                f"{CARD} was changed after it was written, fetch the adapter again"
            )


def save_adapter(
    folder: str | Path,
    adapter: Adapter,
    encoder: EncoderIdentity,
    task: dict[str, Any] | None = None,
    weights: Stream | None = None,
    describe: Callable[[AdapterCard], str] | None = None,
) -> None:
    """Write an adapter folder in one step: it holds the trained tensors and nothing else.

    Args:
        weights: values of all the adapter's parameters; the parameters themselves when not given.
        describe: gives the text of a model card to write beside them.

    Raises:
        UserError: there is a folder with other files, or with a model card that somebody else wrote.
    """
    names = NAMES if describe is None else (*NAMES, README)
    readme = Path(folder) / README
    if describe is not None and readme.is_file() and MARK not in read_text(readme):
        raise UserError(
            f"{readme} was not written by gpc-dist, and would be replaced: move it, or give another folder"
        )
    card = {
        "format": _FORMAT,
        "gpc_dist": __version__,
        "adapter": adapter.config.model_dump(mode="json", exclude={_START}),
        "shape": asdict(adapter.shape),
        "outputs": adapter.outputs,
        "encoder": encoder.dump(),
        "task": task or {},
        "origin": adapter.origin and asdict(adapter.origin),
    }
    with new_folder(Path(folder), names) as temporary:
        write_stream(temporary / WEIGHTS, weights or stream(dict(adapter.named_parameters())))
        card["weights_sha256"] = sha256(temporary / WEIGHTS)
        (temporary / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        if describe is not None:
            (temporary / README).write_text(describe(read_card(temporary)), encoding="utf-8")


def read_card(folder: str | Path) -> AdapterCard:
    """Read the card of an adapter folder.

    Raises:
        UserError: there is none, or none that this version can read.
    """
    path = Path(folder) / CARD
    if not path.is_file():
        inside = min(Path(folder).glob(f"*/{CARD}"), default=None)
        where = f"{inside.parent} has one" if inside else "a run's is its folder adapter"
        raise UserError(f"no adapter in {folder}: {CARD} is missing ({where})")
    try:
        card = read_small_json(path)
        if not isinstance(card, dict):
            raise UserError("it holds no JSON object")
        if card.get("format") != _FORMAT:
            raise UserError(f"it has format {card.get('format')}; this version reads {_FORMAT}")
        # their defaults may change, and would then change what the adapter computes
        given = card.get("adapter")
        if isinstance(given, dict):
            card = card | {"adapter": (given := _ADDED | given)}
        if missing := AdapterConfig.model_fields.keys() - (given.keys() if isinstance(given, dict) else {}):
            raise UserError(f"adapter lacks {', '.join(sorted(missing))}")
        found = check_as(AdapterCard, {"task": None} | card, CARD)
        if found.shape.layers > _MOST_LAYERS:
            raise UserError(f"shape.layers is {found.shape.layers}")
    except UserError as error:
        raise UserError(f"{path} is not a valid adapter card: {one_line(error)}") from None
    return found


def load_adapter(folder: str | Path) -> tuple[Adapter, AdapterCard]:
    """Load the adapter of a folder (float32, on the CPU) and its card, without the weights of a fine-tuned
    encoder: see `load_tuned_encoder`.

    Nothing is made of the card's sizes before the file's header has been found to have the same. The file must have
    the SHA-256 that the card gives; a card without one is from an older version, and its tensors are only looked at
    for names, shapes, dtypes and values that are not finite.

    Raises:
        UserError: the folder has no adapter, a file is damaged, the tensors do not match the card, or a value is not
            finite.
    """
    from gpc_dist.private.transformers import no_init_weights

    card = read_card(folder)
    path = Path(folder) / WEIGHTS
    try:
        # without the latter, drawing initial values takes seconds even on the meta device
        with torch.device("meta"), no_init_weights():
            adapter = Adapter(card.adapter, card.shape, card.outputs)
        stored = _stored(path, tuned=False) if card.adapter.trains_encoder else read_header(path)
        check_like(stored, {name: p.shape for name, p in adapter.named_parameters()})
        if card.weights_sha256 not in (None, sha256(path)):
            raise UserError(f"it is not the file that {CARD} was written for: fetch the adapter again")
        adapter.load_state_dict(finite(stored), assign=True)
        adapter.origin = card.origin
    except (UserError, OSError, RuntimeError, TypeError, OverflowError) as error:
        raise UserError(f"{path} cannot be loaded into its adapter: {one_line(error)}") from None
    return adapter, card


def load_tuned_encoder(
    folder: str | Path, adapter: Adapter, held: Callable[[nn.Parameter], Held] = whole
) -> None:
    """Load fine-tuned weights into the encoder that an adapter has taken (see `Adapter.take_encoder`).

    Args:
        held: what this process has of a parameter.

    Raises:
        UserError: the file is damaged, its tensors are not those of this encoder, or a value is not finite.
    """
    path = Path(folder) / WEIGHTS
    # by name, because load_state_dict would expect weights that layers share once for each layer
    named = {n: held(p) for n, p in adapter.named_parameters() if n.startswith(_ENCODER)}
    try:
        stored = _stored(path, tuned=True)
        check_like(stored, {name: part.shape for name, part in named.items()})
        for name, part in named.items():
            stored[name].read(part.start, part.values)
            _check_finite(name, part.values)
    except (UserError, OSError) as error:
        raise UserError(f"{path} cannot be loaded into its encoder: {one_line(error)}") from None


def _stored(path: Path, tuned: bool) -> dict[str, Stored]:
    """The tensors of a fine-tuned encoder, or those of the adapter beside it."""
    return {name: place for name, place in read_header(path).items() if name.startswith(_ENCODER) is tuned}


def finite(stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """The values of tensors, float32."""
    found = {}
    for name, place in stored.items():
        found[name] = place.loaded().float()
        _check_finite(name, found[name])
    return found


def _check_finite(name: str, values: Tensor) -> None:
    if not values.isfinite().all():
        raise UserError(
            f"{name!r} holds values that are not finite: fetch it again, or train it with a lower train.lr"
        )


def _sizes(shape: EncoderShape) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in asdict(shape).items())
