"""Use of trained adapters: evaluation, prediction files, and predictions for single rows."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gpc_dist import config as configuration
from gpc_dist.adapter.lane import Adapter
from gpc_dist.adapter.store import AdapterCard, load_tuned_encoder, read_card
from gpc_dist.config import Config
from gpc_dist.distributed import launch
from gpc_dist.distributed.world import World, alone, init_world, joined
from gpc_dist.encoder.sharding import held
from gpc_dist.errors import UserError
from gpc_dist.inference.engine import engine_of
from gpc_dist.shown import one_line
from gpc_dist.tasks import Example, Prediction, Task, answered_by, make_task, read_part, write_predictions
from gpc_dist.training.evaluation import all_outputs
from gpc_dist.training.saved_adapter import load_on_all
from gpc_dist.training.session import Session, Split, load_base, open_session


def adapter_config(
    card: AdapterCard, overrides: Mapping[str, str] | None = None, engine: Mapping[str, Any] | None = None
) -> Config:
    """The configuration of an adapter: that of its card, with overrides on top.

    Args:
        engine: keys of the engine of its run, see `engine_of`.

    Raises:
        UserError: a key is unknown, or its value is not valid; or the card names no task, or none that is valid, or
            another one than adapters that answer the diagnostic that `task.name` asks for.
    """
    if not card.task.keys() >= {"task", "data"}:
        raise UserError("the adapter's card names no task: it was not written by gpc-dist train")
    tree = {
        "encoder": {"path": card.encoder.path, "revision": card.encoder.revision},
        "adapter": card.adapter.model_dump(mode="json"),
        "task": card.task["task"],
        "data": card.task["data"],
    }
    try:
        own = configuration.build(tree)
    except UserError as error:
        raise UserError(
            f"the adapter's card is not valid, or from another version: {one_line(error)}"
        ) from None
    chosen = dict(overrides or {})
    if answering := answered_by(asked := chosen.get("task.name", own.task.name)):
        if own.task.name != answering:
            raise UserError(
                f"the diagnostic {asked} is answered by adapters of task {answering}, and this one is of task "
                f"'{own.task.name}': give an adapter of {answering}"
            )
        # its data are its own: the file of another task would be read without complaint
        tree |= {"task": {}, "data": {"max_length": own.data.max_length}}
    return configuration.build({**tree, "engine": engine or {}}, chosen)


def task_of(folder: Path, adapter: Adapter, config: Config) -> Task:
    """The task that a configuration gives an adapter.

    Raises:
        UserError: it needs another number of outputs, or is not valid.
    """
    task = make_task(config.task, config.data)
    if adapter.outputs != task.outputs:
        raise UserError(
            f"the adapter in {folder} has {adapter.outputs} outputs, and task '{task.name}' needs {task.outputs}: "
            "evaluate it on the task and the labels it was trained for"
        )
    return task


def open_adapter(folder: Path, config: Config, world: World) -> Session:
    """Open a session that runs a saved adapter, at the stage of the configuration. Every rank must call it.

    Raises:
        UserError: the folder has no adapter, or one that belongs to another encoder or task.
    """
    adapter, card = load_on_all(folder, world)
    base = load_base(config, world)
    card.check_encoder(base.identity, base.parts.shape)
    task = task_of(folder, adapter, config)
    session = open_session(config, world, task, base, [adapter])
    if config.adapter.trains_encoder:
        world.on_all(lambda: load_tuned_encoder(folder, adapter, held))
    return session


def run_evaluation(folder: Path, part: Literal["validation", "holdout"], overrides: Mapping[str, str]) -> int:
    """`gpc-dist evaluate`: print the metrics of an adapter on a part of its data, and those of each class, as JSON.

    Raises:
        UserError: see `open_adapter`; or `part` is `holdout` and training held nothing out.
    """
    config = adapter_config(read_card(folder), overrides, engine_of(folder, overrides))
    with joined(config.engine) as world:
        session = open_adapter(folder, config, world)
        examples = read_part(session.task, config.data, part)
        split = session.split(examples)
        outputs = adapter_outputs(session, split)
        if outputs is not None:
            task = session.task
            found = {
                "task": task.name,
                "split": part,
                "examples": len(examples),
                "metrics": task.measure(examples, outputs),
                **task.by_class(task.confusion(examples, outputs)),
            }
            print(json.dumps(found))
    return 0


def run_prediction(folder: Path, input: Path | None, output: Path, overrides: Mapping[str, str]) -> int:
    """`gpc-dist predict`: write an adapter's predictions for a file, or else for the test split of its data (see
    `tasks.write_predictions`)."""
    own = {}
    if input is not None:
        # an absolute path, because `demo` and Hub ids have meanings of their own
        own = {"data.path": str(input.absolute().parent), "data.test": input.name}
    config = adapter_config(read_card(folder), {**overrides, **own}, engine_of(folder, overrides))
    with joined(config.engine) as world:
        session = open_adapter(folder, config, world)
        examples, outputs = outputs_of_test(session)
        if outputs is not None:
            file = write_predictions(session.task, examples, outputs, output)
            print(f"{len(examples)} predictions written to {file}")
    return 0


def outputs_of_test(session: Session) -> tuple[list[Example], Any]:
    """The examples of the test split, and the adapter's outputs for them on rank 0; None on other ranks."""
    examples = session.task.read("test")
    return examples, adapter_outputs(session, session.split(examples, cached=False))


def adapter_outputs(session: Session, split: Split, adapter: Adapter | None = None) -> Any:
    """Outputs of an adapter for every example of a split, on rank 0; None on other ranks.

    Args:
        adapter: the attached one when not given.
    """
    outputs = all_outputs(session, [adapter or session.model.adapter], split)
    return None if outputs is None else outputs[0]


class Predictor:
    """An adapter and its encoder, loaded to predict rows as they come. Threads that call it, as those of MLflow's
    server, take turns: the hooks of two passes on one encoder would write into each other's states.

    By default the encoder lies whole in this process. With `engine.zero_stage` 3 it is sharded over the ranks that
    `torchrun` or `srun` gave, each of which then makes the same calls with the same rows and gets the same predictions;
    or, in a single process, offloaded with `engine.offload_param`.

    Args:
        folder: the adapter's folder.
        overrides: dotted configuration keys, such as `{"engine.device": "cpu"}`.

    Raises:
        UserError: the folder has no adapter, or its encoder cannot be loaded.
    """

    def __init__(self, folder: Path | str, overrides: Mapping[str, str] | None = None):
        config = adapter_config(read_card(folder), overrides)
        sharded = config.engine.zero_stage == 3
        if sharded:
            launch.given_ranks()  # puts what `srun` says where `init_world` looks
        world = init_world(config.engine) if sharded else alone(config.engine)
        self.session = open_adapter(Path(folder), config, world)
        self._turn = threading.Lock()

    def predict(self, rows: Sequence[Mapping[str, Any]]) -> list[Prediction]:
        """A prediction for each example in the rows.

        Args:
            rows: with the columns of the task's data.

        Raises:
            UserError: a row lacks a column that the task reads.
        """
        task, world = self.session.task, self.session.world
        examples = task.parse([dict(row) for row in rows])
        with self._turn:
            outputs = adapter_outputs(self.session, self.session.split(examples, cached=False))
            on_main = world.from_main([each.tolist() for each in outputs or ()])
        return task.predictions(examples, [np.array(each, np.float32) for each in on_main])
