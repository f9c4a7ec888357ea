"""Adapters of PEFT's prompt tuning and P-tuning as adapters of this program, and the other way.

A folder of PEFT's holds the prompt (`prompt_embeddings [P, E]`; of P-tuning what its prompt encoder gives) and, with
`task_type: SEQ_CLS`, the head of the model that PEFT wrapped. BERT's and RoBERTa's heads read position 0, which under
PEFT is the prompt's first token (`pooling: prompt-first`), through a layer with tanh (`head_hidden`): BERT's pooler,
which stands in the encoder's checkpoint, or the first layer of RoBERTa's head. What no head of transformers computes,
such as a linear map of the text's mean, is written with the head in files of its own beside what PEFT reads:
`head.safetensors` and `head_config.json`. So it is for T5, of which transformers has no classifier that takes a prompt.
The `task_type` is then `FEATURE_EXTRACTION`, or `TOKEN_CLS` for encoders with token types, which PEFT's class for the
former leaves out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gpc_dist import config as configuration
from gpc_dist.adapter.fingerprint import EncoderIdentity, read_table
from gpc_dist.adapter.lane import Adapter, EncoderShape
from gpc_dist.adapter.store import finite
from gpc_dist.errors import UserError
from gpc_dist.files import new_folder, read_small_json
from gpc_dist.shown import one_line, shown
from gpc_dist.tensors import Stored, check_like, read_header, save_file
from gpc_dist.typed import check_as

CARD, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
HEAD, HEAD_CARD = "head.safetensors", "head_config.json"
NAMES = (CARD, WEIGHTS, HEAD, HEAD_CARD)
"""The files that `write_peft` writes."""
_PROMPT = "prompt_embeddings"
_TYPES = ("PROMPT_TUNING", "P_TUNING")
_OF_STATES = ("FEATURE_EXTRACTION", "TOKEN_CLS")
"""Types of task for which PEFT runs a bare encoder, and gives its states."""
_LINEAR, _HIDDEN = ("head.linear.weight", "head.linear.bias"), ("head.hidden.weight", "head.hidden.bias")
_ROBERTA = {
    "head.linear.weight": "base_model.classifier.out_proj.weight",
    "head.linear.bias": "base_model.classifier.out_proj.bias",
    "head.hidden.weight": "base_model.classifier.dense.weight",
    "head.hidden.bias": "base_model.classifier.dense.bias",
}
_HEADS = {
    "bert": {
        "head.linear.weight": "base_model.classifier.weight",
        "head.linear.bias": "base_model.classifier.bias",
    },
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
}
"""By family: our name -> PEFT's, of the head's tensors in a folder with `task_type: SEQ_CLS`."""
_OTHER_HEADS = {
    "albert": "PEFT gives it prompts of another width than its embeddings",
    "deberta-v2": "its head has gelu where the head of this program has tanh",
    "distilbert": "PEFT does not save the first layer of its head",
    "electra": "its head has gelu where the head of this program has tanh",
    "modernbert": "its head has a norm and gelu",
}


@dataclass(frozen=True)
class Base:
    """What is to be known of the encoder of an adapter."""

    identity: EncoderIdentity
    shape: EncoderShape
    attention_heads: int
    """Of a layer; PEFT asks for them."""
    takes_token_types: bool
    pooler: Mapping[str, Tensor] | None = None
    """`weight [H, H]` and `bias [H]` of the pooler in a BERT's checkpoint, if that has one."""

    @property
    def family(self) -> str:
        return self.identity.model_type


@dataclass(frozen=True)
class _Card:
    """What matters of PEFT's `adapter_config.json`."""

    peft_type: str
    task_type: str | None = None
    num_transformer_submodules: int | None = None


@dataclass(frozen=True)
class _HeadCard:
    """`head_config.json`: the states that the head reads, see `AdapterConfig`."""

    pooling: Literal["mean", "first", "prompt", "prompt-first"]
    head_hidden: bool = False


