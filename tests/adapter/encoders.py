"""Tiny encoders of every family with random weights, and batches for them."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

H, L, P, VOCAB, POSITIONS = 32, 3, 4, 101, 64

_BERT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": H,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": POSITIONS,
    "type_vocab_size": 2,
}
_ROBERTA = _BERT | {"pad_token_id": 1}  # its positions count from pad_token_id + 1
_T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": H,
    "num_layers": L,
    "num_heads": 4,
    "d_kv": 8,
    "d_ff": 48,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
}

SIZES: dict[str, dict[str, Any]] = {
    "t5": _T5,
    "mt5": _T5,
    "umt5": _T5,
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "xlm-roberta-xl": _ROBERTA,
    "deberta-v2": _BERT
    | {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
        "conv_kernel_size": 3,
        "conv_act": "gelu",
    },
    "electra": _BERT | {"embedding_size": 16},
    "albert": _BERT | {"embedding_size": 16},
    "distilbert": {
        "vocab_size": VOCAB,
        "dim": H,
        "n_layers": L,
        "n_heads": 4,
        "hidden_dim": 48,
        "max_position_embeddings": POSITIONS,
    },
    # a window shorter than the batches below, so that local and global layers differ
    "modernbert": _BERT
    | {"local_attention": 8, "global_attn_every_n_layers": 2}
    | {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3},
}
FAMILIES = sorted(SIZES)
WITH_TOKEN_TYPES = [f for f in FAMILIES if f not in ("t5", "mt5", "umt5", "distilbert", "modernbert")]
_ENCODER_HALVES = {
    "t5": transformers.T5EncoderModel,
    "mt5": transformers.MT5EncoderModel,
    "umt5": transformers.UMT5EncoderModel,
}


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Draw every weight, biases and norms included, so that no part of a layer is idle."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(0.2 * noise)
            else:
                parameter.add_(0.1 * noise)


def tiny_config(family: str, **changes: Any) -> Any:
    return transformers.AutoConfig.for_model(family, **(SIZES.get(family, _BERT) | changes))


def tiny(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A new encoder; the same weights for the same seed. `changes` are keys of its configuration."""
    return copy.deepcopy(_made(family, seed, json.dumps(changes)))


@functools.cache
def _made(family: str, seed: int, changes: str) -> PreTrainedModel:
    config = tiny_config(family, **json.loads(changes))
    if family in _ENCODER_HALVES:
        model = _ENCODER_HALVES[family](config)
    else:
        model = transformers.AutoModel.from_config(config)
    randomise(model, seed)
    for name, parameter in model.named_parameters():
        if name.endswith("SelfAttention.q.weight"):  # T5 leaves the scale of its scores to these weights
            parameter.data.mul_(config.d_kv**-0.5)
    return model.eval()


def saved_encoder(folder: Path, family: str = "bert", seed: int = 0, **options: Any) -> PreTrainedModel:
    """A new encoder that was saved in a folder and loaded from it. `options` are those of `save_pretrained`."""
    tiny(family, seed).save_pretrained(folder, **options)
    return transformers.AutoModel.from_pretrained(folder)


def batch(
    lengths: tuple[int, ...] = (11, 7, 3), token_types: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """Rows of the given lengths, padded on the right by token 1."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCAB, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    made = {"input_ids": torch.where(mask == 1, ids, 1), "attention_mask": mask}
    if token_types:
        segments = torch.randint(0, 2, ids.shape, generator=generator)
        made["token_type_ids"] = torch.where(mask == 1, segments, 0)
    return made


def batch_for(family: str, **arguments: Any) -> dict[str, Tensor]:
    """A batch with token types where the family has them."""
    return batch(token_types=family in WITH_TOKEN_TYPES, **arguments)
