"""An encoder in two halves: the layers below k run on the text alone, those from k on run on prompt and text.

The text states that enter layer k depend on nothing that is trained, so no gradient goes through the lower half, and
they can be computed once and kept (Liu et al. 2022, arXiv 2210.11292, put the prompt in between for a shorter way from
the loss to it). Both halves run the encoder's own code on the encoder's own layers: masks, relative biases and rotary
angles are made for the rows that a half is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gpc_dist.adapter.families import EncoderParts
from gpc_dist.adapter.head import pooled
from gpc_dist.errors import UserError


class LowerHalf:
    """Layers 0 to k-1 of an encoder, 0 < k < L, which run on the text alone and without gradients."""

    def __init__(self, parts: EncoderParts, first_layer: int):
        below = list(parts.layers[:first_layer])
        self._tap = _Tap(parts.layers[first_layer], below[-1])
        self.parts, _ = _with_layers(parts, [*below, self._tap])
        """The encoder without the other layers."""

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """The text states that enter layer k, `[R, T, H]` in the encoder's dtype.

        Args:
            input_ids, attention_mask, token_type_ids: as of a `GraftedEncoder`.
        """
        with self._tap.open() as states:
            self.parts.run(self.parts.embed(input_ids), attention_mask, token_type_ids)
        return states[0]


class PooledStates:
    """A whole encoder as a head reads it that is trained alone: pooled text states, without gradients.

    Args:
        read_from: the first layer whose incoming states are pooled; L for those after the last layer alone.
    """

    def __init__(self, parts: EncoderParts, pooling: Literal["mean", "first"], read_from: int):
        self.parts, self._pooling = parts, pooling
        self._read = parts.layers[read_from:]

    @property
    def count(self) -> int:
        """n, the number of pooled states of a row."""
        return len(self._read) + 1

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """The pooled states that entered each layer, and those after the last one, float32 `[R, n, H]`."""
        found: list[Tensor] = []

        def pool(_: nn.Module | None, args: tuple[Any, ...]) -> None:
            found.append(pooled(args[0], attention_mask, self._pooling))

        with ExitStack() as hooks:
            for layer in self._read:
                hooks.callback(layer.register_forward_pre_hook(pool).remove)
            pool(None, (self.parts.run(self.parts.embed(input_ids), attention_mask, token_type_ids),))
        return torch.stack(found, dim=1)


class UpperHalf:
    """Layers k to L-1 of an encoder, from states that enter layer k > 0. The encoder's layer k is changed (see
    `private.transformers.share_bottom_bias`)."""

    def __init__(self, parts: EncoderParts, first_layer: int):
        from gpc_dist.private.transformers import leave_out_bottom, share_bottom_bias

        first = parts.layers[first_layer]
        share_bottom_bias(parts.layers[0], first)
        self.parts, stack = _with_layers(parts, list(parts.layers[first_layer:]))
        """The encoder without the other layers."""
        leave_out_bottom(stack)

    def __call__(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """States of the last layer, `[R, S, H]`.

        Args:
            states: enter layer k, `[R, S, H]`.
            attention_mask: 1 where one may be attended to, `[R, S]`.
        """
        # the encoder makes its masks, biases and angles for embeddings of this size, whatever their values
        embeds = states.new_zeros(1, 1, self.parts.shape.embedding_size).expand(*states.shape[:2], -1)

        def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return states, *args[1:]

        # before all other hooks, which then see these states
        handle = self.parts.layers[0].register_forward_pre_hook(enter, prepend=True)
        try:
            return self.parts.run(embeds, attention_mask)
        finally:
            handle.remove()


@torch.no_grad()
def check_halves(parts: EncoderParts, first_layer: int) -> None:
    """Check with a toy batch that an untested encoder gives in two halves what it gives as a whole.

    Raises:
        UserError: it does not; names the family.
    """
    if not 0 < first_layer < len(parts.layers):
        return
    ids = torch.arange(16, device=parts.token_embeddings.weight.device).view(2, 8)  # type: ignore[arg-type]
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    expected = parts.run(parts.embed(ids), mask)
    try:
        lower, upper = LowerHalf(parts, first_layer), UpperHalf(parts, first_layer)
        states = lower(ids, mask)
        lower(ids + 1, mask)  # states may have been computed long ago: nothing else may reach the upper half
        found = upper(states, mask)
    except Exception as error:
        found, reason = None, str(error)
    else:
        reason = "its upper layers do not give by themselves what they give in the whole"
    close = 1e-5 * float(expected.float().abs().max()) if expected.dtype == torch.float32 else 1e-2
    if found is None or float((found - expected)[mask == 1].abs().max()) > close:
        family = parts.encoder.config.model_type  # type: ignore[union-attr]
        raise UserError(
            f"encoder family '{family}' cannot take a prompt before a later layer ({reason}): use adapter.first_layer 0"
        )


def _with_layers(parts: EncoderParts, layers: Sequence[nn.Module]) -> tuple[EncoderParts, Any]:
    """The encoder with other layers and everything else in common, and the owner of the list of its layers."""
    from gpc_dist.private.torch import with_own_children
    from gpc_dist.private.transformers import fit_stack

    path = next(name for name, module in parts.encoder.named_modules() if module is parts.layers)
    *owners, last = path.split(".")
    encoder: Any = with_own_children(parts.encoder)
    stack = encoder
    for name in owners:
        child = with_own_children(getattr(stack, name))
        setattr(stack, name, child)
        stack = child
    listed = nn.ModuleList(layers)
    setattr(stack, last, listed)
    fit_stack(stack, len(listed))
    return replace(parts, encoder=encoder, layers=listed), stack


class _Tap(nn.Module):
    """Stands for layer k behind the lower half, and hands out the states that enter it.

    Args:
        layer: layer k, of which an encoder may read attributes.
        below: the layer before it, which returns in the form that the encoder expects.
    """

    def __init__(self, layer: nn.Module, below: nn.Module):
        super().__init__()
        self._others = (layer, below)  # in a tuple, because they must not become submodules
        self._entered: list[Tensor] = []
        self._returned: tuple[Any, ...] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_others"][0], name)

    @contextmanager
    def open(self) -> Iterator[list[Tensor]]:
        """A list that has the states when one pass has been made in the block."""

        def note(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            self._returned = output[1:] if isinstance(output, tuple) else None

        handle = self._others[1].register_forward_hook(note)
        self._entered = []
        try:
            yield self._entered
        finally:
            handle.remove()
            self._entered, self._returned = [], None

    def forward(self, states: Tensor, *_: Any, **__: Any) -> Any:
        self._entered.append(states)
        return states if self._returned is None else (states, *self._returned)
