"""A session: the ranks, the frozen encoder and a run's task, ready to run adapters in the encoder's lanes."""

from __future__ import annotations

import logging
import random
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpc_dist import own_folders
from gpc_dist.adapter.families import TESTED, EncoderParts
from gpc_dist.adapter.fingerprint import EncoderIdentity, identify
from gpc_dist.adapter.graft import GraftedEncoder
from gpc_dist.adapter.halves import check_halves
from gpc_dist.adapter.lane import Adapter
from gpc_dist.adapter.make import new_adapter
from gpc_dist.adapter.transfer import Source, start_from
from gpc_dist.config import Config
from gpc_dist.distributed import deepspeed_config
from gpc_dist.distributed.memory import return_freed_memory
from gpc_dist.distributed.world import World, encoder_dtype
from gpc_dist.encoder import frozen
from gpc_dist.encoder.attention import choose_kernels
from gpc_dist.encoder.state_cache import CachedStates
from gpc_dist.errors import UserError
from gpc_dist.tasks import Encoded, EpochPlan, Example, LaneBatch, Task, collate, encode, merge_lanes
from gpc_dist.training.integrity import Integrity
from gpc_dist.training.saved_adapter import answers_alike
from gpc_dist.training.text_states import TextStates

log = logging.getLogger(__name__)

_EPOCHS = 10.0
"""Of a run that gives neither epochs nor steps."""


@dataclass(frozen=True)
class Split:
    """The examples of a split, their tokens and, if they are cached, the text states that enter layer k."""

    examples: list[Example]
    encoded: Encoded
    states: CachedStates | None = None
    pooled: int = 0
    """How many pooled states `states` hold for each row; 0 if they are those of its tokens."""

    @cached_property
    def rows(self) -> Encoded:
        """What passes are made of: the tokens, or one in the place of each pooled state."""
        return self.encoded.with_rows_of(self.pooled) if self.pooled else self.encoded


def lane_batch(lanes: Sequence[tuple[Split, np.ndarray]], pad_id: int) -> LaneBatch:
    """One batch of these examples of each lane's split, with their text states if they are cached."""
    cached = [split.states for split, _ in lanes if split.states is not None]
    if len(cached) < len(lanes):
        return merge_lanes([collate(split.encoded, indices, pad_id) for split, indices in lanes], pad_id)
    batch = merge_lanes([collate(split.rows, indices, pad_id) for split, indices in lanes], pad_id)
    width = batch.input_ids.shape[1]
    found = [
        states.padded(split.rows.rows_of(indices), width)
        for states, (split, indices) in zip(cached, lanes, strict=True)
    ]
    return replace(batch, text_states=torch.cat(found))


@dataclass(frozen=True)
class Base:
    """An encoder that is found and checked, but not yet placed on its device."""

    encoder: frozen.Encoder
    identity: EncoderIdentity
    tokenizer: Any
    """None for an encoder of random weights."""
    load: Callable[[], frozen.Encoder]
    """Loads it once more."""
    parameters: int
    """Number of the encoder's parameters, N."""
    load_s: float

    @property
    def parts(self) -> EncoderParts:
        return self.encoder.parts

    @property
    def pad_id(self) -> int:
        return getattr(self.tokenizer, "pad_token_id", None) or 0