def read_peft(folder: Path, base: Base) -> Adapter:
    """The adapter of method `prompt-tuning` that computes what a folder of PEFT's does, in float32.

    Raises:
        UserError: the folder holds no adapter of PEFT's, a damaged one, or one that cannot be expressed; says why.
    """
    card = _read_card(folder)
    try:
        stored = _stored(folder)
        prompt = stored.pop(_PROMPT, None)
        if prompt is None or len(prompt.shape) != 2 or not prompt.shape[0]:
            raise UserError(f"it has no {_PROMPT!r} of two dimensions")
        if card.task_type == "SEQ_CLS":
            read, named = _classifier(base, stored)
        else:
            read, named = _head_beside(folder)
        chosen = {"prompt_tokens": prompt.shape[0], "pooling": read.pooling, "head_hidden": read.head_hidden}
        config = configuration.build({"adapter": {"method": "prompt-tuning", **chosen}}).adapter
        # the sizes of a header are compared before anything is made of them
        linear = named.get(_LINEAR[0])
        outputs = linear.shape[0] if linear is not None and len(linear.shape) == 2 else 0
        wanted = {
            "prompt.start": (prompt.shape[0], base.shape.embedding_size),
            **_head_shapes(base.shape.hidden_size, outputs, read.head_hidden),
        }
        check_like({"prompt.start": prompt, **named}, wanted)
        values = finite({"prompt.start": prompt, **{n: t for n, t in named.items() if isinstance(t, Stored)}})
        values |= {name: tensor.float() for name, tensor in named.items() if isinstance(tensor, Tensor)}
        adapter = Adapter(config, base.shape, outputs)
        adapter.load_state_dict(values)
    except (UserError, OSError) as error:
        raise UserError(f"{folder} cannot be an adapter of this encoder: {one_line(error)}") from None
    return adapter


