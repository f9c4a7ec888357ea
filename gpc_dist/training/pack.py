"""A pack: runs of a search's trials in the lanes of one encoder. Runs join and leave while others train.

Runs whose prompts enter before the same layer share the passes of one encoder, whatever their tasks. Runs without a
prompt have an encoder of their own: their heads read what it makes of the text, which is computed once, so it need not
stay in memory beside the others'.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from gpc_dist import files
from gpc_dist.config import Config
from gpc_dist.distributed import checkpoint
from gpc_dist.distributed.memory import peak_memory_mib
from gpc_dist.distributed.world import World
from gpc_dist.runs.folder import RunFolder, State
from gpc_dist.tasks import Task, make_task, read_part, selection_part
from gpc_dist.tasks.holdout import Part
from gpc_dist.training.losses import check_class_weights
from gpc_dist.training.progress import Event
from gpc_dist.training.record import open_folder, run_result
from gpc_dist.training.run import Run
from gpc_dist.training.saved_adapter import source_of
from gpc_dist.training.session import Session, Split, check_input, load_base, open_session
from gpc_dist.training.state import load_on_all, saved_state
from gpc_dist.training.trainer import Trainer


class Pack:
    """Loads the encoder and trains runs in its lanes. Every rank makes the same calls in the same order.

    Args:
        config: of one of its runs: has what all of them share (see `search.pack_key.PackKey`).

    Raises:
        UserError: for the same reasons as in `gpc-dist train`.
    """

    def __init__(self, config: Config, world: World):
        check_input(config, world)
        self._world = world
        self._tasks: dict[str, Task] = {}
        self._opened: dict[int | float | str, Session] = {}
        """A session for each `AdapterConfig.entry`, whose encoder all runs with this entry share."""
        self._splits: dict[tuple[str, ...], Split] = {}
        """By what they were read from, beginning with the key of their task."""
        self._session_of(config)
        self._trainer = Trainer()
        self._runs: dict[str, Run] = {}
        self._held: dict[str, ExitStack] = {}
        """The locks of their folders."""

    @property
    def names(self) -> list[str]:
        """Names of the runs in the pack's lanes."""
        return list(self._runs)

    def add(
        self,
        name: str,
        config: Config,
        command: Sequence[str],
        start_from: Path | None = None,
        heard: int | None = None,
    ) -> None:
        """Give a run a lane. The run begins, or resumes from the newest checkpoint in its folder.

        Args:
            command: command line that reproduces the run.
            start_from: folder of another run's checkpoint to start from instead; it replaces those in the folder.
            heard: step of the newest evaluation that the caller knows; a newer one that the checkpoint was saved after
                is the run's first event. None if it knows all.

        Raises:
            UserError: for the same reasons as in `gpc-dist train`; the pack stays usable without this run.
        """
        self._forget_data(config)
        session, folder = self._session_of(config), RunFolder(config.run.folder)
        check_class_weights(config.train, session.task)
        spent_s = session.text_states_s
        training = self._split(session, "train")
        validation = self._split(session, selection_part(config.data))
        with ExitStack() as held:
            session.world.on_main(lambda: held.enter_context(folder.hold()))
            if start_from is None:
                saved = saved_state(folder.checkpoints, config, session.world)
            else:
                saved = load_on_all(start_from, session.world)
            source = source_of(config, session.world) if saved is None else None
            adapter = session.new_adapter(config, source)
            examples = training.examples, validation.examples
            session.world.on_main(lambda: open_folder(folder, config, command, session.task, *examples))
            if start_from is not None and saved is not None:
                session.world.on_main(partial(checkpoint.replace_all, folder.checkpoints, saved))
            self._runs[name] = Run(
                name,
                session,
                folder,
                adapter=adapter,
                training=training,
                validation=validation,
                saved=saved,
                filled_s=session.text_states_s - spent_s,
                heard=heard,
            )
            self._held[name] = held.pop_all()
        session.release_lower_layers()

    def leave(self, name: str, state: State = "stopped", reason: str = "") -> None:
        """Save a run's state and free its lane; does nothing if there is no such run: it may have ended meanwhile."""
        if name in self._runs:
            self._runs[name].save()
            self._close(name, state, reason)

    def save(self, name: str) -> None:
        """Save a run's state as a checkpoint in its folder."""
        self._runs[name].save()

    def advance(self, names: Sequence[str], most_s: float = 5.0) -> list[Event]:
        """Train some of the runs until one of them is evaluated, ends or fails, or until `most_s` has passed. The
        other runs are not trained.

        Args:
            names: of the runs to train.
            most_s: seconds after which to return without an event, by rank 0's clock.
        """
        world, end_s = self._world, time.monotonic() + most_s

        def late() -> bool:
            return world.is_main and time.monotonic() > end_s

        events = self._trainer.advance([self._runs[name] for name in names], pause=late)
        for event in events:
            if event.failure:
                self._close(event.name, "failed", event.failure)
            elif event.over:
                self._close(event.name, "finished")
        return events

    def _close(self, name: str, state: State, reason: str = "") -> None:
        """Free a run's lane, and write its result and its end state."""
        run, world = self._runs.pop(name), self._world
        memory = world.gather(peak_memory_mib(world.device))
        run.close()
        if memory is not None:  # on rank 0
            self._write_end(run, memory, state, reason)
        self._held.pop(name).close()

    def _write_end(self, run: Run, memory: list[float], state: State, reason: str) -> None:
        if state in ("finished", "stopped"):
            measured = {"peak_memory_mib": memory, "energy_j": None, "wall_s": time.time() - run.started_s}
            shared = {"share_s": run.position.share_s}
            files.write_json(run.folder.result, run_result(run) | measured | shared)
        run.folder.write_status(state, reason)

    def _session_of(self, config: Config) -> Session:
        """The session of a run, with an encoder that is loaded for the first one that needs it."""
        source, entry = _source(config), config.adapter.entry
        if source not in self._tasks:
            self._tasks[source] = make_task(config.task, config.data)
        task = self._tasks[source]
        if entry not in self._opened:
            base = load_base(config, self._world)
            self._opened[entry] = open_session(config, self._world, task, base)
        return self._opened[entry].of(config, task)

    def _split(self, session: Session, part: Part) -> Split:
        """Read and encode a part of a run's data, once for all runs that use the same examples and the same states."""
        config = session.config
        data, seed = config.data, config.run.seed
        limit = data.limit_train if part == "train" else data.limit_eval
        drawn = seed if part == "train" and limit is not None else None
        key = (_source(config), *map(str, (config.adapter.entry, part, limit, drawn)))
        if key not in self._splits:
            examples = read_part(session.task, data, part, seed)
            self._splits[key] = session.split(examples, run=config if part == "train" else None)
        return self._splits[key]

    def _forget_data(self, config: Config) -> None:
        """Release the examples of tasks that neither this run has nor those in the lanes: a search of many tasks goes
        through them one after the other."""
        kept = {_source(each) for each in (config, *(run.config for run in self._runs.values()))}
        self._tasks = {key: task for key, task in self._tasks.items() if key in kept}
        self._splits = {key: split for key, split in self._splits.items() if key[0] in kept}


def _source(config: Config) -> str:
    """The same for runs of one task on the same data, whatever part of them each reads."""
    return config.task.model_dump_json() + config.data.model_dump_json(exclude={"limit_train", "limit_eval"})
