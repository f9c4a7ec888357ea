"""Configurations of well-known encoders, so that planning and benchmarks need neither network nor weights."""

from __future__ import annotations

from typing import Any

# Raffel et al. 2020, table of section 3.7, as released for T5 v1.1: d_model, d_ff, layers, heads of 64
_T5 = {
    "small": (512, 1024, 8, 6),
    "base": (768, 2048, 12, 12),
    "large": (1024, 2816, 24, 16),
    "xl": (2048, 5120, 24, 32),
    "xxl": (4096, 10240, 24, 64),
}
# Liu et al. 2019, table 9: hidden size, inner size, layers, heads
_ROBERTA = {"base": (768, 3072, 12, 12), "large": (1024, 4096, 24, 16)}

_PREFIXES = ("google/", "FacebookAI/")


def shape_names() -> list[str]:
    return [f"t5-v1_1-{size}" for size in _T5] + [f"roberta-{size}" for size in _ROBERTA]


def known_config(name: str) -> Any | None:
    """The configuration of an encoder by its Hub id or short name (`google/t5-v1_1-xl`, `t5-v1_1-xl`); None for
    one that is not listed here."""
    from transformers import RobertaConfig, T5Config

    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    if name.endswith("-lm-adapt"):  # T5 v1.1, trained further as Lester et al. 2021 say
        name = name.removesuffix("-lm-adapt").replace("t5-", "t5-v1_1-", 1)
    family, _, size = name.rpartition("-")
    if family == "t5-v1_1" and size in _T5:
        width, inner, layers, heads = _T5[size]
        return T5Config(
            vocab_size=32128,
            d_model=width,
            d_ff=inner,
            num_layers=layers,
            num_heads=heads,
            d_kv=64,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,  # type: ignore[call-arg]
        )
    if family == "roberta" and size in _ROBERTA:
        width, inner, layers, heads = _ROBERTA[size]
        return RobertaConfig(
            vocab_size=50265,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=514,
            type_vocab_size=1,
        )
    return None
