"""A pack: several runs in the lanes of one running encoder, each trained as it would be alone.

Every rank makes the same calls in the same order. Runs join and leave between steps; the others do not notice.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from gpc_dist import files
from gpc_dist.config import Config
from gpc_dist.distributed.checkpoint import Checkpoint
from gpc_dist.distributed.memory import peak_memory_mib
from gpc_dist.distributed.world import World
from gpc_dist.errors import UserError
from gpc_dist.runs.folder import RunFolder, State
from gpc_dist.runs.metrics import MetricLog
from gpc_dist.tasks import make_task, read_part, selection_part
from gpc_dist.tasks.holdout import Part
from gpc_dist.training.event import Event
from gpc_dist.training.lane_run import LaneRun, Outlet, saved_state
from gpc_dist.training.loop import evaluate
from gpc_dist.training.record import open_folder, run_result
from gpc_dist.training.session import (
    Split,
    check_input,
    fresh_adapter,
    hand_over_encoder,
    load_base,
    open_session,
)
from gpc_dist.training.step import backward, finish, prepare


@dataclass
class _Member:
    run: LaneRun
    folder: RunFolder
    log: MetricLog | None
    """On rank 0."""
    joined_s: float = field(default_factory=time.time)


class Pack:
    """The lanes of one encoder, which is loaded here.

    Args:
        config: encoder, task, data and engine, which all runs of the pack share (see `search.space.pack_key`).

    Raises:
        UserError: as `gpc-dist train` of this configuration would.
    """

    def __init__(self, config: Config, world: World):
        check_input(config, world)
        task = make_task(config.task, config.data)
        self._session = open_session(config, world, task, load_base(config, world), [])
        self._members: dict[str, _Member] = {}
        self._splits: dict[tuple[Part, int | None, int | None], Split] = {}

    @property
    def names(self) -> list[str]:
        """The runs in its lanes."""
        return list(self._members)

    def add(
        self, name: str, config: Config, command: Sequence[str], start_from: Checkpoint | None = None
    ) -> None:
        """Give a run a lane: it begins, or goes on from the newest checkpoint in its folder.

        Args:
            command: what reproduces the run.
            start_from: another run's state to go on from instead.

        Raises:
            UserError: as `gpc-dist train` would; the pack goes on without it.
        """
        session, folder = self._session, RunFolder(config.run.folder)
        saved = start_from or saved_state(folder.checkpoints, config)
        training = self._split("train", config)
        validation = self._split(selection_part(config.data), config)
        adapter = fresh_adapter(config, session.task, session.base).to(session.world.device)
        hand_over_encoder(session, adapter)
        log, problem = None, ""
        if session.world.is_main:
            try:
                open_folder(folder, config, command, session.task, training.examples, validation.examples)
                files.write_json(folder.ds_config, session.ds_config)
                log = MetricLog(folder.metrics)
                log.truncate_after(saved.step if saved else 0)
            except UserError as error:
                problem = str(error)
        if problem := session.world.from_main(problem):
            raise UserError(problem)
        outlet = Outlet(folder.checkpoints, folder.adapter, log.append if log else None)
        run = LaneRun(session, config, adapter, training, validation, outlet, saved)
        self._members[name] = _Member(run, folder, log)

    def leave(self, name: str, state: State = "stopped", reason: str = "") -> None:
        """Save a run's state and free its lane; no run of that name is fine, it may have ended meanwhile."""
        if name in self._members:
            self._members[name].run.save()
            self._close(name, state, reason)

    def save(self, name: str) -> None:
        """Save a run's state, as a checkpoint in its folder."""
        self._members[name].run.save()

    def advance(self, names: Sequence[str], most_s: float = 5.0) -> list[Event]:
        """Train some of the lanes until one of them has been evaluated, has ended or has failed, or for a while;
        the other lanes rest.

        Args:
            names: of the runs to train.
            most_s: seconds after which to return even if nothing has come up; by rank 0's clock.
        """
        world, start_s = self._session.world, time.monotonic()
        # of runs that joined at an evaluation they still lack, or at their end
        events = self._settle(names, stepped=False)
        stopping = not names
        while not events and not stopping:
            late = world.is_main and time.monotonic() - start_s > most_s
            failed, stopping = self._step(names, late)
            events = [*failed, *self._settle(names, stepped=True)]
        return events

    def _step(self, names: Sequence[str], stop: bool) -> tuple[list[Event], bool]:
        """One step of these lanes: the runs that have failed in it, and whether any rank wants to stop."""
        session, members = self._session, {name: self._members[name] for name in names}
        runs = [member.run for member in members.values()]
        session.model.lanes = nn.ModuleList(run.adapter for run in runs)
        session.model.train()
        start_s = time.monotonic()
        step = prepare(session, [run.next_work() for run in runs])
        for run in runs:
            run.set_rate()
        losses = backward(session, step)
        done, stopping = finish(session, [run.optimizer for run in runs], losses, flag=stop)
        seconds = time.monotonic() - start_s
        failed = []
        for (name, member), work, one in zip(members.items(), step.works, done, strict=True):
            member.run.position.share_s += seconds / len(members)
            try:
                member.run.count_step(work, one, seconds)
            except UserError as error:
                failed.append(Event(name, member.run.position.step, {}, over=True, failure=str(error)))
                self._close(name, "failed", str(error))
        return failed, stopping

    def _settle(self, names: Sequence[str], stepped: bool) -> list[Event]:
        """Evaluate the runs that are due, all in one pass over the split, save, and let the complete ones go."""
        session = self._session
        members = {name: self._members[name] for name in names if name in self._members}
        due = {name: member.run for name, member in members.items() if member.run.evaluation_due}
        for split in {id(run.validation): run.validation for run in due.values()}.values():
            together = [run for run in due.values() if run.validation is split]
            start_s = time.monotonic()
            session.model.lanes = nn.ModuleList(run.adapter for run in together)
            metrics = evaluate(session, split)
            assert metrics is not None
            seconds = time.monotonic() - start_s
            for run, found in zip(together, metrics, strict=True):
                run.note_evaluation(found)
                run.position.share_s += seconds / len(together)
        events = []
        for name, member in members.items():
            run, evaluated = member.run, name in due
            if (stepped or evaluated) and run.save_due(evaluated):
                run.save()
            if evaluated or run.over:
                events.append(Event(name, run.position.step, run.position.last, over=run.over))
            if run.over:
                self._close(name, "finished")
        return events

    def _close(self, name: str, state: State, reason: str = "") -> None:
        """Free a lane and write the end of its run."""
        member = self._members.pop(name)
        world = self._session.world
        memory = world.gather(peak_memory_mib(world.device))
        if member.log is not None:
            member.log.close()
        if not world.is_main:
            return
        if state in ("finished", "stopped"):
            result = run_result(member.run)
            result |= {"peak_memory_mib": memory, "energy_j": None, "wall_s": time.time() - member.joined_s}
            files.write_json(member.folder.result, result | {"share_s": member.run.position.share_s})
        member.folder.write_status(state, reason)

    def _split(self, part: Part, config: Config) -> Split:
        """A part of the data, read and encoded once for all runs that use the same examples of it."""
        data, seed = config.data, config.run.seed
        limit = data.limit_train if part == "train" else data.limit_eval
        key = (part, limit, seed if part == "train" and limit is not None else None)
        if key not in self._splits:
            self._splits[key] = self._session.split(read_part(self._session.task, data, part, seed))
        return self._splits[key]