@dataclass(frozen=True)
class Session:
    """A run's configuration and task, and the placed encoder of one rank, which other runs may share (`of`)."""

    config: Config
    world: World
    task: Task
    base: Base
    model: GraftedEncoder
    text_states: TextStates | None
    """The states that enter layer k, for k > 0."""
    integrity: Integrity
    """Checks the weights that runs are trained with."""
    ds_config: dict[str, Any]
    load_s: float
    """Seconds that reading and placing the encoder took."""

    def of(self, config: Config, task: Task) -> Session:
        """The session of another run with this encoder, in which it has lanes of its own."""
        return replace(self, config=config, task=task)

    @property
    def text_tokens(self) -> int:
        return text_tokens(self.config, self.base.parts)

    @property
    def pad_id(self) -> int:
        return self.base.pad_id

    def run(
        self, batch: LaneBatch, lanes: Sequence[Adapter], engine: Callable[..., list[Tensor]] | None = None
    ) -> list[Tensor]:
        """Run a batch that is on the session's device; returns the outputs of each lane's rows, `[R_k, outputs_k]`.

        Args:
            engine: runs it in the place of the graft, around which it is.
        """
        states = batch.text_states
        if states is None and self.text_states is not None:
            states = self.text_states.computed(batch)
        return (engine or self.model)(
            batch.input_ids, batch.attention_mask, batch.token_type_ids, batch.lane_rows, lanes, states
        )

    def new_adapter(self, config: Config, source: Source | None = None) -> Adapter:
        """Make the adapter of a run on this session's device, initialised from `run.seed`.

        Args:
            source: the adapter that it starts from.

        Raises:
            UserError: see `make.new_adapter`, `transfer.start_from` and `hand_over_encoder`.
        """
        adapter = new_adapter(
            self.model,
            config.adapter,
            self.task.outputs,
            tokenizer=self.base.tokenizer,
            label_words=self.task.label_words,
            seed=config.run.seed,
            entering=self.text_states.entering if self.text_states else None,
        ).to(self.world.device)
        if source is not None:
            said = start_from(adapter, source, self.base.identity, answers_alike(self.task, source.card))
            if self.world.is_main:
                digest = source.weights_sha256[:12]
                log.info(
                    "%s starts from %s (task %s, sha256 %s): %s",
                    config.run.name,
                    source.place,
                    source.task,
                    digest,
                    said,
                )
        self.hand_over_encoder(adapter)
        return adapter

    def hand_over_encoder(self, adapter: Adapter) -> None:
        """Make the encoder a part of an adapter that is to be trained with it; otherwise do nothing.

        Raises:
            UserError: the encoder is already part of another adapter.
        """
        if not adapter.config.trains_encoder:
            return
        parts = self.base.parts
        frozen.thaw(parts)
        adapter.take_encoder(parts.encoder, parts.token_embeddings)
        self.model.head = adapter.head
        dtype = encoder_dtype(self.config.engine, self.world.device)
        self.model.autocast = None if dtype == torch.float32 else dtype

    @property
    def text_states_s(self) -> float:
        """Seconds that computing text states for caches has taken so far."""
        return self.text_states.spent_s if self.text_states else 0.0

    def release_lower_layers(self) -> None:
        """Release the layers below k, once the splits and adapters are there that need them."""
        if self.text_states is not None:
            self.text_states.release()

    def split(self, examples: list[Example], cached: bool = True, run: Config | None = None) -> Split:
        """Tokenise examples for this session's encoder.

        Args:
            cached: also find or compute the text states of all of them; for examples that run more than once.
            run: configuration of the run that is trained on them, if one is.

        Raises:
            UserError: see `TextStates.cached`.
        """
        split = Split(examples, encode(examples, self.base.tokenizer, self.text_tokens))
        return self.with_states(split, run) if cached else split

    def with_states(self, split: Split, run: Config | None = None) -> Split:
        """The split with its text states, if this session's passes need any and they are worth their room."""
        if self.text_states is None:
            return split
        part = 1.0
        if run is not None:
            plan, steps = plan_of(run, split.encoded)
            part = steps / plan.total_steps(1)
        states = self.text_states.cached(split.encoded, part)
        return split if states is None else replace(split, states=states, pooled=self.text_states.pooled)


def plan_of(config: Config, encoded: Encoded) -> tuple[EpochPlan, int]:
    """The order in which a run reads its training examples, and the number of its steps."""
    train = config.train
    plan = EpochPlan(encoded.sizes, config.run.seed, train.batch_size, train.batch_tokens)
    return plan, train.steps or plan.total_steps(train.epochs or _EPOCHS)


