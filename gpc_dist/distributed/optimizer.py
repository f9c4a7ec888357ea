"""The trained group: gradient reduction, clipping and optimizer steps of the lanes.

The encoder is frozen, so only a few adapters are trained. They stay outside DeepSpeed's optimizer for
three reasons: a global gradient norm or a global overflow check would couple lanes, which must be
independent; the set of lanes changes while the encoder runs; and the state of an adapter must not
depend on how many ranks trained it. ZeRO's partition of optimizer state and gradients (Rajbhandari et
al. 2020, sections 5.1 and 5.2) is by whole tensors here:

    stage 0    every rank holds all state and makes all updates
    stage 1, 3 every tensor has an owner rank that holds its state, updates it and broadcasts it
    stage 2    as 1, and a summed gradient exists on the owner alone
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gpc_dist.adapter.lane import Adapter
from gpc_dist.config import TrainConfig
from gpc_dist.distributed.world import World
from gpc_dist.errors import UserError
from gpc_dist.tensors import Stream, check_like, stream


def parameter_groups(named: Mapping[str, torch.nn.Parameter], config: TrainConfig) -> list[dict[str, Any]]:
    """The parameters of an adapter as `torch.optim` takes them: a group for each of its parts and for the MLP that
    makes prompts, if it has any, with its peak learning rate.

    Args:
        named: by their names in the adapter.
    """
    rates = {
        "prompt": config.lr,
        "prompt.mlp": config.mlp_lr,
        "cell": config.cell_lr,
        "head": config.head_lr or config.lr,
        "encoder": config.encoder_lr,
    }
    groups: dict[str, list[torch.nn.Parameter]] = {part: [] for part in rates}
    for name, parameter in named.items():
        groups["prompt.mlp" if name.startswith("prompt.mlp.") else name.split(".")[0]].append(parameter)
    return [{"params": found, "lr": rates[part]} for part, found in groups.items() if found]


class LaneOptimizer:
    """Optimizer of one adapter, partitioned over the ranks.

    Args:
        config: optimizer, learning rates, decay and clipping.
        zero_stage: 0 to 3, see the module's docstring.
    """

    engine = None
    """The graft itself runs passes, and nothing around it (see `ZeroOptimizer.engine`)."""

    def __init__(self, adapter: Adapter, config: TrainConfig, world: World, zero_stage: int):
        self.world = world
        self.clip_norm = config.clip_norm
        self.partitioned = zero_stage > 0 and world.size > 1
        self.named = dict(adapter.named_parameters())
        self.owner = _owners(self.named, world.size) if self.partitioned else {}
        groups = parameter_groups({n: p for n, p in self.named.items() if self._owns(n)}, config)
        self.kind = config.optimizer
        # a rank can own nothing when there are more ranks than tensors
        self.inner = _make(groups, config) if groups else None
        self._peak = [group["lr"] for group in groups]
        self.factor = 1.0
        """Current share of the peak learning rates."""

    def _owns(self, name: str) -> bool:
        return not self.partitioned or self.owner[name] == self.world.rank

    def set_factor(self, factor: float) -> None:
        """Set every learning rate to `factor` times its peak."""
        self.factor = factor
        if self.inner:
            for group, peak in zip(self.inner.param_groups, self._peak, strict=True):
                group["lr"] = peak * factor

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a pass, to this lane and to all others whose losses are part of `loss`.

        Args:
            last: no further pass of this step comes.
        """
        loss.backward()

    def apply(self, norm: float) -> None:
        """Update the parameters from their summed gradients, clipped by the lane's gradient `norm`."""
        if self.clip_norm is not None and norm > self.clip_norm:
            for name, parameter in self.named.items():
                if self._owns(name):
                    assert parameter.grad is not None
                    parameter.grad.mul_(self.clip_norm / (norm + 1e-6))
        if self.inner:
            self.inner.step()

    def clear(self) -> None:
        """Drop the gradients."""
        for parameter in self.named.values():
            parameter.grad = None

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.named.values())

    def weights(self) -> Stream:
        """All parameters of the adapter."""
        return stream(self.named)

    def state(self) -> dict[str, Tensor]:
        """Parameters and optimizer state of the whole adapter, on the CPU of rank 0; empty elsewhere.

        Keys: `param/<name>` and `state/<name>/<moment>`. Every rank must call it.
        """
        mine = {}
        for name, parameter in self.named.items():
            if self.inner and self._owns(name):
                for key, value in self.inner.state.get(parameter, {}).items():
                    value = value if isinstance(value, Tensor) else torch.tensor(value)
                    mine[f"state/{name}/{key}"] = value.detach().cpu().clone()
        gathered = self.world.gather_tensors(mine) if self.partitioned else [mine]
        if gathered is None or not self.world.is_main:
            return {}
        tensors = {f"param/{n}": p.detach().cpu().clone() for n, p in self.named.items()}
        for part in gathered:
            tensors.update(part)
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Load the result of `state`, of any number of ranks and any stage.

        Raises:
            UserError: the tensors are not those of this adapter and optimizer.
        """
        self._check(tensors)
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(tensors[f"param/{name}"])
                if not (self.inner and self._owns(name)):
                    continue
                prefix = f"state/{name}/"
                state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                self.inner.state[parameter] = {
                    # AdamW keeps its step count on the CPU; Adafactor's is a plain number
                    key: _as_kept(key, value, parameter, self.inner)
                    for key, value in state.items()
                }

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse what `copy_` would broadcast, and what would fail, or work otherwise, in a later step."""
        wanted: dict[str, Sequence[int]] = {}
        for name, parameter in self.named.items():
            wanted[f"param/{name}"] = parameter.shape
            # a parameter that has not had a gradient yet has no state
            if f"state/{name}/step" in tensors:
                moments = _moments(self.kind, parameter.shape)
                wanted |= {f"state/{name}/{key}": shape for key, shape in moments.items()}
        check_like(tensors, wanted)
        for name, tensor in tensors.items():
            if tensor.dim() and tensor.dtype != torch.float32:
                raise UserError(f"'{name}' holds {tensor.dtype}, not float32")


