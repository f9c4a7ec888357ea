"""The graft: adapters attached to a frozen encoder, without changes to its weights or its code.

Each row gets its lane's prompt before layer k (`adapter.first_layer`): before layer 0 through `inputs_embeds`, later
between the two halves of the encoder (see `halves`). By default, after every layer from k on but the last, and after
the last too if the head reads the prompt, a forward hook writes the next prompt state

    p_{l+1} = Cell(e_l, p_l)          h_{l+1} = [p_{l+1} ; Layer_l(h_l)[:, P:]]

(arXiv 2304.05642). The hooks need only the layer's input and output and the rows of each lane, which are
the same for all layers of a pass. No state is passed from layer to layer, so the layers can run again in
any order, as activation checkpointing does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpc_dist.adapter.families import EncoderParts, locate
from gpc_dist.adapter.foreign import classifier_output, keep_trained, miss_no_frozen
from gpc_dist.adapter.halves import LowerHalf, UpperHalf
from gpc_dist.adapter.lane import Adapter
from gpc_dist.adapter.update import read_prompt, write_prompt
from gpc_dist.config import AdapterConfig
from gpc_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gpc_dist.adapter.fingerprint import EncoderIdentity


@dataclass
class _Pass:
    """State of a pass, for the hooks."""

    lanes: Sequence[Adapter]
    rows: list[slice]
    """Rows of each lane."""
    prompt_tokens: int
    """P."""
    attention_mask: Tensor
    """Mask of the text, `[R, T]`."""
    prompts: dict[int, Tensor] = field(default_factory=dict)
    """`p_l [R, P, H]` of a layer, while it runs."""
    pooled: list[list[Tensor]] = field(init=False)
    """For each lane, the pooled text states `[R_k, H]` that entered each layer from its `read_from` on."""

    def __post_init__(self) -> None:
        self.pooled = [[] for _ in self.lanes]

    def read_of(self, layer: int) -> bool:
        return any(layer >= lane.read_from for lane in self.lanes)

    def rewrites_after(self, layer: int) -> bool:
        return any(lane.rewrites_after(layer) for lane in self.lanes)


class GraftedEncoder(nn.Module):
    """A frozen encoder with one or more adapters (lanes). With method `fine-tuning` the only adapter takes the
    encoder (`Adapter.take_encoder`) and trains it.

    Use `attach` to make one from a `transformers` model. Its `state_dict` holds the lanes and nothing of the frozen
    encoder, so that checkpoints of other trainers are small, too. The hooks act only during a pass of this object:
    called directly, or through another graft, the encoder works as before. One pass at a time runs on an encoder:
    threads must take turns.

    Args:
        lanes: the attached adapters, which run if a pass is given no others.
        first_layer: k of all lanes of all passes (`Adapter.first_layer`).
    """

    def __init__(self, parts: EncoderParts, lanes: Sequence[Adapter], first_layer: int = 0):
        super().__init__()
        self.encoder = parts.encoder
        self.token_embeddings = parts.token_embeddings
        self.parts = parts
        self.lanes = nn.ModuleList(lanes)
        self.first_layer = first_layer
        self._late = 0 < first_layer < len(parts.layers)
        self.upper = UpperHalf(parts, first_layer) if self._late else None
        """The layers from k on, if they are some of the encoder's."""
        self.head: nn.Module | None = None
        """The head of the adapter that has taken the encoder, so that all that is trained is found from here."""
        self.autocast: torch.dtype | None = None
        """dtype of the encoder's matrix products; None if it is that of the weights."""
        self._pass: _Pass | None = None
        self.identity: EncoderIdentity | None = None
        """Of the encoder, as the card of a loaded adapter names it."""
        self.task: dict[str, Any] = {}
        """What the card of a loaded adapter says of its task."""
        self.register_state_dict_post_hook(keep_trained)
        self.register_load_state_dict_post_hook(miss_no_frozen)
        self.encoder.requires_grad_(False)
        self.encoder.eval()
        self._handles = [
            handle
            for index, layer in enumerate(parts.layers)
            if index >= first_layer or first_layer == len(parts.layers)
            for handle in (
                layer.register_forward_pre_hook(partial(self._before, index)),
                layer.register_forward_hook(partial(self._after, index)),
            )
        ]

    @cached_property
    def lower(self) -> LowerHalf | None:
        """The layers below k, if they are some of the encoder's."""
        return LowerHalf(self.parts, self.first_layer) if self._late else None

    @property
    def adapters(self) -> list[Adapter]:
        """The attached adapters, in order."""
        return list(self.lanes)  # type: ignore[arg-type]

    @property
    def adapter(self) -> Adapter:
        """The attached adapter, if there is exactly one."""
        (adapter,) = self.adapters
        return adapter

    @property
    def prompt_tokens(self) -> int:
        """P of the attached adapters, see `shared_prompt_tokens`."""
        return shared_prompt_tokens(self.adapters)

    def train(self, mode: bool = True) -> GraftedEncoder:
        """As `nn.Module.train`, but the encoder stays in eval mode, without dropout."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        lane_rows: Sequence[int] | None = None,
        lanes: Sequence[Adapter] | None = None,
        text_states: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool = False,
    ) -> Any:
        """Outputs of the head for every row of a batch.

        Args:
            input_ids: text tokens `[R, T]`, padded on the right.
            attention_mask: 1 for text, 0 for padding, `[R, T]`; all ones when not given.
            token_type_ids: segment numbers `[R, T]`, for encoders that take them.
            lane_rows: rows of each lane: the batch holds the rows of the first lane, then those of the second, and
                so on. Not needed for one lane.
            lanes: adapters of this pass, on the device of the batch; the attached ones when not given.
            text_states: what `lower` gives for these tokens, `[R, T, H]`, if it was computed before; for k = L what
                `halves.PooledStates` gives, `[R, n, H]`.
            labels: classes `[R]` (whole numbers; rows with -100 do not count), or numbers to predict `[R]` (floating
                point, for a head with one output). Not with `lane_rows`.
            return_dict: give a `SequenceClassifierOutput` without labels, too.

        Returns:
            float32 `[R, outputs]`, or with `lane_rows` a list of `[R_k, outputs_k]`, one for each lane. With `labels`
            or `return_dict` a `SequenceClassifierOutput` of `transformers`: these as `logits`, and with labels the
            mean cross-entropy, or squared error, as `loss`.
        """
        if labels is not None or return_dict:
            if lane_rows is not None:
                raise ValueError("labels and return_dict are for the rows of one lane: leave lane_rows out")
            logits = self(input_ids, attention_mask, token_type_ids, lanes=lanes, text_states=text_states)
            return classifier_output(logits, labels)
        counts = [len(input_ids)] if lane_rows is None else list(lane_rows)
        lanes = self.adapters if lanes is None else lanes
        if len(counts) != len(lanes) or sum(counts) != len(input_ids) or min(counts) < 0:
            raise ValueError(
                f"lane_rows {counts} must have one count of rows for each of {len(lanes)} lanes and add "
                f"up to {len(input_ids)}"
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        edges = [sum(counts[:k]) for k in range(len(counts) + 1)]
        rows = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]
        this_pass = _Pass(lanes, rows, shared_prompt_tokens(lanes), attention_mask)
        if any(lane.first_layer != self.first_layer for lane in lanes):
            raise ValueError(f"the prompts of all lanes must enter before layer {self.first_layer}")
        if text_states is None and self.lower is not None:
            with self._cast(input_ids.device):
                text_states = self.lower(input_ids, attention_mask, token_type_ids)
        if text_states is None:
            states = self._encode(input_ids, token_type_ids, this_pass)
        elif self.upper is not None:
            states = self._encode_late(self.upper, text_states, this_pass)
        else:
            read = [lane.head(text_states[r].unbind(1)) for lane, r in zip(lanes, rows, strict=True)]
            return read[0] if lane_rows is None else read
        outputs = [
            lane.read_out(states[r], attention_mask[r], earlier)
            for lane, r, earlier in zip(lanes, rows, this_pass.pooled, strict=True)
        ]
        return outputs[0] if lane_rows is None else outputs

    def _encode(self, input_ids: Tensor, token_types: Tensor | None, this_pass: _Pass) -> Tensor:
        """States of the last layer from tokens: `[R, P+T, H]`."""
        tokens = this_pass.prompt_tokens
        self._check_length(tokens, input_ids)
        embeds, mask = self.parts.embed(input_ids), this_pass.attention_mask
        if token_types is not None:
            token_types = _pad_left(token_types, tokens, 0)
        embeds, mask = self._behind_prompts(embeds, this_pass), _pad_left(mask, tokens, 1)
        with self._running(this_pass), self._cast(embeds.device):
            return self.parts.run(embeds, mask, token_types)

    def _encode_late(self, upper: UpperHalf, text_states: Tensor, this_pass: _Pass) -> Tensor:
        """States of the last layer from text states that enter layer k: `[R, P+T, H]`."""
        self._check_length(this_pass.prompt_tokens, text_states)
        states = self._behind_prompts(text_states, this_pass)
        mask = _pad_left(this_pass.attention_mask, this_pass.prompt_tokens, 1)
        with self._running(this_pass):
            return upper(states, mask)

    def _check_length(self, prompt_tokens: int, text: Tensor) -> None:
        positions, length = self.parts.max_positions, text.shape[1]
        if positions is not None and prompt_tokens + length > positions:
            raise ValueError(
                f"{length} text tokens do not fit beside {prompt_tokens} prompt tokens: the encoder has "
                f"{positions} positions, so truncate the text to {positions - prompt_tokens}"
            )

    def _behind_prompts(self, text: Tensor, this_pass: _Pass) -> Tensor:
        """Text `[R, T, E or H]` behind the prompts of its rows' lanes, `[R, P+T, E or H]`."""
        if this_pass.prompt_tokens == 0:
            return text
        starts = [
            lane.start(r.stop - r.start) for lane, r in zip(this_pass.lanes, this_pass.rows, strict=True)
        ]
        return torch.cat([torch.cat(starts).to(text.dtype), text], dim=1)

    @contextmanager
    def _running(self, this_pass: _Pass) -> Iterator[None]:
        self._pass = this_pass
        try:
            yield
        finally:
            self._pass = None

    def _cast(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        # a pass uses each weight once: a cache of cast weights would only keep them
        return torch.autocast(device.type, self.autocast, cache_enabled=False)

    def _before(self, index: int, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Forward pre-hook of layer `index`: save the prompt state that enters it, and pool the text states."""
        if self._pass is None:
            return None
        if self._pass.read_of(index):
            text, mask = args[0][:, self._pass.prompt_tokens :], self._pass.attention_mask
            for lane, r, found in zip(self._pass.lanes, self._pass.rows, self._pass.pooled, strict=True):
                if index >= lane.read_from:
                    found.append(lane.pooled(text[r], mask[r]))
        if not self._pass.rewrites_after(index):
            return None
        states, self._pass.prompts[index] = read_prompt(args[0], self._pass.prompt_tokens)
        return states, *args[1:]

    def _after(self, index: int, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of layer `index`: put the next prompt state before the text states."""
        if self._pass is None or not self._pass.rewrites_after(index):
            return None
        lanes, rows, mask = self._pass.lanes, self._pass.rows, self._pass.attention_mask
        encoded = output[0] if isinstance(output, tuple) else output
        text = encoded.detach()[:, self._pass.prompt_tokens :]

        def rule(e: Tensor, p: Tensor) -> Tensor:
            parts = [
                lane.next_prompt(index, e[r], p[r], text[r], mask[r])
                for lane, r in zip(lanes, rows, strict=True)
            ]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        trained = [p for lane in lanes for p in lane.rewriting_parameters(index)]
        written = write_prompt(rule, encoded, self._pass.prompts.pop(index), trained)
        return (written, *output[1:]) if isinstance(output, tuple) else written

    def checkpoint_activations(self) -> None:
        """Keep only the input of each layer from k on in the forward pass and compute the layer again in the backward
        pass. The hooks are not included: they run once, so the cell is not computed twice."""
        for layer in self.parts.layers[self.first_layer :]:
            layer.forward = _recomputed(layer.forward)

    def compile_layers(self, backend: str = "inductor") -> None:
        """Compile each layer without its hooks, for any length of text; call it before `checkpoint_activations`."""
        for layer in self.parts.layers:
            layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)

    def detach_hooks(self) -> None:
        """Remove the hooks from the encoder's layers."""
        for handle in self._handles:
            handle.remove()

    def save_pretrained(self, folder: str | Path, metrics: Mapping[str, Any] | None = None) -> None:
        """Write the adapter of a single-lane encoder to `folder` (see `adapter.store`), with a model card.

        Args:
            metrics: figures for the model card, by name.

        Raises:
            UserError: the folder holds files of others.
        """
        from gpc_dist.adapter.pretrained import save_graft

        save_graft(self, Path(folder), metrics)

    def push_to_hub(
        self,
        repo_id: str,
        metrics: Mapping[str, Any] | None = None,
        private: bool | None = None,
        token: str | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes, without local paths, to a model repository of the Hugging Face Hub;
        returns its address.

        Args:
            metrics: figures for the model card, by name.
            private, token: see `hub.push_folder`.

        Raises:
            UserError: the Hub cannot be reached, or refuses.
        """
        from gpc_dist.adapter.hub import push_folder
        from gpc_dist.adapter.pretrained import save_graft

        with TemporaryDirectory(prefix="gpc-dist-") as place:
            folder = Path(place) / "adapter"
            save_graft(self, folder, metrics, repo_id)
            return push_folder(folder, repo_id, private, token)

    @classmethod
    def from_pretrained(
        cls, place: str | Path, encoder: PreTrainedModel | None = None, revision: str | None = None
    ) -> GraftedEncoder:
        """Attach a saved adapter to the encoder it was trained on.

        Args:
            place: a local folder, or an id of the Hugging Face Hub.
            encoder: loaded, float32 and on the CPU, as the adapter names it when not given.
            revision: branch, tag or commit of the adapter's Hub id.

        Raises:
            UserError: `place` has no adapter, one that belongs to another encoder, or a fine-tuned one; or the encoder
                that it names cannot be loaded.
        """
        from gpc_dist.adapter.fingerprint import identify
        from gpc_dist.adapter.pretrained import adapter_folder, load_encoder_of
        from gpc_dist.adapter.store import load_adapter

        adapter, card = load_adapter(adapter_folder(place, revision))
        refuse_training_the_encoder(card.adapter)
        files = None
        if encoder is None:
            encoder, files = load_encoder_of(card.encoder)
        parts = locate(encoder)
        card.check_encoder(identify(parts.encoder, files), parts.shape)
        device = next(parts.token_embeddings.parameters()).device
        graft = cls(parts, [adapter.to(device)], adapter.first_layer)
        graft.identity, graft.task = card.encoder, card.task
        return graft


def shared_prompt_tokens(lanes: Sequence[Adapter]) -> int:
    """P, which is the same for all lanes of a pass.

    Raises:
        ValueError: the lanes have prompts of different lengths.
    """
    lengths = {lane.prompt_tokens for lane in lanes}
    if len(lengths) > 1:
        raise ValueError(f"lanes of one pass need equal prompt lengths, not {sorted(lengths)}")
    return lengths.pop()


def refuse_training_the_encoder(config: AdapterConfig) -> None:
    """Raise `UserError` if a method trains the encoder, which no graft in a notebook does."""
    if config.trains_encoder:
        raise UserError(
            "adapter.method 'fine-tuning' has nothing to attach to a frozen encoder: use gpc-dist train, evaluate and "
            "predict, or gpc_dist.inference.adapters.Predictor"
        )


def _pad_left(x: Tensor, count: int, value: int) -> Tensor:
    return nn.functional.pad(x, (count, 0), value=value)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # nothing random runs inside a frozen encoder, so no generator state is kept
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