def text_tokens(config: Config, parts: EncoderParts) -> int:
    """Return the largest T: `data.max_length`, or the encoder's positions minus the prompt if that is less.

    Raises:
        UserError: fewer than 8 positions are left for text.
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
    """Check the encoder's path and the engine's regime, before anything is loaded or written.

    Raises:
        UserError: see `frozen.encoder_path` and `deepspeed_config.resolve`.
    """
    frozen.encoder_path(config.encoder)
    values = deepspeed_config.resolve(config, world.size, weights_dtype(config, world))
    deepspeed_config.warn_of_unused(config, world.size, values)


def weights_dtype(config: Config, world: World) -> torch.dtype:
    """dtype of the encoder's weights: float32 for one that is fine-tuned."""
    return torch.float32 if config.adapter.trains_encoder else encoder_dtype(config.engine, world.device)


def load_base(config: Config, world: World) -> Base:
    """Load the encoder and its tokenizer."""
    start = time.monotonic()
    tokenizer = frozen.load_tokenizer(config.encoder)
    dtype = weights_dtype(config, world)
    encoder = frozen.load_encoder(config.encoder, dtype, world, table=False)
    # the path is the one that the user gave, not the folder on this machine
    identity = replace(identify(encoder.parts.encoder, encoder.files or None), path=config.encoder.path)
    first_layer = config.adapter.entry_layer(encoder.parts.shape.layers)
    if first_layer > 0 and identity.model_type not in TESTED:
        check_halves(encoder.parts, first_layer)
    checked = config.encoder.model_copy(update={"checksum": False})
    parameters = frozen.count_parameters(encoder.parts)
    return Base(
        encoder,
        identity,
        tokenizer,
        lambda: frozen.load_encoder(checked, dtype, world),
        parameters,
        time.monotonic() - start,
    )


def open_session(
    config: Config, world: World, task: Task, base: Base, attached: Sequence[Adapter] = ()
) -> Session:
    """Graft the encoder, and place it where it runs.

    Args:
        attached: adapters that run if a pass is given no others, and are not trained.
    """
    ds_config = deepspeed_config.resolve(config, world.size, weights_dtype(config, world))
    ds_config = deepspeed_config.with_sizes(ds_config, base.parts.shape.hidden_size)
    if config.engine.hpz:
        ds_config = deepspeed_config.with_groups(ds_config, world.from_all(socket.gethostname()))
    choose_kernels(base.parts.layers)
    first_layer = config.adapter.entry_layer(base.parts.shape.layers)
    model = GraftedEncoder(base.parts, [adapter.to(world.device) for adapter in attached], first_layer)
    if config.engine.compile:
        own_folders.keep_compiled_code()
        model.compile_layers()
    if config.engine.activation_checkpointing:
        model.checkpoint_activations()
    if config.engine.activation_checkpointing or config.engine.quantize != "none":
        return_freed_memory()  # otherwise the heap keeps memory that is no longer used
    start = time.monotonic()
    text_states = None
    trained = config.adapter.trains_encoder and not attached
    if first_layer == 0:  # otherwise another copy embeds the text (see `TextStates`)
        if not trained or config.engine.zero_stage < 3:
            base.encoder.read_table()
        frozen.place(base.encoder, world, config.engine, ds_config, trained=trained)
    else:
        # the layers below are loaded only if states must be computed
        if model.upper is not None:
            frozen.place(base.encoder, world, config.engine, ds_config, model.upper.parts)
        text_states = TextStates(
            world,
            config.engine,
            ds_config,
            base.identity,
            base.load,
            config.adapter,
            base.pad_id,
        )
    session = Session(
        config,
        world,
        task,
        base,
        model,
        text_states=text_states,
        integrity=Integrity(world, model, lambda: text_states.modules if text_states else None),
        ds_config=ds_config,
        load_s=base.load_s + time.monotonic() - start,
    )
    for adapter in attached:
        session.hand_over_encoder(adapter)
    return session
