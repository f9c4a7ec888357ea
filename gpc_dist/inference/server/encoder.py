"""The frozen encoder that all adapters of a server share, and its passes: rows of any of them in one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpc_dist.adapter.graft import GraftedEncoder
from gpc_dist.adapter.hub import without_local_paths
from gpc_dist.adapter.lane import Adapter
from gpc_dist.adapter.store import AdapterCard, load_adapter
from gpc_dist.config import AdapterConfig
from gpc_dist.distributed.world import alone
from gpc_dist.errors import UserError
from gpc_dist.inference.adapters import adapter_config, task_of
from gpc_dist.tasks import Example, Prediction, Task, collate, encode, make_task
from gpc_dist.tasks.collate import to_device
from gpc_dist.training.session import load_base, open_session, text_tokens


@dataclass(frozen=True, eq=False)
class Loaded:
    """An adapter on the encoder's device, and what a request to it needs."""

    adapter: Adapter
    card: AdapterCard
    task: Task
    text_tokens: int
    """Most tokens of a row: the end of a longer one is cut off, as in training."""


@dataclass(frozen=True, eq=False)
class Row:
    """One text, or pair of texts, that one adapter is asked about."""

    adapter: Adapter
    ids: np.ndarray
    """int64 `[n]`."""
    types: np.ndarray | None
    """Token types, int64 `[n]`, for tokenizers that make them."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def kind(self) -> tuple[int, int]:
        """P and k, which are the same for all rows of a pass."""
        return self.adapter.prompt_tokens, self.adapter.first_layer

    @property
    def text(self) -> bytes:
        """The same for rows of the same tokens."""
        return self.ids.tobytes() + (b"" if self.types is None else self.types.tobytes())


@dataclass(frozen=True)
class Question:
    """What a request asks an adapter: examples of its task, and their rows."""

    loaded: Loaded
    examples: Sequence[Example]
    rows: Sequence[Row]

    def predictions(self, outputs: Sequence[np.ndarray]) -> list[Prediction]:
        """The prediction for each example.

        Args:
            outputs: of the head for each row, float32 `[outputs]`.
        """
        edges = np.cumsum([len(example.rows) for example in self.examples])[:-1]
        by_example = [part.reshape(-1) for part in np.split(np.stack(outputs), edges)]
        return self.loaded.task.predictions(self.examples, by_example)


class SharedEncoder:
    """The encoder that a card names, whole in this process, on a GPU where there is one. One thread may read, and one
    run passes.

    Args:
        card: of any of its adapters.
        settings: dotted keys, such as `{"engine.dtype": "bf16"}`.

    Raises:
        UserError: it cannot be loaded, or the settings do not leave it whole.
    """

    def __init__(self, card: AdapterCard, settings: Mapping[str, str]):
        self._settings = settings
        own = adapter_config(card, settings)
        if own.engine.zero_stage == 3:
            raise UserError("engine.zero_stage 3: a server has the whole encoder, give 0")
        # as for an adapter that needs all layers, whatever this one needs
        config = own.model_copy(update={"adapter": AdapterConfig(method="prompt-tuning")})
        world = alone(config.engine)
        base = load_base(config, world)
        self._session = open_session(config, world, make_task(own.task, own.data), base)
        self._grafts = {0: self._session.model}

    @property
    def name(self) -> str:
        """As others know it: a name of the Hub, or the last part of a path."""
        shown, _ = without_local_paths(self._session.base.identity, {})
        return shown.path

    @property
    def device(self) -> torch.device:
        return self._session.world.device

    def load(self, folder: Path) -> Loaded:
        """Load an adapter.

        Raises:
            UserError: the folder has none, or one that belongs to another encoder or brings its own.
        """
        adapter, card = load_adapter(folder)
        if card.adapter.trains_encoder:
            raise UserError(
                f"{folder} holds a fine-tuned encoder, which shares nothing with other adapters: serve it by itself "
                "with mlflow models serve"
            )
        base = self._session.base
        card.check_encoder(base.identity, base.parts.shape)
        config = adapter_config(card, self._settings)
        task = task_of(folder, adapter, config)
        return Loaded(adapter.to(self.device).eval(), card, task, text_tokens(config, base.parts))

    def read(self, loaded: Loaded, rows: Sequence[Mapping[str, object]], most: int) -> Question:
        """Parse and tokenise the rows of a request.

        Args:
            most: texts that they may be together; a row may be several.

        Raises:
            UserError: a row lacks a column that the task reads, or has no text in it; names both. Or there is nothing
                to predict: of a text without questions, or a question without candidates. Or there is too much.
        """
        examples = loaded.task.parse([dict(row) for row in rows])
        if not examples or not all(example.rows for example in examples):
            raise UserError(f"a row has nothing to choose from, or to predict, for task {loaded.task.name}")
        if (texts := sum(len(example.rows) for example in examples)) > most:
            raise UserError(f"these are {texts} texts, and at most {most} may wait: ask in parts")
        encoded = encode(examples, self._session.base.tokenizer, loaded.text_tokens)
        every = collate(encoded, np.arange(len(examples)), self._session.pad_id)
        ids = every.input_ids.numpy()
        types = None if every.token_type_ids is None else every.token_type_ids.numpy()
        made = [
            Row(loaded.adapter, ids[row, :length], None if types is None else types[row, :length])
            for row, length in enumerate(encoded.lengths)
        ]
        return Question(loaded, examples, made)

    @torch.no_grad()
    def run(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """Run one pass; returns the outputs for each row, float32 `[outputs]`.

        Args:
            rows: of one kind.
        """
        graft = self._graft(rows[0].adapter.first_layer)
        lanes: dict[Adapter, list[int]] = {}
        for number, row in enumerate(rows):
            lanes.setdefault(row.adapter, []).append(number)
        order = list(chain.from_iterable(lanes.values()))
        by_lane = [rows[number] for number in order]
        outputs = graft(
            *self._tensors(by_lane),
            lane_rows=[len(numbers) for numbers in lanes.values()],
            lanes=list(lanes),
            text_states=self._text_states(graft, by_lane),
        )
        found = dict(zip(order, chain.from_iterable(each.cpu().numpy() for each in outputs), strict=True))
        return [found[number] for number in range(len(rows))]

    def _graft(self, first_layer: int) -> GraftedEncoder:
        if first_layer not in self._grafts:
            self._grafts[first_layer] = GraftedEncoder(self._session.base.parts, [], first_layer)
        return self._grafts[first_layer]

    def _text_states(self, graft: GraftedEncoder, rows: Sequence[Row]) -> Tensor | None:
        """The states `[R, T, H]` that enter layer k, if it is not the bottom one: computed once for each text, however
        many adapters are asked about it."""
        if graft.lower is None:
            return None
        texts = [row.text for row in rows]
        distinct = dict(zip(texts, rows, strict=True))
        states = graft.lower(*self._tensors(list(distinct.values())))
        places = {text: place for place, text in enumerate(distinct)}
        return states[torch.tensor([places[text] for text in texts], device=self.device)]

    def _tensors(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Token ids, mask and token types of rows, int64 `[R, T]` each, on the encoder's device."""
        lengths = np.array([len(row) for row in rows])
        ids = np.full((len(rows), lengths.max()), self._session.pad_id)
        types = np.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = row.ids
            if row.types is not None:
                types[place, : len(row)] = row.types
        mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
        found = [to_device(torch.from_numpy(each), self.device) for each in (ids, mask, types)]
        return found[0], found[1], None if rows[0].types is None else found[2]
