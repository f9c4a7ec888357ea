"""The recursion once more, without hooks and without the graft's code.

`run_layers` calls an encoder's own layers one by one. `bert` and `t5` use nothing of transformers but
the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NextPrompt = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""`(layer, e_l, p_l, text states after the layer) -> p_{l+1}`"""
Weights = dict[str, Tensor]


def keep(layer: int, encoded: Tensor, previous: Tensor, text: Tensor) -> Tensor:
    """Prompt tuning: the encoded prompt goes on as it is."""
    return encoded


def padded_left(x: Tensor, count: int, value: int) -> Tensor:
    return torch.cat([x.new_full((len(x), count), value), x], dim=1)


def with_prompt(encoder: Any, start: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch as `inputs_embeds` that hold the prompt."""
    embeds = encoder.get_input_embeddings()(batch["input_ids"])
    made = {
        "inputs_embeds": torch.cat([start.expand(len(embeds), -1, -1), embeds], dim=1),
        "attention_mask": padded_left(batch["attention_mask"], len(start), 1),
    }
    if "token_type_ids" in batch:
        made["token_type_ids"] = padded_left(batch["token_type_ids"], len(start), 0)
    return made


def behind(start: Tensor, states: Tensor) -> Tensor:
    """Text states `[B, T, H]` behind the prompt that enters with them."""
    return torch.cat([start.expand(len(states), -1, -1), states], dim=1)


def write(states: Tensor, previous: Tensor, layer: int, tokens: int, next_prompt: NextPrompt) -> Tensor:
    prompt = next_prompt(layer, states[:, :tokens], previous[:, :tokens], states[:, tokens:])
    return torch.cat([prompt, states[:, tokens:]], dim=1)


# -- the encoder's own layers, one by one --------------------------------------------------------------


def _layer_calls(
    encoder: Any, inputs: dict[str, Any]
) -> list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """Every call of a layer in a plain pass: what a layer is given beside the hidden states (masks,
    position biases, rotary angles) does not depend on them."""
    stacks = {
        "albert": lambda: encoder.encoder.albert_layer_groups,
        "distilbert": lambda: encoder.transformer.layer,
        "modernbert": lambda: encoder.layers,
        **dict.fromkeys(("t5", "mt5", "umt5"), lambda: encoder.encoder.block),
    }
    layers = stacks.get(encoder.config.model_type, lambda: encoder.encoder.layer)()
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((module, args, kwargs))

    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    encoder(**inputs)
    for handle in handles:
        handle.remove()
    return calls


def run_layers(encoder: Any, inputs: dict[str, Any], tokens: int, next_prompt: NextPrompt) -> Tensor:
    """Last hidden states `[B, P+T, H]` from `inputs` that hold the prompt already."""

    def written(states: Tensor, previous: Tensor, index: int) -> Tensor:
        return write(states, previous, index, tokens, next_prompt)

    calls = _layer_calls(encoder, inputs)
    return _run(encoder, calls, range(len(calls)), calls[0][1][0], inputs["attention_mask"], written)


def run_layers_late(
    encoder: Any, batch: dict[str, Tensor], start: Tensor, first: int, next_prompt: NextPrompt
) -> Tensor:
    """Last hidden states `[B, P+T, H]` of an encoder that runs the text alone, and gets a prompt `start [P, H]` before
    layer `first`."""
    tokens = len(start)
    width = encoder.get_input_embeddings().embedding_dim
    below = _layer_calls(encoder, with_prompt(encoder, start.new_empty(0, width), batch))
    text = _run(
        encoder, below, range(first), below[0][1][0], batch["attention_mask"], lambda states, *_: states
    )

    def written(states: Tensor, previous: Tensor, index: int) -> Tensor:
        return write(states, previous, index, tokens, next_prompt)

    # of these calls only the masks, biases and angles are used, which are those of P+T positions
    inputs = with_prompt(encoder, torch.zeros(tokens, width, dtype=text.dtype), batch)
    above = _layer_calls(encoder, inputs)
    layers = range(first, len(above))
    return _run(encoder, above, layers, behind(start, text), inputs["attention_mask"], written)


def _run(
    encoder: Any,
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]],
    layers: range,
    entering: Tensor,
    mask: Tensor,
    written: Callable[[Tensor, Tensor, int], Tensor],
) -> Tensor:
    """States after some of the layers, and after the encoder's last norm if they include the last one."""
    family = encoder.config.model_type
    states = entering
    for index in layers:
        layer, args, kwargs = calls[index]
        previous = states
        output = layer(states, *args[1:], **kwargs)
        states = written(output[0] if isinstance(output, tuple) else output, previous, index)
        if family == "deberta-v2" and index == 0:
            states = encoder.encoder.conv(entering, states, mask)
    if layers.stop < len(calls):
        return states
    final = {
        "modernbert": lambda: encoder.final_norm,
        "xlm-roberta-xl": lambda: encoder.encoder.LayerNorm,
        **dict.fromkeys(("t5", "mt5", "umt5"), lambda: encoder.encoder.final_layer_norm),
    }
    return final[family]()(states) if family in final else states


# -- BERT and T5 from their weights --------------------------------------------------------------------


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor, scale: float) -> Tensor:
    """`[B, T, H]` queries, keys and values; `bias` is added to the scores `[B, heads, T, T]`."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(-1, -2)) * scale + bias
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def _mask_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(mask[:, None, None, :] == 1, 0.0, -math.inf).to(dtype)


def bert(
    w: Weights,
    start: Tensor,
    ids: Tensor,
    mask: Tensor,
    types: Tensor,
    next_prompt: NextPrompt,
    heads: int = 4,
    first: int = 0,
) -> Tensor:
    """Last states `[B, P+T, H]` of a BERT with the weights `w`, given a prompt `start [P, H]` before layer `first`."""
    tokens = len(start)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    words = w["embeddings.word_embeddings.weight"][ids]
    if first == 0:
        words, types, mask = behind(start, words), padded_left(types, tokens, 0), padded_left(mask, tokens, 1)
    segments = w["embeddings.token_type_embeddings.weight"][types]
    places = w["embeddings.position_embeddings.weight"][: words.shape[1]]
    x = norm(words + segments + places, "embeddings.LayerNorm")
    layers = 1 + max(int(name.split(".")[2]) for name in w if name.startswith("encoder.layer."))
    for index in range(layers):
        if index == first > 0:
            x, mask = behind(start, x), padded_left(mask, tokens, 1)
        bias = _mask_bias(mask, x.dtype)
        before, name = x, f"encoder.layer.{index}"
        q, k, v = (linear(x, f"{name}.attention.self.{part}") for part in ("query", "key", "value"))
        mixed = _attention(q, k, v, heads, bias, (x.shape[-1] // heads) ** -0.5)
        x = norm(linear(mixed, f"{name}.attention.output.dense") + x, f"{name}.attention.output.LayerNorm")
        inner = F.gelu(linear(x, f"{name}.intermediate.dense"))
        x = norm(linear(inner, f"{name}.output.dense") + x, f"{name}.output.LayerNorm")
        if index >= first:
            x = write(x, before, index, tokens, next_prompt)
    return x


def t5(
    w: Weights,
    start: Tensor,
    ids: Tensor,
    mask: Tensor,
    next_prompt: NextPrompt,
    heads: int = 4,
    buckets: int = 8,
    max_distance: int = 16,
    first: int = 0,
) -> Tensor:
    """Last states `[B, P+T, H]` of a T5 encoder with the weights `w`, given a prompt `start [P, H]` before layer
    `first`."""
    tokens = len(start)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    def bucket(distance: int) -> int:
        """Half of the buckets for keys on the right; of a half, half are exact and half logarithmic."""
        half = buckets // 2
        side, far = (half if distance > 0 else 0), abs(distance)
        if far < half // 2:
            return side + far
        ratio = math.log(far / (half // 2)) / math.log(max_distance / (half // 2))
        return side + min(half // 2 + int(ratio * (half - half // 2)), half - 1)

    def bias_of(mask: Tensor) -> Tensor:
        length = mask.shape[1]
        table = torch.tensor([[bucket(key - query) for key in range(length)] for query in range(length)])
        name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        return w[name][table].permute(2, 0, 1) + _mask_bias(mask, x.dtype)

    x = w["shared.weight"][ids]
    layers = 1 + max(int(n.split(".")[2]) for n in w if n.startswith("encoder.block."))
    for index in range(layers):
        if index == first:
            x, mask = behind(start, x), padded_left(mask, tokens, 1)
        bias = bias_of(mask)
        before, name = x, f"encoder.block.{index}.layer"
        normed = norm(x, f"{name}.0.layer_norm")
        q, k, v = (normed @ w[f"{name}.0.SelfAttention.{part}.weight"].T for part in "qkv")
        x = x + _attention(q, k, v, heads, bias, 1.0) @ w[f"{name}.0.SelfAttention.o.weight"].T
        inner = norm(x, f"{name}.1.layer_norm") @ w[f"{name}.1.DenseReluDense.wi.weight"].T
        x = x + inner.relu() @ w[f"{name}.1.DenseReluDense.wo.weight"].T
        if index >= first:
            x = write(x, before, index, tokens, next_prompt)
    return norm(x, "encoder.final_layer_norm")


# -- prompts and cells by their formulas ---------------------------------------------------------------


def prompt_made_of(trained: Tensor, w: Weights) -> Tensor:
    """With `adapter.prompt_mlp`, `x + W_2 tanh(W_1 x + b_1) + b_2`."""
    if "prompt.mlp.0.weight" not in w:
        return trained
    inner = torch.tanh(trained @ w["prompt.mlp.0.weight"].T + w["prompt.mlp.0.bias"])
    return trained + inner @ w["prompt.mlp.2.weight"].T + w["prompt.mlp.2.bias"]


def start_of(adapter: Any) -> Tensor:
    """The prompt that enters its first layer, `[P, E or H]`."""
    w = dict(adapter.named_parameters())
    return prompt_made_of(w["prompt.start"], w)


def cell_rule(adapter: Any, mask: Tensor, weights: Weights | None = None) -> NextPrompt:
    """What an adapter's configuration says, computed from its tensors with plain operations.

    `mask` is that of the text, `[B, T]`.
    """
    w = weights if weights is not None else dict(adapter.named_parameters())
    config = adapter.config

    def size(x: Tensor) -> Tensor:
        return x.square().mean(-1, keepdim=True).sqrt()

    def unit(x: Tensor, name: str) -> Tensor:
        if f"{name}.0.weight" not in w:
            assert config.cell_units not in ("both", name.rpartition(".")[2])
            return torch.zeros_like(x)
        x = x @ w[f"{name}.0.weight"].T
        return x if config.cell_rank is None else x @ w[f"{name}.1.weight"].T

    def rule(layer: int, e: Tensor, p: Tensor, text: Tensor) -> Tensor:
        if config.method == "gpc" and layer not in (config.cell_layers or range(99)):
            return e
        if layer == adapter.shape.layers - 1 and (config.method != "gpc" or config.pooling != "prompt"):
            return e
        written = unscaled(layer, e, p)
        if config.method == "gpc" and config.cell_norm:
            written = size(e) * unscaled(layer, e / size(e), p / size(p))
        if config.method != "gpc" or config.cell_scale == "none":
            return written
        if config.cell_scale == "prompt":
            return written / size(written) * size(e)
        sizes = size(text.detach()).squeeze(-1)
        mean = torch.stack([row[there == 1].mean() for row, there in zip(sizes, mask, strict=True)])
        return written / size(written) * mean[:, None, None]

    def unscaled(layer: int, e: Tensor, p: Tensor) -> Tensor:
        if config.method == "prompt-tuning":
            return e
        if config.method == "deep-prompt":
            fresh = prompt_made_of(w["prompt.deep"][layer - config.first_layer], w)
            return fresh.expand(len(e), -1, -1)
        place = config.cell_layers.index(layer) if config.cell_layers else layer - config.first_layer
        cell = f"cell.{place if config.cell_per_layer else 0}"
        remembered, forgotten = unit(e, f"{cell}.remember"), unit(p, f"{cell}.forget")
        if config.cell == "recurrent":
            return torch.tanh(remembered + forgotten + w[f"{cell}.bias"])
        if config.cell == "gated":
            gate = 1 / (1 + torch.exp(-(remembered + forgotten + w[f"{cell}.bias"])))
            return gate * p + (1 - gate) * e
        return e + remembered - forgotten

    return rule
