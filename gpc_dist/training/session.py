"""A session: the ranks, the task and the frozen encoder, ready to run adapters in its lanes."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpc_dist.adapter.families import EncoderParts
from gpc_dist.adapter.fingerprint import EncoderIdentity, identify
from gpc_dist.adapter.graft import GraftedEncoder, new_adapter
from gpc_dist.adapter.lane import Adapter
from gpc_dist.config import Config
from gpc_dist.distributed import deepspeed_config
from gpc_dist.distributed.memory import return_freed_memory
from gpc_dist.distributed.world import World, encoder_dtype
from gpc_dist.encoder import frozen
from gpc_dist.encoder.attention import choose_kernels
from gpc_dist.errors import UserError
from gpc_dist.tasks import Encoded, Example, LaneBatch, Task, encode


@dataclass(frozen=True)
class Split:
    """The examples of a split and their tokens."""

    examples: list[Example]
    encoded: Encoded


@dataclass(frozen=True)
class Base:
    """A frozen encoder on its way into a session: found and checked, not yet placed."""

    encoder: frozen.Encoder
    identity: EncoderIdentity
    tokenizer: Any
    """None for an encoder of random weights."""
    parameters: int
    """N."""
    load_s: float

    @property
    def parts(self) -> EncoderParts:
        return self.encoder.parts


@dataclass(frozen=True)
class Session:
    """Everything that runs, on one rank."""

    config: Config
    world: World
    task: Task
    base: Base
    model: GraftedEncoder
    ds_config: dict[str, Any]
    load_s: float
    """Seconds from the first look at the encoder to its last weight in place."""

    @property
    def text_tokens(self) -> int:
        return text_tokens(self.config, self.base.parts)

    @property
    def pad_id(self) -> int:
        return getattr(self.base.tokenizer, "pad_token_id", None) or 0

    def run(self, batch: LaneBatch, lanes: Sequence[Adapter]) -> list[Tensor]:
        """Outputs `[R_k, outputs_k]` of each lane's rows, for a batch on the session's device."""
        return self.model(batch.input_ids, batch.attention_mask, batch.token_type_ids, batch.lane_rows, lanes)

    def new_adapter(self, config: Config) -> Adapter:
        """An adapter of a run, started from `run.seed`, on this session's device.

        Raises:
            UserError: see `hand_over_encoder`.
        """
        adapter = new_adapter(
            self.base.parts,
            config.adapter,
            self.task.outputs,
            tokenizer=self.base.tokenizer,
            label_words=self.task.label_words,
            seed=config.run.seed,
        ).to(self.world.device)
        self.hand_over_encoder(adapter)
        return adapter

    def hand_over_encoder(self, adapter: Adapter) -> None:
        """Make the encoder a part of an adapter whose method trains it; others get nothing.

        Raises:
            UserError: it is another adapter's already.
        """
        if not adapter.config.trains_encoder:
            return
        parts = self.base.parts
        frozen.thaw(parts)
        adapter.take_encoder(parts.encoder, parts.token_embeddings)
        dtype = encoder_dtype(self.config.engine, self.world.device)
        self.model.autocast = None if dtype == torch.float32 else dtype

    def split(self, examples: list[Example]) -> Split:
        """Tokenise examples for this session's encoder."""
        return Split(examples, encode(examples, self.base.tokenizer, self.text_tokens))


def text_tokens(config: Config, parts: EncoderParts) -> int:
    """T at most: `data.max_length`, or what the encoder's positions leave beside the prompt.

    Raises:
        UserError: they leave too little.
    """
    if parts.max_positions is None:
        return config.data.max_length
    prompt = config.adapter.prompt_tokens if config.adapter.has_prompt else 0
    room = parts.max_positions - prompt
    if room < 8:
        raise UserError(
            f"adapter.prompt_tokens {prompt} leaves {room} of the encoder's {parts.max_positions} positions for "
            "text: use a shorter prompt"
        )
    return min(config.data.max_length, room)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def check_input(config: Config, world: World) -> None:
    """Say what is wrong with the encoder's place or the engine's regime before anything is loaded or written.

    Raises:
        UserError: see `frozen.encoder_path` and `deepspeed_config.resolve`.
    """
    frozen.encoder_path(config.encoder)
    deepspeed_config.resolve(config, world.size, encoder_dtype(config.engine, world.device))


def load_base(config: Config, world: World) -> Base:
    """Read the encoder and its tokenizer. One that is fine-tuned keeps float32 weights."""
    start = time.monotonic()
    tokenizer = frozen.load_tokenizer(config.encoder)
    dtype = torch.float32 if config.adapter.trains_encoder else encoder_dtype(config.engine, world.device)
    encoder = frozen.load_encoder(config.encoder, dtype, world)
    # under the name the user gave, not the folder it was found in on this machine
    identity = replace(identify(encoder.parts.encoder, encoder.folder), path=config.encoder.path)
    parameters = frozen.count_parameters(encoder.parts)
    return Base(encoder, identity, tokenizer, parameters, time.monotonic() - start)


def open_session(
    config: Config, world: World, task: Task, base: Base, attached: Sequence[Adapter] = ()
) -> Session:
    """Graft the encoder, and place it where it runs.

    Args:
        attached: adapters that run where a pass is given no others.
    """
    dtype = encoder_dtype(config.engine, world.device)
    ds_config = deepspeed_config.resolve(config, world.size, dtype)
    choose_kernels(base.parts.layers)
    model = GraftedEncoder(base.parts, [adapter.to(world.device) for adapter in attached])
    if config.engine.compile:
        model.compile_layers()
    if config.engine.activation_checkpointing:
        model.checkpoint_activations()
    if config.engine.activation_checkpointing or config.engine.quantize != "none":
        return_freed_memory()  # or the heap would hold what is no longer kept
    start = time.monotonic()
    frozen.place(base.encoder, world, config.engine, ds_config)
    load_s = base.load_s + time.monotonic() - start
    session = Session(config, world, task, base, model, ds_config=ds_config, load_s=load_s)
    for adapter in attached:
        session.hand_over_encoder(adapter)
    return session
