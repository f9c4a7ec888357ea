"""Memory and FLOPs of a pass, by a dry run: the program's own code on tensors that have sizes and no values.

The encoder's skeleton and an adapter run forward and backward under PyTorch's fake tensors. Every storage that an
operator allocates is counted until it is freed, and every matrix product by its FLOPs. So the planner knows each
family of encoders as the code runs it, attention kernels, prompt writing and recomputation included, without a
formula for any of them. On the CPU, where the dry run takes place, scaled-dot-product attention keeps its
operands, its output and one number per row and head, as the memory-efficient and flash kernels of a GPU do.

Memory and FLOPs are linear in the number of layers and of rows in a micro-batch, so a few shallow dry runs determine
them for any depth and any number of rows. They are not linear in T: attention may hold `[.., S, S]`.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpc_dist.adapter.families import EncoderParts
from gpc_dist.adapter.graft import GraftedEncoder
from gpc_dist.adapter.lane import Adapter
from gpc_dist.config import AdapterConfig
from gpc_dist.encoder.skeleton import build_skeleton
from gpc_dist.planner.flops import flop_counter
from gpc_dist.private.torch import (
    DEVICE_OF,
    FakeTensorMode,
    TorchDispatchMode,
    device_of,
    storage_key,
    tree_leaves,
)

_ROWS = (4, 32)
"""Rows of the dry runs. With fewer, the peak may come from tensors outside the layers."""


@dataclass(frozen=True)
class ModelSpec:
    """An encoder and an adapter by their configurations: what a dry run runs."""

    encoder: Any
    """A configuration of `transformers`."""
    dtype: torch.dtype
    """Of the encoder."""
    adapter: AdapterConfig
    outputs: int
    """Of the adapter's head."""
    states_given: bool = True
    """Whether the text states that enter a first layer above 0 are given to each pass, or computed in it."""

    @property
    def first_layer(self) -> int:
        """k: the first layer that depends on the adapter; L if none does."""
        return self.adapter.entry_layer(self.encoder.num_hidden_layers)

    def with_upper_layers(self, count: int) -> ModelSpec:
        """The same with `count` layers from layer k on, and one below them if there are any."""
        first, below = self.first_layer, min(1, self.first_layer)
        config = copy.deepcopy(self.encoder)
        config.num_hidden_layers = below + count
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[first - below : first + count]
        return replace(self, encoder=config, adapter=self.adapter.model_copy(update={"first_layer": below}))