@dataclass(frozen=True)
class Reduced:
    """Result of `reduce_gradients`, the same on all ranks."""

    sums: list[float]
    """The numbers given to `reduce_gradients`, summed over the ranks."""
    norms: list[float]
    """Gradient norm of each lane before clipping; not finite if its loss was not."""


def schedule_factor(
    schedule: Literal["linear", "cosine", "constant"], step: int, warmup: int, total: int
) -> float:
    """Share of the peak learning rate at a step, between 0 and 1.

    Rises linearly over the first `warmup` steps; then stays (`constant`), or falls to 0 at `total`
    linearly or along half a cosine.

    Args:
        step: steps made so far, from 0.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return max(0.0, 1.0 - done)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def reduce_gradients(lanes: Sequence[LaneOptimizer], numbers: Tensor, zero_stage: int) -> Reduced:
    """Sum the gradients of all lanes, and a few `numbers` [n] with them, over the ranks.

    One all-reduce of one flat float32 buffer (at stage 2 one reduction to each owner), whatever
    the number of lanes. Each lane has its own norm, so lanes do not affect each other. Squares are
    summed in the same order at every stage, so that clipping rounds alike.
    """
    world = lanes[0].world
    parameters = [p for lane in lanes for p in lane.named.values()]
    if zero_stage == 2 and lanes[0].partitioned:
        _reduce_to_owners(lanes, world)
        tail = world.sum(torch.cat([numbers, _squares(parameters, numbers)]))
        sums, squares = tail[: len(numbers)], tail[len(numbers) :]
    else:
        flat = world.sum(torch.cat([_flat_gradients(parameters), numbers]))
        _set_gradients(parameters, flat)
        sums, squares = flat[len(flat) - len(numbers) :], _squares(parameters, numbers)
    of_lanes = squares.split([len(lane.named) for lane in lanes])
    return Reduced(sums.tolist(), torch.stack([each.sum() for each in of_lanes]).sqrt().tolist())


def send_updates(lanes: Sequence[LaneOptimizer]) -> None:
    """Broadcast the tensors that their owners have updated, in one collective per owner."""
    if not lanes or not lanes[0].partitioned:
        return
    world = lanes[0].world
    with torch.no_grad():
        for owner in range(world.size):
            owned = _owned_by(owner, lanes)
            if not owned:
                continue
            flat = torch.cat([p.reshape(-1) for p in owned])
            world.copy_from(flat, owner)
            for parameter, values in zip(owned, _split(owned, flat), strict=True):
                parameter.copy_(values)


def _reduce_to_owners(lanes: Sequence[LaneOptimizer], world: World) -> None:
    """Sum each gradient on its owner, and drop it elsewhere."""
    for owner in range(world.size):
        owned = _owned_by(owner, lanes)
        if owned:
            flat = _flat_gradients(owned)
            world.sum_to(flat, owner)
            if world.rank == owner:
                _set_gradients(owned, flat)
            else:
                for parameter in owned:
                    parameter.grad = None


def _squares(parameters: Sequence[torch.nn.Parameter], numbers: Tensor) -> Tensor:
    """Squared norm of each gradient, 0 where this rank has none; dtype and device are those of `numbers`."""
    nothing = numbers.new_zeros(())
    return torch.stack([nothing if p.grad is None else p.grad.square().sum() for p in parameters])


def _owned_by(owner: int, lanes: Iterable[LaneOptimizer]) -> list[torch.nn.Parameter]:
    return [p for lane in lanes for n, p in lane.named.items() if lane.owner[n] == owner]


def _flat_gradients(parameters: Sequence[torch.nn.Parameter]) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters])


def _set_gradients(parameters: Sequence[torch.nn.Parameter], flat: Tensor) -> None:
    for parameter, values in zip(parameters, _split(parameters, flat), strict=True):
        parameter.grad = values


def _split(parameters: Sequence[torch.nn.Parameter], flat: Tensor) -> list[Tensor]:
    sizes = [p.numel() for p in parameters]
    pieces = flat[: sum(sizes)].split(sizes)
    return [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]


def _owners(named: dict[str, torch.nn.Parameter], size: int) -> dict[str, int]:
    """Owner rank of each tensor: the largest first, each to the rank that has least so far."""
    load = [0] * size
    owners = {}
    for name, parameter in sorted(named.items(), key=lambda item: (-item[1].numel(), item[0])):
        owners[name] = load.index(min(load))
        load[owners[name]] += parameter.numel()
    return owners


def _make(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay)
    from transformers import Adafactor

    # Lester et al. 2021, appendix A.1: no parameter scaling, second moment decay 0.8
    return Adafactor(
        groups,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
        decay_rate=-0.8,
        weight_decay=config.weight_decay,
    )


def _moments(optimizer: str, shape: Sequence[int]) -> dict[str, Sequence[int]]:
    """Names and shapes of what an optimizer keeps of a parameter."""
    if optimizer == "adamw":
        return {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
    if len(shape) < 2:
        return {"step": (), "RMS": (), "exp_avg_sq": shape}
    rows, columns = shape[:-1], (*shape[:-2], shape[-1])
    return {"step": (), "RMS": (), "exp_avg_sq_row": rows, "exp_avg_sq_col": columns}


def _as_kept(
    key: str, value: Tensor, parameter: Tensor, optimizer: torch.optim.Optimizer
) -> Tensor | int | float:
    if key in ("step", "RMS"):
        return value.clone() if isinstance(optimizer, torch.optim.AdamW) else value.item()
    return value.to(parameter.device, copy=True)
