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
# Goyal et al. 2021: the same for XLM-R XL and XXL
_XLM_ROBERTA = {"xl": (2560, 10240, 36, 32), "xxl": (4096, 16384, 48, 32)}

_PREFIXES = ("google/", "FacebookAI/", "facebook/")


def shape_names() -> list[str]:
    sizes = {"t5-v1_1": _T5, "roberta": _ROBERTA, "xlm-roberta": _XLM_ROBERTA}
    return [f"{family}-{size}" for family, known in sizes.items() for size in known] + ["ul2"]


def known_config(name: str) -> Any | None:
    """The configuration of an encoder by its Hub id or short name (`google/t5-v1_1-xl`, `t5-v1_1-xl`); None for
    one that is not listed here."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    if name.endswith("-lm-adapt"):  # T5 v1.1, trained further as Lester et al. 2021 say
        name = name.removesuffix("-lm-adapt").replace("t5-", "t5-v1_1-", 1)
    family, _, size = name.rpartition("-")
    if family == "t5-v1_1" and size in _T5:
        return _t5(*_T5[size])
    if name == "ul2":  # Tay et al. 2022
        return _t5(4096, 16384, 32, 16, head=256, activation="gated-silu")
    if family == "roberta" and size in _ROBERTA:
        return _roberta("RobertaConfig", 50265, *_ROBERTA[size])
    if family == "xlm-roberta" and size in _XLM_ROBERTA:
        return _roberta("XLMRobertaXLConfig", 250880, *_XLM_ROBERTA[size])
    return None


def _t5(
    width: int, inner: int, layers: int, heads: int, head: int = 64, activation: str = "gated-gelu"
) -> Any:
    from transformers import T5Config

    return T5Config(
        vocab_size=32128,
        d_model=width,
        d_ff=inner,
        num_layers=layers,
        num_heads=heads,
        d_kv=head,
        feed_forward_proj=activation,
        tie_word_embeddings=False,  # type: ignore[call-arg]
    )


def _roberta(kind: str, vocabulary: int, width: int, inner: int, layers: int, heads: int) -> Any:
    import transformers

    return getattr(transformers, kind)(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=514,
        type_vocab_size=1,
    )
