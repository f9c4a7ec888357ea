"""Which encoders hold a prompt, and what a user is told about those that do not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from gpc_dist.adapter import AdapterConfig, attach
from gpc_dist.adapter.families import REFUSED, TESTED, locate, probe
from gpc_dist.errors import UserError

from .encoders import FAMILIES, POSITIONS, H, L, P, batch, batch_for, tiny, tiny_config
from .grafts import grafted, options, read_states

_BART: dict[str, Any] = {
    "d_model": H,
    "encoder_layers": L,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
UNTESTED: dict[str, dict[str, Any]] = {
    "bart": _BART,
    "camembert": {},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    "ernie": {},
    "eurobert": {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3},
    "longt5": {"d_model": H, "num_layers": L, "num_heads": 4, "d_kv": 8, "d_ff": 48},
    "megatron-bert": {},
    "mpnet": {},
    "nomic_bert": {},
    "rembert": {"input_embedding_size": 16},
    "roformer": {"embedding_size": 16},
}
"""Families this project does not promise, which keep to the rule."""


def test_the_families_of_this_suite_are_those_called_tested() -> None:
    assert set(FAMILIES) == TESTED
    assert not TESTED & REFUSED.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tested_family_would_pass_the_probe(family: str) -> None:
    parts = locate(tiny(family))
    if family == "deberta-v2":  # its convolution stands between two layers; its own tests show that it works
        with pytest.raises(UserError, match="what a layer gives is not what the next one gets"):
            probe(parts)
    else:
        probe(parts)


@pytest.mark.parametrize("family", UNTESTED)
@torch.no_grad()
def test_an_untested_family_that_keeps_to_the_rule_holds_a_prompt(family: str) -> None:
    encoder = tiny(family, **UNTESTED[family]).train()  # dropout on, as a new model has it
    graft = grafted(encoder, options("gated"))
    assert (graft.parts.shape.layers, graft.parts.shape.hidden_size) == (L, H)
    rows = batch()
    together = graft(**rows)
    for row, length in enumerate((11, 7, 3)):
        alone = graft(**{name: x[row : row + 1, :length] for name, x in rows.items()})
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)
    residual, plain = (grafted(encoder, options(m), draw=False) for m in ("residual", "prompt-tuning"))
    assert torch.equal(residual(**rows), plain(**rows))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_probe_works_in_the_encoders_dtype(dtype: torch.dtype) -> None:
    probe(locate(tiny("mpnet").to(dtype)))


PROMPTLESS = {
    "big_bird": "pads the sequence to whole blocks",
    "canine": "downsamples characters",
    "fnet": "has no attention mask",
    "funnel": "pools the sequence between blocks",
    "longformer": "needs global positions of its own",
    "perceiver": "latents hold no prompt",
    "reformer": "hashed attention",
    "xlnet": "two streams of states",
}


@pytest.mark.parametrize("family", sorted(PROMPTLESS.keys() | REFUSED.keys()))
def test_a_family_that_cannot_hold_a_prompt_is_refused_with_the_reason(family: str) -> None:
    config = transformers.CONFIG_MAPPING[family]()  # the name is one of transformers'
    with pytest.raises(
        UserError, match=f"encoder family '{family}' cannot hold a prompt: .*{PROMPTLESS[family]}"
    ):
        attach(SimpleNamespace(config=config))


GPT2 = {"vocab_size": 101, "n_embd": H, "n_layer": L, "n_head": 4, "bos_token_id": 2, "eos_token_id": 3}
LLAMA = {"num_key_value_heads": 4, "pad_token_id": 0}
SQUEEZE = {"embedding_size": H} | dict.fromkeys(
    ["q_groups", "k_groups", "v_groups", "post_attention_groups", "intermediate_groups", "output_groups"], 1
)
UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "gpt2": (GPT2, "reads from left to right only"),
    "llama": (LLAMA, "reads from left to right only"),
    "convbert": ({"embedding_size": 16}, "padding changes its result"),
    "mobilebert": ({"embedding_size": H, "intra_bottleneck_size": 16}, "padding changes its result"),
    "squeezebert": (SQUEEZE, "its layers do not run once each, in order"),
    "xlm": ({"emb_dim": H, "n_layers": L, "n_heads": 4}, "what a layer gives is not what the next one gets"),
    "ibert": ({}, "its token embeddings are no plain table"),
}


@pytest.mark.parametrize("family", UNFIT)
def test_an_untested_family_that_breaks_the_rule_is_refused_with_the_reason(family: str) -> None:
    sizes, reason = UNFIT[family]
    encoder = transformers.AutoModel.from_config(tiny_config(family, **sizes))
    with pytest.raises(UserError, match=f"encoder family '{encoder.config.model_type}' cannot .*{reason}"):
        attach(encoder)


class Toy(nn.Module):
    """An encoder that keeps to the rule; its subclasses break it in one way each."""

    config = SimpleNamespace(model_type="toy", is_encoder_decoder=False, num_hidden_layers=L, hidden_size=H)

    def __init__(self) -> None:
        super().__init__()
        self.base_model = SimpleNamespace()
        self.__dict__["base_model"] = self  # as PreTrainedModel has it
        self.words = nn.Embedding(101, H)
        self.layers = nn.ModuleList(nn.Linear(H, H) for _ in range(L))

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Any:
        states = inputs_embeds
        for layer in self.layers:
            weight = attention_mask[:, :, None] / attention_mask.sum(1)[:, None, None]
            states = layer(states + (states * weight).sum(1, keepdim=True))
        return SimpleNamespace(last_hidden_state=states)


class NoStack(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.layers = self.layers[:2]


class OnlyIds(Toy):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:  # type: ignore[override]
        return super().forward(self.words(input_ids), attention_mask)


class Fails(Toy):
    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Any:
        raise RuntimeError("language unknown")


class Folded(Toy):
    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Any:
        output = super().forward(inputs_embeds.flatten(0, 1)[None], attention_mask.flatten()[None])
        return SimpleNamespace(
            last_hidden_state=output.last_hidden_state.unflatten(1, attention_mask.shape)[0]
        )


class ByKeyword(Toy):
    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Any:
        for layer in self.layers:
            inputs_embeds = layer(input=inputs_embeds)
        return SimpleNamespace(last_hidden_state=inputs_embeds)


@pytest.mark.parametrize(
    ("toy", "reason"),
    [
        (NoStack, "no stack of num_hidden_layers equal layers"),
        (OnlyIds, "it takes no inputs_embeds"),
        (Fails, r"a forward pass from inputs_embeds fails \(language unknown\)"),
        (Folded, r"its layers do not pass the hidden states \[B, T, H\]"),
        (ByKeyword, r"its layers do not pass the hidden states \[B, T, H\]"),
        (Toy, "what a layer gives is not what the next one gets"),
    ],
)
def test_each_part_of_the_rule_is_checked(toy: type[Toy], reason: str) -> None:
    with pytest.raises(UserError, match=f"encoder family 'toy' cannot .*{reason}"):
        attach(toy())  # type: ignore[arg-type]


def test_a_model_without_a_number_of_layers_is_refused() -> None:
    model = Toy()
    model.config = SimpleNamespace(model_type="toy", is_encoder_decoder=False)
    with pytest.raises(UserError, match="no stack of num_hidden_layers equal layers"):
        attach(model)  # type: ignore[arg-type]


def test_a_probe_leaves_no_hook_behind_and_the_callers_generator_alone() -> None:
    parts = locate(tiny("mpnet"))
    state = torch.get_rng_state()
    probe(parts)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(layer._forward_hooks for layer in parts.layers)
    failing = locate(Fails())
    with pytest.raises(UserError, match="language unknown"):
        probe(failing)
    assert not any(layer._forward_hooks for layer in failing.layers)


# -- positions -------------------------------------------------------------------------------------------

MAX_POSITIONS = {
    **dict.fromkeys(["albert", "bert", "distilbert", "electra"], POSITIONS),
    **dict.fromkeys(["roberta", "xlm-roberta", "xlm-roberta-xl"], POSITIONS - 2),
    **dict.fromkeys(["deberta-v2", "modernbert", "mt5", "t5", "umt5"], None),
    **dict.fromkeys(["roformer", "ernie", "bart"], POSITIONS),
    "mpnet": POSITIONS - 2,
}


@pytest.mark.parametrize("family", MAX_POSITIONS)
@torch.no_grad()
def test_text_fills_the_positions_exactly(family: str) -> None:
    graft = grafted(tiny(family, **UNTESTED.get(family, {})), options("residual"))
    room = MAX_POSITIONS[family]
    assert graft.parts.max_positions == room
    longest = (room or 2 * POSITIONS) - P
    assert graft(**batch(lengths=(longest, 5))).isfinite().all()
    if room is not None:
        with pytest.raises(
            ValueError, match=f"encoder has {room} positions, so truncate the text to {longest}"
        ):
            graft(**batch(lengths=(longest + 1, 5)))


def test_deberta_with_absolute_positions_counts_them() -> None:
    assert locate(tiny("deberta-v2", position_biased_input=True)).max_positions == POSITIONS


@pytest.mark.parametrize(("family", "room"), [("bert", 64), ("roberta", 62)])
def test_a_prompt_that_leaves_no_room_is_refused(family: str, room: int) -> None:
    with pytest.raises(UserError, match=f"prompt_tokens {room} leaves no room for text.* {room} positions"):
        attach(tiny(family), AdapterConfig(prompt_tokens=room))
    attach(tiny(family), AdapterConfig(prompt_tokens=room - 1))
    attach(tiny(family), AdapterConfig(prompt_tokens=room, method="linear-probe"))


# -- what may be handed over -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["albert", "bert", "deberta-v2", "distilbert", "modernbert", "roberta"])
def test_a_model_with_a_task_head_is_taken_for_its_encoder(family: str) -> None:
    whole = transformers.AutoModelForSequenceClassification.from_config(tiny_config(family)).eval()
    graft = grafted(whole, options("gated"))
    assert graft.encoder is whole.base_model
    assert read_states(graft, batch_for(family)).shape == (3, 11, H)
