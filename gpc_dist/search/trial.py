"""A trial of Ray Tune: a process that waits while a pack trains its run."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search.repeater import TRIAL_INDEX

from gpc_dist import config, files
from gpc_dist.distributed import checkpoint
from gpc_dist.runs.folder import SearchFolder, TrialFolder
from gpc_dist.search import space, spec
from gpc_dist.search.pack_key import pack_key
from gpc_dist.search.packs import ACTOR
from gpc_dist.search.spec import SearchSpec
from gpc_dist.search.trial_files import (
    STOPPED,
    TrialRecord,
    command_of,
    own_settings,
    parse_name,
    read_trial,
    recipe_of,
    seed_group,
    trial_folder,
    trial_name,
    write_refused,
    write_trial,
)

SAMPLE = "sample"
"""Key of a trial's configuration in Ray Tune that holds the drawn values; those of a searcher are top-level keys."""
SEED = "run.seed"
NAME = "name"
"""Both beside the drawn values in `SAMPLE`; the name where several searches run together."""
STEP = "step"
OVER = "over"
"""Key of a result: whether the run is complete."""

_STATE, _ORIGIN = "state", "origin.json"
_COPIED = "started-from"
"""Subfolder of a run for the state of another trial that it starts from."""


def name_for_tune(trial: Any) -> str:
    """The name of a new trial in Ray Tune's output: that of its folder (see `trial_files.name_among`)."""
    if given := sample_of(trial.config).get(NAME):
        return str(given)
    # Tune's generator numbers trials in their ids, from 0; with a searcher only their tags have a number, from 1
    _, numbered, number = trial.trial_id.rpartition("_")
    return trial_name(int(number) if numbered else int(trial.experiment_tag.partition("_")[0]) - 1)


def sample_of(config: dict[str, Any]) -> dict[str, Any]:
    """The drawn values in a trial's configuration in Ray Tune; conditional ones may be `space.NOT_SET`."""
    sample: dict[str, Any] = config.get(SAMPLE, config)
    return sample


def seed_of(config: dict[str, Any], search: SearchSpec) -> int:
    """`run.seed` of a trial."""
    sample = sample_of(config)
    # Optuna draws a configuration once, and Ray Tune's repeater numbers the trials of it
    return int(sample[SEED]) if SEED in sample else search.seeds[config.get(TRIAL_INDEX, 0)]


class Trial(tune.Trainable):
    """One trial. A result is an evaluation of its run: `val/<metric>`, `step` and `over`."""

    def setup(
        self, config: dict[str, Any], searches: Mapping[str, str] | None = None, place: str = "."
    ) -> None:
        """Prepare. The run joins a pack in the first `step`, because only then its starting state is known.

        Args:
            config: the drawn values, and `run.seed`.
            searches: paths of the folders of `Searches`.
            place: working folder of the user.
        """
        os.chdir(place)
        self._searches = {name: _begun(SearchFolder(path)) for name, path in (searches or {}).items()}
        self._packs = ray.get_actor(ACTOR, namespace=ray.get_runtime_context().namespace)
        self._take_up(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Reuse this process for another trial, or for other values: a process takes seconds to start."""
        with suppress(
            Exception
        ):  # of the trial before: the next one is not to fail for it, and its pack ends it too
            self.cleanup()
        self._take_up(new_config)
        return True

    def _take_up(self, config: dict[str, Any]) -> None:
        # not asked for again: while the process is reused, Ray Tune's name is that of the next trial
        self._lane_name = self.trial_name
        search, self._number = parse_name(self._lane_name)
        self._folder, self._spec = self._searches[search]
        self._seed = seed_of(config, self._spec)
        sample = sample_of(config)
        self._drawn = {key: sample[key] for key in self._spec.tried_keys if key in sample}
        self._visit: int | None = None
        record = read_trial(self._folder, self._number)
        self._id = record.trial if record else self.trial_id
        self._heard = record.heard if record else 0
        self._stopped = record is not None and record.decision == STOPPED
        copied = checkpoint.newest(self._run.path / _COPIED) if record and record.copied else None
        self._start_from = str(copied) if copied else None

    def step(self) -> dict[str, Any]:
        """Wait for the next evaluation.

        Raises:
            RuntimeError: the run failed, or its pack has ended.
        """
        if self._visit is None:
            self._join()
        event: Any = ray.get(self._packs.next.remote(self._lane_name))
        if event.failure:
            self._visit = None
            raise RuntimeError(event.failure)
        metrics = {f"val/{name}": value for name, value in event.metrics.items()}
        done = event.over or self._stopped
        return {**metrics, STEP: event.step, OVER: event.over, tune.result.DONE: done}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save the run's state and copy it, so that this or another trial can resume from it."""
        if self._visit is not None:
            ray.get(self._packs.save.remote(self._lane_name))
        newest = checkpoint.newest(self._run.checkpoints)
        if newest is not None:
            shutil.copytree(newest, Path(checkpoint_dir) / _STATE / newest.name)
        files.write_json(Path(checkpoint_dir) / _ORIGIN, {"number": self._number})

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Start from another trial's state. The trial's own is ignored: its run's folder has one at least as new."""
        folder = Path(checkpoint)
        if files.read_json(folder / _ORIGIN).get("number") == self._number:
            return
        states = list((folder / _STATE).glob("step-*"))
        if states:
            # Ray removes the checkpoint that it has passed
            kept = self._run.path / _COPIED
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(states[0], kept / states[0].name)
            self._start_from = str(kept / states[0].name)

    def cleanup(self) -> None:
        """Save the run's state and leave the lane."""
        if self._visit is not None:
            ray.get(self._packs.leave.remote(self._lane_name, self._visit, "stopped by the search"))

    @property
    def _run(self) -> TrialFolder:
        return trial_folder(self._folder, self._number)

    def _join(self) -> None:
        if self._start_from:  # what was evaluated of it was another trial
            self._heard = checkpoint.step_of(Path(self._start_from))
        built = self._config()
        record = TrialRecord(
            self._spec.name,
            self._id,
            self._number,
            seed_group(self._drawn),
            space.settings_of(self._drawn),
            self._seed,
            copied=self._start_from is not None,
            heard=self._heard,
        )
        write_trial(self._folder, record)
        key, tree = pack_key(built), built.dump()
        if built.adapter.trains_encoder:
            # neither another run nor a restart of this one may get the changed encoder
            key = key.alone(uuid.uuid4().hex)
        try:
            # one that was stopped, and has not left its lane, has its last evaluation to report
            heard = 0 if self._stopped else self._heard
            joining: Any = self._packs.add.remote(
                self._lane_name, key, tree, command_of(self._run), self._start_from, heard
            )
            place: Any = ray.get(joining)
        except Exception as error:
            write_refused(self._run, built, str(getattr(error, "cause", None) or error))
            raise
        self._visit, self._start_from = place.visit, None
        write_trial(self._folder, replace(record, copied=False, lane=place.lane, host=place.host))

    def _config(self) -> config.Config:
        own, drawn = own_settings(self._spec.name, self._run, self._seed), self._drawn
        if self._spec.scheduler.name == "pbt":
            drawn = space.within(self._spec, drawn)
        return space.trial_config(self._spec, drawn, own)


def _begun(folder: SearchFolder) -> tuple[SearchFolder, SearchSpec]:
    """A search and its specification, with the recipe as it was when the search began."""
    loaded = spec.load(str(folder.config))
    return folder, loaded.model_copy(update={"recipe": str(recipe_of(folder))})
