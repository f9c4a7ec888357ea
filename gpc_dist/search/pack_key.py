"""Which trials can share a pack."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from gpc_dist.config import Config

_T = TypeVar("_T")


@dataclass(frozen=True)
class PackKey:
    """What the trials of a pack have in common."""

    shared: tuple[str, ...]
    """Encoder and engine: each lane has its own task and data."""
    prompt: tuple[str, ...] | None
    """The prompt's length and where it enters. None for a trial without a prompt, whose head reads text states that are
    computed once: it can share a pack with any prompts, because it needs no pass of the encoder."""

    def joined(self, other: PackKey) -> PackKey | None:
        """The key of a pack that has trials of both keys; None if they cannot share one."""
        if self.shared != other.shared or (self.prompt or other.prompt) != (other.prompt or self.prompt):
            return None
        return replace(self, prompt=self.prompt or other.prompt)

    def alone(self, name: str) -> PackKey:
        """The same for a trial that shares its pack with none of another name."""
        return replace(self, shared=(*self.shared, name))


def pack_key(trial: Config) -> PackKey:
    """The key of a trial."""
    adapter, shared = trial.adapter, (trial.encoder.model_dump_json(), trial.engine.model_dump_json())
    cached = not adapter.has_prompt and not adapter.trains_encoder and trial.engine.state_cache != "none"
    if cached:
        return PackKey(shared, None)
    tokens = adapter.prompt_tokens if adapter.has_prompt else 0
    return PackKey(shared, (f"prompt tokens: {tokens}", f"entry: {adapter.entry}"))


def grouped(trials: Iterable[tuple[PackKey, _T]]) -> list[list[_T]]:
    """Trials, or what stands for them, by whom they can share a pack with."""
    groups: list[tuple[PackKey, list[_T]]] = []
    for key, trial in trials:
        for place, (other, group) in enumerate(groups):
            if (joined := other.joined(key)) is not None:
                groups[place] = joined, [*group, trial]
                break
        else:
            groups.append((key, [trial]))
    return [group for _, group in groups]
