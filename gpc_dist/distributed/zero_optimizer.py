"""Fine-tuning's optimizer: DeepSpeed's engine with ZeRO 1, 2 or 3 around the whole encoder and its head.

The optimizer of adapters (`optimizer`) sums one flat buffer of all gradients and keeps whole tensors, which suits a few
hundred thousand parameters. Here each rank holds its part of the moments (stage 1), of the gradients too (stage 2), and
of the weights too (stage 3). A step is clipped by the norm of all gradients, and left out if that or the loss is not
finite, as an adapter's is.

DeepSpeed takes the mean over ranks. A step is divided over them unevenly (see `tasks.batching.share`), so each rank's
part of the step's mean loss is multiplied by their number: the mean of those gradients is the sum of the parts'.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpc_dist.adapter.lane import Adapter
from gpc_dist.config import TrainConfig
from gpc_dist.distributed.optimizer import LaneOptimizer, Reduced, parameter_groups
from gpc_dist.distributed.world import World
from gpc_dist.distributed.zero_library import import_deepspeed
from gpc_dist.errors import UserError
from gpc_dist.tensors import Joined, Stored, Stream, check_like, joined, stream

_MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each weight."""


class ZeroOptimizer:
    """Optimizer of a fine-tuned encoder and its head, partitioned over the ranks by DeepSpeed.

    Args:
        adapter: has taken the encoder (`Adapter.take_encoder`).
        model: what runs it; all of the adapter's parameters are its own.
        ds_config: with ZeRO stage 1, 2 or 3, see `deepspeed_config.resolve`.

    Raises:
        MachineError: see `import_deepspeed`.
    """

    def __init__(
        self,
        adapter: Adapter,
        model: nn.Module,
        config: TrainConfig,
        world: World,
        ds_config: Mapping[str, Any],
    ):
        deepspeed = import_deepspeed(world)
        from gpc_dist.private import deepspeed as private

        self.world = world
        self.factor = 1.0
        """Current share of the peak learning rates."""
        self.named = dict(adapter.named_parameters())
        groups = parameter_groups(self.named, config)
        self._peak = [group["lr"] for group in groups]
        self._inner = torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay)
        """Updates this rank's parts."""
        engine, *_ = deepspeed.initialize(model=model, optimizer=self._inner, config=dict(ds_config))
        private.skip_nonfinite(engine)
        self.engine: Any = engine
        """Runs a pass in the place of the model, when gradients are wanted."""
        self._gathered = deepspeed.zero.GatheredParameters
        self._held = {name: private.held(parameter) for name, parameter in self.named.items()}
        self._places = {name: private.place_of(parameter, engine) for name, parameter in self.named.items()}

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(math.prod(held.shape) for held in self._held.values())

    def set_factor(self, factor: float) -> None:
        """Set every learning rate to `factor` times its peak."""
        self.factor = factor
        for group, peak in zip(self._inner.param_groups, self._peak, strict=True):
            group["lr"] = peak * factor

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a pass that the engine ran.

        Args:
            loss: this rank's part of the step's mean loss.
            last: no further pass of this step comes.
        """
        # an infinite loss can have finite gradients, and then the norm would not tell that the step is to be left out
        weight = torch.where(loss.detach().isfinite(), float(self.world.size), torch.nan)
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * weight)

    def step(self, numbers: Tensor) -> Reduced:
        """Update the weights, if loss and gradient norm are finite, and sum a few `numbers` [n] over the ranks."""
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm()) if self.engine.was_step_applied() else math.inf
        return Reduced(self.world.sum(numbers).tolist(), [norm])

    def weights(self) -> Stream:
        """All weights, one at a time, on the device; every rank must go through them in step."""
        return Stream({name: held.shape for name, held in self._held.items()}, self._whole())

    def _whole(self) -> Iterator[Tensor]:
        for parameter in self.named.values():
            with self._gathered([parameter]):
                yield parameter.detach()

    def part(self) -> Stream:
        """What this rank alone must save: its flat parts of weights and moments.

        Names: `param/<name>` and `state/<name>/<moment>`, each `[n]`; and `step`, the number of updates.
        """
        found: dict[str, Tensor] = {}
        updates = 0.0
        for name, place in self._places.items():
            found[f"param/{name}"] = place.of(place.flat)
            kept = self._inner.state.get(place.flat, {})
            for moment in _MOMENTS if kept else ():
                found[f"state/{name}/{moment}"] = place.of(kept[moment])
            updates = max(updates, float(kept.get("step", 0.0)))
        found["step"] = torch.tensor(updates)
        return stream(found)

    def load(self, parts: Sequence[Mapping[str, Stored]]) -> None:
        """Load what `part` gave on each rank, of any number of ranks and any of the stages 1 to 3.

        Raises:
            UserError: the parts are not those of this adapter.
        """
        found = joined(parts)
        updates = self._check(found, len(parts))
        state = self._inner.state
        for place in self._places.values() if updates else ():
            if place.flat not in state:
                state[place.flat] = {"step": torch.tensor(updates)} | {
                    moment: torch.zeros_like(place.flat, requires_grad=False) for moment in _MOMENTS
                }
        for name, place in self._places.items():
            weights, held = found[f"param/{name}"], self._held[name]
            weights.read(place.start, place.of(place.flat))
            weights.read(held.start, held.values)
            for moment in _MOMENTS if updates else ():
                found[f"state/{name}/{moment}"].read(place.start, place.of(state[place.flat][moment]))

    def _check(self, found: Mapping[str, Joined], ranks: int) -> float:
        """Compare what is to be loaded with what there is; returns the number of updates.

        Args:
            ranks: that saved, each the number of updates.
        """
        updates = torch.zeros(ranks)
        if "step" in found and found["step"].shape == updates.shape:
            found["step"].read(0, updates)
        wanted = {"step": [ranks]}
        for name, held in self._held.items():
            keys = [f"param/{name}", *(f"state/{name}/{moment}" for moment in _MOMENTS if updates[0] > 0)]
            wanted |= {key: [math.prod(held.shape)] for key in keys}
        check_like(found, wanted)
        if len(set(updates.tolist())) > 1:
            raise UserError("its ranks made different numbers of updates")
        if other := [key for key, each in found.items() if each.dtype != torch.float32]:
            raise UserError(f"{other[0]!r} holds {found[other[0]].dtype}, not float32")
        return float(updates[0])


Optimizer = LaneOptimizer | ZeroOptimizer
"""Of an adapter. All lanes of a step have the first kind, or its only lane has the second."""
