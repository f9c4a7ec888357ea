"""Regimes: the ways to distribute a run over its ranks, which the planner compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Regime:
    """One way to distribute a run, as keys of `engine`."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "cpu", "nvme"] = "none"
    quantize: Literal["none", "int8"] = "none"
    recompute: bool = False
    """Activation checkpointing."""
    hpz: bool = False
    """Second shards, see `engine.hpz`."""

    @property
    def name(self) -> str:
        parts = ["replicated" if self.zero_stage == 0 else f"zero{self.zero_stage}"]
        parts += [self.quantize] * (self.quantize != "none")
        parts += ["hpz"] * self.hpz
        parts += [f"offload to {self.offload}"] * (self.offload != "none")
        parts += ["recompute"] * self.recompute
        return ", ".join(parts)

    @property
    def simplicity(self) -> tuple[bool, int, bool, bool]:
        """Sort key: the simplest first."""
        return self.offload != "none", self.zero_stage, self.hpz, self.recompute


REGIMES = [
    Regime(stage, offload, quantize, recompute, hpz)  # type: ignore[arg-type]
    for stage, offload, quantize, hpz in (
        (0, "none", "none", False),
        (1, "none", "none", False),
        (2, "none", "none", False),
        (3, "none", "none", False),
        (3, "none", "none", True),
        (3, "cpu", "none", False),
        (3, "nvme", "none", False),
        (0, "none", "int8", False),
        (3, "none", "int8", False),
        (3, "none", "int8", True),
        (3, "cpu", "int8", False),
    )
    for recompute in (False, True)
]


def regimes_for(nodes: int, per_node: int) -> list[Regime]:
    """The regimes that differ on so many nodes with so many ranks each."""
    return [regime for regime in REGIMES if not regime.hpz or (nodes > 1 and per_node > 1)]
