"""Searches of listed configurations that all fit into one pack: ranks of this machine run them, without Ray.

There is nothing to draw, to schedule or to place, and Ray with a process for each trial takes longer to start than the
trials of a small encoder take to train. Folders, records and results are those of any search.

A process that runs this module is one rank: `python -m gpc_dist.search.one_pack SEARCH...`, see `main`.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gpc_dist import files, logs
from gpc_dist.config import Config
from gpc_dist.distributed import launch
from gpc_dist.errors import EXIT_DONE, EXIT_STOPPED, AlteredError, UserError
from gpc_dist.interpreter import python
from gpc_dist.runs.folder import SearchFolder, TrialFolder
from gpc_dist.search import space, spec
from gpc_dist.search.pack_key import grouped, pack_key
from gpc_dist.search.spec import SearchSpec, StopConfig
from gpc_dist.search.trial_files import (
    COMPLETED,
    FAILED,
    STOPPED,
    TrialRecord,
    command_of,
    own_settings,
    read_trial,
    recipe_of,
    seed_group,
    trial_folder,
    write_refused,
    write_trial,
)
from gpc_dist.shown import shown_lines
from gpc_dist.training.stop import StopRequest

if TYPE_CHECKING:
    from gpc_dist.distributed.world import World
    from gpc_dist.training.pack import Pack
    from gpc_dist.training.progress import Event

_MODULE = "gpc_dist.search.one_pack"  # also where it is run as `__main__`
log = logging.getLogger(_MODULE)


def fits(searches: Sequence[SearchSpec]) -> bool:
    """Whether all trials of searches with the same resources fit into one pack on this machine, and nothing but their
    ends ends them."""
    wanted = searches[0].resources
    if os.environ.get("RAY_ADDRESS") or wanted.gpus_per_rank not in (None, 1):
        return False
    built: list[Config] = []
    trials = 0
    for search in searches:
        if search.configurations is None or search.scheduler.name != "fifo" or search.stop != StopConfig():
            return False
        trials += len(search.configurations) * len(search.seeds)
        built += [space.trial_config(search, each) for each in search.configurations]
    if trials > wanted.pack or trials > (wanted.concurrent or trials):
        return False
    if any(config.adapter.trains_encoder for config in built):
        return False
    return len(grouped((pack_key(config), config) for config in built)) == 1


def run(folders: Sequence[SearchFolder], ranks: int) -> int:
    """Run the trials that have not ended; returns the exit code. Signals reach the ranks meanwhile."""
    return launch.start_ranks(python(_MODULE, *(str(folder.path) for folder in folders)), ranks)


@dataclass(frozen=True)
class _Trial:
    search: SearchFolder
    metric: str
    """That of its search."""
    folder: TrialFolder
    record: TrialRecord
    config: Config
    retries: int

    @property
    def name(self) -> str:
        return self.config.run.name


def _trials(folder: SearchFolder) -> list[_Trial]:
    """The trials of a search that have not ended, as Ray Tune would number them. One that failed is tried again."""
    search = spec.load(str(folder.config)).model_copy(update={"recipe": str(recipe_of(folder))})
    found, places = [], [(each, seed) for each in search.configurations or [] for seed in search.seeds]
    for number, (settings, seed) in enumerate(places):
        record = read_trial(folder, number)
        if record is not None and record.decision in (COMPLETED, STOPPED):
            continue
        place, group = trial_folder(folder, number), seed_group(settings)
        host = socket.gethostname()
        record = TrialRecord(search.name, place.path.name, number, group, settings, seed, host=host)
        config = space.trial_config(search, settings, own_settings(search.name, place, seed))
        # whose folder always names the metric
        found.append(_Trial(folder, search.metric or "", place, record, config, search.retries))
    return found


class _Driver:
    """Runs trials in the lanes of a pack. Every rank makes the same calls in the same order."""

    def __init__(self, trials: Sequence[_Trial], pack: Pack, world: World):
        self._pack, self._world = pack, world
        self._trials = {trial.name: trial for trial in trials}
        self._left = {trial.name: trial.retries for trial in trials}
        """How often each may be started again."""
        self._start_s = time.monotonic()

    def run(self, stop: StopRequest) -> bool:
        """Train all trials; returns whether a stop was requested, at which they save their states."""
        for lane, trial in enumerate(self._trials.values()):
            self._add(trial, lane)
        while self._pack.names:
            if self._world.any(stop.signal is not None):
                for name in self._pack.names:
                    self._pack.leave(name, reason="stopped with the search")
                return True
            events = self._pack.advance(self._pack.names)
            self._say(events)
            for event in events:
                if event.over:
                    self._end(event)
        return False

    def _add(self, trial: _Trial, lane: int) -> None:
        record = replace(trial.record, lane=lane)
        self._world.on_main(lambda: write_trial(trial.search, record))
        try:
            self._pack.add(trial.name, trial.config, command_of(trial.folder))
        except AlteredError:  # the encoder is not to be trusted any more
            raise
        except UserError as error:
            reason = str(error)
            self._world.on_main(lambda: write_refused(trial.folder, trial.config, reason))
            self._decide(trial, FAILED)

    def _end(self, event: Event) -> None:
        trial = self._trials[event.name]
        if event.failure and self._left[event.name] > 0:
            self._left[event.name] -= 1
            self._add(trial, list(self._trials).index(event.name))
        else:
            self._decide(trial, FAILED if event.failure else COMPLETED)

    def _decide(self, trial: _Trial, decision: str) -> None:
        file = trial.folder.trial
        self._world.on_main(lambda: files.write_json(file, files.read_json(file) | {"decision": decision}))
        if decision == FAILED and self._world.is_main:
            log.warning("trial %s failed: %s", trial.name, trial.folder.read_status().reason)

    def _say(self, events: Sequence[Event]) -> None:
        told: dict[tuple[str, str], list[Event]] = {}
        for event in events if self._world.is_main else ():
            if event.metrics:
                trial = self._trials[event.name]
                told.setdefault((trial.record.search, trial.metric), []).append(event)
        for (search, metric), found in told.items():
            values = [event.metrics[metric] for event in found]
            log.info(
                "%s, step %d: %s of %d trials from %.4f to %.4f, after %.0f s",
                search,
                max(event.step for event in found),
                metric,
                len(values),
                min(values),
                max(values),
                time.monotonic() - self._start_s,
            )


def main(words: Sequence[str]) -> int:
    """Be one rank of searches; returns the exit code.

    Args:
        words: the searches' folders.
    """
    from gpc_dist.distributed.world import joined
    from gpc_dist.training.pack import Pack

    logs.configure(0)
    stop = StopRequest()
    try:
        if not (trials := [trial for path in words for trial in _trials(SearchFolder(path))]):
            return EXIT_DONE
        first = trials[0].config
        with joined(first.engine) as world, stop:
            # rank 0 says which, because the others might see a record that it has just written
            names = world.from_main([trial.name for trial in trials])
            trials = [trial for trial in trials if trial.name in names]
            driver = _Driver(trials, Pack(first, world), world)
            return EXIT_STOPPED if driver.run(stop) else EXIT_DONE
    except UserError as error:
        print(f"gpc-dist: error: {shown_lines(str(error))}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
