"""Without a cell the graft is PEFT's prompt tuning."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from .encoders import FAMILIES, WITH_TOKEN_TYPES, P, batch_for, tiny
from .grafts import grafted, options, read_states


def peft_states(encoder: Any, prompt: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """All states `[B, P+T, H]` of PEFT's PromptTuning with the given prompt."""
    from peft import PromptTuningConfig, get_peft_model

    # of PEFT's classes only some pass token types on to a bare encoder
    task_type = "TOKEN_CLS" if "token_type_ids" in batch else "FEATURE_EXTRACTION"
    config = PromptTuningConfig(
        task_type=task_type,
        num_virtual_tokens=len(prompt),
        token_dim=prompt.shape[1],
        num_layers=encoder.config.num_hidden_layers,
        num_attention_heads=encoder.config.num_attention_heads,
        num_transformer_submodules=1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(encoder), config).eval()
    model.prompt_encoder["default"].embedding.weight.data.copy_(prompt)
    return model(**batch).last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
def test_read_states_equal_peft(family: str) -> None:
    encoder, batch = tiny(family), batch_for(family)
    prompt = torch.randn(P, encoder.get_input_embeddings().embedding_dim)
    expected = peft_states(encoder, prompt, batch)[:, P:]
    graft = grafted(encoder, options("prompt-tuning"))
    graft.adapter.prompt.start.data.copy_(prompt)
    # padding rows included
    torch.testing.assert_close(read_states(graft, batch), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", WITH_TOKEN_TYPES)
def test_token_types_of_the_text_reach_the_encoder(family: str) -> None:
    graft, batch = grafted(family, options("prompt-tuning")), batch_for(family)
    other = batch | {"token_type_ids": 1 - batch["token_type_ids"]}
    assert not torch.allclose(graft(**batch), graft(**other), atol=1e-3)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(WITH_TOKEN_TYPES)))
def test_token_types_are_left_out_where_the_encoder_takes_none(family: str) -> None:
    graft, batch = grafted(family, options("prompt-tuning")), batch_for(family)
    types = torch.ones_like(batch["input_ids"])
    assert torch.equal(graft(**batch, token_type_ids=types), graft(**batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_probe_reads_the_plain_encoder(family: str) -> None:
    encoder, batch = tiny(family), batch_for(family)
    with torch.no_grad():
        plain = encoder(**batch).last_hidden_state
    graft = grafted(encoder, options("prompt-tuning", method="linear-probe"))
    text = batch["attention_mask"] == 1  # RoBERTa gives padding in input_ids positions of its own
    torch.testing.assert_close(read_states(graft, batch)[text], plain[text], rtol=1e-5, atol=1e-5)
    assert sorted(n for n, _ in graft.adapter.named_parameters()) == [
        "head.linear.bias",
        "head.linear.weight",
    ]


def test_peft_gives_the_same_states_of_the_real_minilm(minilm: Any, minilm_tokenizer: Any) -> None:
    batch = dict(
        minilm_tokenizer([["A cup of tea.", "Is it hot?"], ["No.", ""]], padding=True, return_tensors="pt")
    )
    graft = grafted(minilm, options("prompt-tuning"), draw=False)
    start = graft.adapter.prompt.start.detach()
    graft.detach_hooks()
    expected = peft_states(minilm, start, batch)[:, P:]
    torch.testing.assert_close(read_states(graft, batch), expected, rtol=0, atol=0)
