"""What trainers and loops of others ask of a graft: a loss, and a state dict that is small."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers.modeling_outputs import SequenceClassifierOutput


def classifier_output(logits: Tensor, labels: Tensor | None) -> SequenceClassifierOutput:
    """What the models of `transformers` for classification give."""
    from transformers.modeling_outputs import SequenceClassifierOutput

    loss: Any = None
    if labels is not None and labels.is_floating_point():
        if logits.shape[1] != 1:
            raise ValueError(
                f"labels that are no whole numbers need a head with one output, not {logits.shape[1]}"
            )
        loss = nn.functional.mse_loss(logits.squeeze(1), labels.to(logits.dtype))
    elif labels is not None:
        loss = nn.functional.cross_entropy(logits, labels)
    return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]


_TRAINED = "lanes."
"""Begins the names of what a state dict of a graft holds."""


def keep_trained(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
    """Leave what is frozen out of a state dict."""
    for name in list(state):
        if name.startswith(prefix) and not name.startswith(prefix + _TRAINED):
            del state[name]


def miss_no_frozen(graft: nn.Module, incompatible: Any) -> None:
    """Let a state dict lack what `keep_trained` leaves out."""
    named = [*graft.named_parameters(remove_duplicate=False), *graft.named_buffers(remove_duplicate=False)]
    frozen = tuple(name for name, _ in named if not name.startswith(_TRAINED))
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not name.endswith(frozen)]
