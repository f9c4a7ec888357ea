"""Finds the layers of an encoder; lists the encoder families that are tested or refused.

The rule: in the encoder (the encoder half of an encoder-decoder model), the outermost
`nn.ModuleList` whose length is the configuration's `num_hidden_layers` and whose modules are of one
class is the layer stack. Each layer must take the hidden states `[B, T, H]` as its first positional
argument and return them, alone or as a tuple's first item, for the next layer, and the encoder must take
`inputs_embeds` and mask the padding in `attention_mask`. This project's tests check this for the families
in `TESTED`; any other encoder is probed with a toy batch when the adapter is attached, and refused with the
reason if it breaks the rule.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gpc_dist.adapter.lane import EncoderShape
from gpc_dist.errors import UserError

TESTED = frozenset(
    "albert bert deberta-v2 distilbert electra modernbert mt5 roberta t5 umt5 xlm-roberta xlm-roberta-xl".split()
)

REFUSED = {
    "big_bird": "its block-sparse attention pads the sequence to whole blocks, prompt included",
    "canine": "it downsamples characters, so prompt positions do not survive its layers",
    "fnet": "it has no attention mask: padding would change the result",
    "funnel": "it pools the sequence between blocks, so prompt positions do not survive",
    "longformer": "its windowed attention pads the sequence and needs global positions of its own",
    "perceiver": "its latents hold no prompt positions",
    "reformer": "its hashed attention keeps no fixed prompt positions",
    "xlnet": "it runs two streams of states and has no single prompt state",
}


@dataclass(frozen=True)
class EncoderParts:
    """The parts of an encoder that the graft uses."""

    encoder: nn.Module
    """The module to call with `inputs_embeds`: the model itself, or its encoder half."""
    token_embeddings: nn.Module
    """Token ids `[..]` -> embeddings `[.., E]`."""
    layers: nn.ModuleList
    """The L layers, in the order in which they run."""
    shape: EncoderShape
    max_positions: int | None
    """Longest P+T that the position embeddings allow; None for relative positions."""
    takes_token_types: bool

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embeddings `[.., E]` of token ids, on their device, wherever the table lies."""
        table: Any = self.token_embeddings.weight
        return self.token_embeddings(input_ids.to(table.device)).to(input_ids.device)

    def run(self, embeds: Tensor, attention_mask: Tensor, token_types: Tensor | None = None) -> Tensor:
        """States of the last layer, `[R, S, H]`, from `inputs_embeds [R, S, E]`."""
        extra = {}
        if token_types is not None and self.takes_token_types:
            extra["token_type_ids"] = token_types
        return self.encoder(inputs_embeds=embeds, attention_mask=attention_mask, **extra).last_hidden_state


def locate(model: Any) -> EncoderParts:
    """Find the parts of a `transformers` encoder.

    An ALBERT-like encoder that runs fewer modules than layers is unrolled in place: every layer gets
    a module of its own that shares the weights, so that each layer can have its own hooks.

    Raises:
        UserError: the family is refused, or the encoder has no layer stack, no `inputs_embeds` or no token table.
    """
    config = model.config
    family = config.model_type
    if family in REFUSED:
        raise UserError(f"encoder family '{family}' cannot hold a prompt: {REFUSED[family]}")
    encoder: Any = model.base_model
    if hasattr(encoder, "decoder"):  # not is_encoder_decoder, which is false for T5's encoder half
        encoder = encoder.get_encoder()
    if family == "albert":
        from gpc_dist.private.transformers import unroll_albert

        unroll_albert(encoder)
    layers = _layer_stack(encoder, getattr(config, "num_hidden_layers", 0))
    if layers is None:
        raise UserError(
            f"encoder family '{family}' cannot be used: no stack of num_hidden_layers equal layers was "
            "found in it (see gpc_dist/adapter/families.py for the rule)"
        )
    parameters = inspect.signature(encoder.forward).parameters
    if "inputs_embeds" not in parameters:
        raise UserError(f"encoder family '{family}' cannot be used: it takes no inputs_embeds")
    embeddings = encoder.get_input_embeddings()
    if not isinstance(embeddings, nn.Embedding):
        raise UserError(f"encoder family '{family}' cannot be used: its token embeddings are no plain table")
    return EncoderParts(
        encoder=encoder,
        token_embeddings=embeddings,
        layers=layers,
        shape=EncoderShape(len(layers), config.hidden_size, embeddings.embedding_dim),
        max_positions=_max_positions(encoder),
        takes_token_types="token_type_ids" in parameters,
    )


def _layer_stack(encoder: nn.Module, count: int) -> nn.ModuleList | None:
    for module in encoder.modules():  # outermost first
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == count
            and len({type(layer) for layer in module}) == 1
        ):
            return module
    return None


def _max_positions(encoder: nn.Module) -> int | None:
    """Usable rows of the table of absolute positions; None without such a table."""
    config: Any = encoder.config
    for name, module in encoder.named_modules():
        table = name.rsplit(".", 1)[-1] in ("position_embeddings", "embed_positions")
        if table and isinstance(module, nn.Embedding):
            # RoBERTa counts positions from padding_idx + 1; tables of others may have more rows than positions
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            return min(module.num_embeddings - offset, config.max_position_embeddings)
    return None


@torch.no_grad()
def probe(parts: EncoderParts) -> None:
    """Check with a toy batch that an untested encoder obeys the rule in this module's docstring.

    Raises:
        UserError: the encoder breaks the rule; names the family and the first violation.
    """
    encoder: Any = parts.encoder.eval()  # dropout would look like an effect of padding
    family = encoder.config.model_type
    parameter = next(encoder.parameters())
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 8, parts.shape.embedding_size, generator=generator)
    states = states.to(parameter.device, parameter.dtype)
    calls: list[tuple[int, Any, Any]] = []

    def record(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            calls.append((index, args[0] if args else None, first))

        return hook

    def run(x: Tensor, length: int) -> Tensor:
        mask = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
        mask[:, :length] = 1
        return encoder(inputs_embeds=x, attention_mask=mask).last_hidden_state[:, :length].float()

    def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
        return torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(a.abs().max()))

    def refuse(reason: str) -> UserError:
        return UserError(f"encoder family '{family}' cannot hold a prompt: {reason}")

    handles = [layer.register_forward_hook(record(i)) for i, layer in enumerate(parts.layers)]
    try:
        reference = run(states, 8)
    except Exception as error:
        raise refuse(f"a forward pass from inputs_embeds fails ({error})") from None
    finally:
        for handle in handles:
            handle.remove()
    if [index for index, _, _ in calls] != list(range(len(parts.layers))):
        raise refuse("its layers do not run once each, in order")
    size = (*states.shape[:2], parts.shape.hidden_size)
    if not all(isinstance(t, Tensor) and t.shape == size for _, *both in calls for t in both):
        raise refuse("its layers do not pass the hidden states [B, T, H] as first argument and result")
    if not all(torch.equal(a[2], b[1]) for a, b in pairwise(calls)):
        raise refuse("what a layer gives is not what the next one gets")
    padded = torch.cat([states, -states], dim=1)
    if not close(run(padded, 8), reference, 1e-4 if parameter.dtype == torch.float32 else 1e-2):
        raise refuse("padding changes its result")
    changed = torch.cat([states[:, :4], -states[:, 4:]], dim=1)
    if close(run(changed, 8)[:, 0], reference[:, 0], 1e-6):
        raise refuse("it reads from left to right only, so it is not an encoder")