@dataclass(frozen=True)
class Footprint:
    """What one pass over a micro-batch takes beyond parameters and optimizer state."""

    saved: float
    """Bytes that the forward pass leaves for the backward pass."""
    peak: float
    """Most bytes at any one time, the adapter's gradients included."""
    operators: float
    """Operators run, views included."""
    forward_flops: float
    backward_flops: float
    """Recomputation by activation checkpointing included."""

    @property
    def flops(self) -> float:
        return self.forward_flops + self.backward_flops

    def toward(self, other: Footprint, part: float) -> Footprint:
        """Linear interpolation between this footprint (`part` 0) and `other` (1), or extrapolation beyond them."""
        return Footprint(*(a + (b - a) * part for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Activations:
    """Footprint of a pass for any number of rows of one length."""

    few: Footprint
    """With `_ROWS[0]` rows."""
    many: Footprint
    """With `_ROWS[1]` rows."""

    def at(self, rows: float) -> Footprint:
        return self.few.toward(self.many, (rows - _ROWS[0]) / (_ROWS[1] - _ROWS[0]))

    def toward(self, other: Activations, part: float) -> Activations:
        """As `Footprint.toward`."""
        return Activations(self.few.toward(other.few, part), self.many.toward(other.many, part))


@dataclass(frozen=True)
class Passes:
    """Footprints of a pass over rows of one length, in each way of running it."""

    kept: Activations
    """Everything saved that the backward pass needs."""
    recomputed: Activations
    """With activation checkpointing."""
    kept_sharded: Activations
    """At ZeRO-3, where DeepSpeed's linear layers save their inputs as well."""
    recomputed_sharded: Activations

    def of(self, sharded: bool, recompute: bool) -> Activations:
        if sharded:
            return self.recomputed_sharded if recompute else self.kept_sharded
        return self.recomputed if recompute else self.kept


class Way(NamedTuple):
    """A way to run a pass."""

    sharded: bool = False
    """As at ZeRO-3, see `inputs_saved`."""
    recompute: bool = False
    """With activation checkpointing."""


def measure_passes(model: ModelSpec, tokens: int) -> Passes:
    """Footprints of a pass over rows of `tokens` text tokens (T), run in each way.

    Raises:
        UserError: a family that cannot hold a prompt.
    """
    ways = Way(), Way(recompute=True), Way(sharded=True), Way(sharded=True, recompute=True)
    kept, recomputed, kept_sharded, recomputed_sharded = measure_ways(model, tokens, ways)
    return Passes(kept, recomputed, kept_sharded, recomputed_sharded)


def measure_ways(model: ModelSpec, tokens: int, ways: Sequence[Way]) -> list[Activations]:
    """Footprints of a pass over rows of `tokens` text tokens (T), for each of these ways.

    Raises:
        UserError: a family that cannot hold a prompt.
    """

    def measure(spec: ModelSpec) -> list[Activations]:
        parts = build_skeleton(spec.encoder, spec.dtype)
        found = {}
        with FakeTensorMode(allow_non_fake_inputs=True):
            give_fake_values(parts)
            adapter = Adapter(spec.adapter, parts.shape, spec.outputs)
            grafted = GraftedEncoder(parts, [adapter], adapter.first_layer)
            for recompute in (False, True):
                if recompute:
                    grafted.checkpoint_activations()
                for way in {way for way in ways if way.recompute == recompute}:
                    with inputs_saved() if way.sharded else nullcontext():
                        few, many = (dry_run(grafted, rows, tokens, spec.states_given) for rows in _ROWS)
                    found[way] = Activations(few, many)
        return [found[way] for way in ways]

    first, layers = model.first_layer, model.encoder.num_hidden_layers
    computed = first > 0 and not model.states_given
    if computed or first == layers or model.adapter.cell_layers is not None:
        return measure(model)  # not linear in the number of layers
    kinds = getattr(model.encoder, "layer_types", None) or [None] * layers
    shallow, deeper = _depths(kinds[first:])
    if shallow == deeper:
        return measure(model.with_upper_layers(shallow))
    part = (layers - first - shallow) / (deeper - shallow)
    measured = (measure(model.with_upper_layers(depth)) for depth in (shallow, deeper))
    return [a.toward(b, part) for a, b in zip(*measured, strict=True)]


def _depths(kinds: Sequence[Any]) -> tuple[int, int]:
    """Two depths, `layer_period` apart, from which that of layers of these kinds can be extrapolated; their own depth
    twice if they are too few for that."""
    layers = len(kinds)
    if layers < 4:
        return layers, layers
    period = layer_period(kinds)
    # three layers use the cell twice: only then are its gradients added up, as in deeper encoders
    shallow = 3 + (layers - 3) % period
    return (layers, layers) if shallow + period > layers else (shallow, shallow + period)


def layer_period(kinds: Sequence[Any]) -> int:
    """Layers after which the kinds of layer (local and global attention, say) repeat."""
    return next(p for p in range(1, len(kinds) + 1) if kinds[p:] == kinds[:-p])


@contextmanager
def inputs_saved() -> Iterator[None]:
    """Let linear layers save their inputs, as DeepSpeed's do at ZeRO-3, though frozen weights do not need them."""
    linear = F.linear

    def saving(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, weight, bias) if weight.requires_grad else _SavingLinear.apply(x, weight, bias)

    F.linear = saving  # type: ignore[assignment]
    try:
        yield
    finally:
        F.linear = linear


class _SavingLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        result = x @ weight.t()
        return result if bias is None else result.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        _, weight = ctx.saved_tensors
        return gradient @ weight, None, None


def give_fake_values(parts: EncoderParts) -> None:
    """Replace the parameters of a skeleton by fake ones on the CPU, in place; tied ones stay tied. Call it under a
    `FakeTensorMode`."""
    fakes: dict[nn.Parameter, nn.Parameter] = {}
    for module in nn.ModuleList([parts.encoder, parts.token_embeddings]).modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in fakes:
                values = torch.empty(parameter.shape, dtype=parameter.dtype)
                fakes[parameter] = nn.Parameter(values, requires_grad=False)
            module.register_parameter(name, fakes[parameter])


def dry_run(model: GraftedEncoder, rows: int, tokens: int, states_given: bool = True) -> Footprint:
    """Run a forward and a backward pass over `[rows, tokens]` text tokens; under a `FakeTensorMode` without values.

    Args:
        states_given: see `ModelSpec.states_given`.
    """
    standing = [*model.parameters(), *model.buffers()]
    states = None
    if model.first_layer and states_given:
        weight, shape = next(model.encoder.parameters()), model.parts.shape
        if model.first_layer == shape.layers:
            states = torch.zeros(rows, shape.layers - model.adapter.read_from + 1, shape.hidden_size)
        else:
            states = weight.new_zeros(rows, tokens, shape.hidden_size)
    targets = torch.zeros(rows, dtype=torch.long)
    input_ids = torch.zeros(rows, tokens, dtype=torch.long)
    mask = torch.ones_like(input_ids)
    mask[0, -1] = 0  # a mask of ones would be dropped
    with LiveStorages(standing) as live, flop_counter() as counter, _KnownDevices():
        outputs = model(input_ids, mask, text_states=states)
        loss = F.cross_entropy(outputs, targets.clamp(max=outputs.shape[1] - 1), reduction="sum")
        saved, forward_flops = live.bytes, counter.get_total_flops()
        loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return Footprint(
        saved=float(saved),
        peak=float(live.peak),
        operators=float(live.operators),
        forward_flops=float(forward_flops),
        backward_flops=float(counter.get_total_flops() - forward_flops),
    )


class _KnownDevices(TorchDispatchMode):
    """Answers what device a tensor is on, which most dispatches ask, without a way through all modes."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return device_of(*args) if function is DEVICE_OF else function(*args, **(kwargs or {}))


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of storages that operators have allocated and that are still referred to.

    Args:
        standing: tensors from before, which do not count, nor do views of them.
    """

    def __init__(self, standing: Sequence[Tensor] = ()):
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self.operators = 0
        self._sizes = {storage_key(tensor.untyped_storage()): 0 for tensor in standing}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace != "prim":  # as which fake tensors are queried for their device
            self.operators += 1
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage_key(storage)
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key)