def _head_shapes(width: int, outputs: int, hidden: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = dict(zip(_LINEAR, ((outputs, width), (outputs,)), strict=True))
    return shapes | dict(zip(_HIDDEN, ((width, width), (width,)), strict=True)) if hidden else shapes


def _read_card(folder: Path) -> _Card:
    path = folder / CARD
    if not path.is_file():
        raise UserError(f"no adapter of PEFT's in {folder}: {CARD} is missing")
    card = check_as(_Card, read_small_json(path), str(path))
    kind = shown(card.peft_type)
    if card.peft_type not in _TYPES:
        raise UserError(
            f"{path} is of PEFT's type {kind}, and only prompts that stand before the text ({', '.join(_TYPES)}) are "
            "adapters of this program"
        )
    if card.num_transformer_submodules not in (None, 1):
        raise UserError(f"{path} has a prompt for the decoder, too, and this program runs encoders alone")
    if card.task_type not in ("SEQ_CLS", *_OF_STATES):
        raise UserError(
            f"{path} is of task_type {shown(str(card.task_type))}, whose answer is no class of a text: give one of "
            f"SEQ_CLS, or one with a head in {HEAD}, as gpc-dist export writes it"
        )
    return card


def _stored(folder: Path) -> dict[str, Stored]:
    """Places of PEFT's tensors, of either format; nothing is unpickled but a table of tensors."""
    path = folder / WEIGHTS
    return dict(read_table(path if path.is_file() else folder / PICKLED))


def _classifier(base: Base, stored: Mapping[str, Stored]) -> tuple[_HeadCard, dict[str, Stored | Tensor]]:
    """The head that PEFT saved with a prompt."""
    if (names := _HEADS.get(base.family)) is None:
        reason = _OTHER_HEADS.get(base.family, "no head of transformers for it is known here")
        raise UserError(f"PEFT's head on encoder family '{base.family}' cannot be expressed: {reason}")
    back = {theirs: ours for ours, theirs in names.items()}
    if other := next((name for name in stored if name not in back), None):
        raise UserError(f"it holds {other!r}, which is no part of the head of family '{base.family}'")
    found: dict[str, Stored | Tensor] = {back[name]: place for name, place in stored.items()}
    if names is not _ROBERTA:
        if base.pooler is None:
            raise UserError(
                "the encoder's files hold no pooler, through which BERT's head reads: give the checkpoint on which the "
                "adapter was trained"
            )
        found |= dict(zip(_HIDDEN, (base.pooler["weight"], base.pooler["bias"]), strict=True))
    return _HeadCard("prompt-first", head_hidden=True), found


def _head_beside(folder: Path) -> tuple[_HeadCard, dict[str, Stored | Tensor]]:
    """The head that `write_peft` writes beside a prompt."""
    for name in (HEAD, HEAD_CARD):
        if not (folder / name).is_file():
            raise UserError(f"it has a prompt and no head: {name} is missing")
    card = check_as(_HeadCard, read_small_json(folder / HEAD_CARD), HEAD_CARD)
    return card, {f"head.{name}": place for name, place in read_header(folder / HEAD).items()}


def write_peft(folder: Path, adapter: Adapter, base: Base) -> str:
    """Write an adapter as a folder of PEFT's, in one step.

    Returns:
        PEFT's `task_type`: `SEQ_CLS`, or that of a bare encoder, with the head beside it.

    Raises:
        UserError: PEFT cannot express the adapter; or the folder holds other files.
    """
    if reason := _inexpressible(adapter):
        raise UserError(f"PEFT cannot express this adapter: {reason}")
    assert adapter.prompt is not None
    tensors = {_PROMPT: adapter.prompt.first.detach().cpu().contiguous()}
    values = {
        name: each.detach().cpu().contiguous()
        for name, each in adapter.named_parameters()
        if not name.startswith("prompt.")
    }
    as_classifier = _is_classifier(adapter, base, values)
    if as_classifier:
        tensors |= {theirs: values[ours] for ours, theirs in _HEADS[base.family].items()}
    task_type = "SEQ_CLS" if as_classifier else _OF_STATES[int(base.takes_token_types)]
    card = {
        "peft_type": _TYPES[0],
        "task_type": task_type,
        "base_model_name_or_path": base.identity.path,
        "revision": base.identity.revision,
        "inference_mode": True,
        "num_virtual_tokens": adapter.prompt_tokens,
        "token_dim": adapter.shape.embedding_size,
        "num_layers": adapter.shape.layers,
        "num_attention_heads": base.attention_heads,
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
    }
    with new_folder(folder, NAMES) as temporary:
        (temporary / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, temporary / WEIGHTS, {"format": "pt"})
        if not as_classifier:
            head = {name.removeprefix("head."): tensor for name, tensor in values.items()}
            save_file(head, temporary / HEAD, {"format": "pt"})
            read = {"pooling": adapter.config.pooling, "head_hidden": adapter.config.head_hidden}
            (temporary / HEAD_CARD).write_text(json.dumps(read, indent=2) + "\n", encoding="utf-8")
    return task_type


def _inexpressible(adapter: Adapter) -> str | None:
    """Why PEFT has nothing that computes the same; None if it has."""
    config = adapter.config
    reasons = {
        "gpc": "its cell writes a new prompt between the layers, and PEFT's prompt enters once, before the first",
        "deep-prompt": "it has a prompt for each layer, and PEFT's prefix tuning has keys and values instead",
        "linear-probe": "it has no prompt",
        "fine-tuning": "it is a whole encoder, and no prompt",
    }
    if config.method in reasons:
        return f"adapter.method is {config.method}: {reasons[config.method]}"
    if adapter.first_layer > 0:
        return f"its prompt enters before layer {adapter.first_layer}, and PEFT's before the first"
    if config.head_layers == "mix":
        return "its head reads several layers (adapter.head_layers mix), and PEFT gives the last one's states"
    return None


def _is_classifier(adapter: Adapter, base: Base, values: Mapping[str, Tensor]) -> bool:
    """Whether the head is the one of the family's model for classification, as that computes under PEFT."""
    config, pooler = adapter.config, base.pooler
    if config.pooling != "prompt-first" or not config.head_hidden or base.family not in _HEADS:
        return False
    if _HEADS[base.family] is _ROBERTA:
        return True
    same = zip(_HIDDEN, ("weight", "bias"), strict=True)
    return pooler is not None and all(torch.equal(values[ours], pooler[name]) for ours, name in same)
