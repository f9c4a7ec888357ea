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

    @property
    def name(self) -> str:
        parts = ["replicated" if self.zero_stage == 0 else f"zero{self.zero_stage}"]
        parts += [self.quantize] * (self.quantize != "none")
        parts += [f"offload to {self.offload}"] * (self.offload != "none")
        parts += ["recompute"] * self.recompute
        return ", ".join(parts)

    @property
    def simplicity(self) -> tuple[bool, int, bool]:
        """Sort key: the simplest first."""
        return self.offload != "none", self.zero_stage, self.recompute


REGIMES = [
    Regime(stage, offload, quantize, recompute)  # type: ignore[arg-type]
    for stage, offload, quantize in (
        (0, "none", "none"),
        (1, "none", "none"),
        (2, "none", "none"),
        (3, "none", "none"),
        (3, "cpu", "none"),
        (3, "nvme", "none"),
        (0, "none", "int8"),
    )
    for recompute in (False, True)
]
