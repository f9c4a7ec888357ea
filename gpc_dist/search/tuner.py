"""`gpc-dist tune`: runs a search, or several at the same time, from its specification to its best trial: with Ray Tune,
or without where there is nothing for Ray to do (see `one_pack`)."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass

from gpc_dist import batch, config, files
from gpc_dist.distributed import checkpoint
from gpc_dist.errors import EXIT_DONE, EXIT_ENVIRONMENT, EXIT_STOPPED, UserError
from gpc_dist.parsing import to_yaml
from gpc_dist.runs.facts import collect_facts
from gpc_dist.runs.folder import SearchFolder, State
from gpc_dist.search import algorithm, one_pack, ray_cluster, ray_tune, space
from gpc_dist.search.callback import best_trial
from gpc_dist.search.past import Past, is_closed, read_past, spent_file
from gpc_dist.search.ray_tune import Running
from gpc_dist.search.spec import SearchSpec
from gpc_dist.search.trial_files import COMPLETED, FAILED, STOPPED, going_on, recipe_of, trial_folder
from gpc_dist.tracking.credentials import check_server
from gpc_dist.tracking.process import ExporterProcess
from gpc_dist.tracking.search_exporter import start_exporter, view_in_ui
from gpc_dist.tracking.store import tracking_uri
from gpc_dist.training.stop import StopRequest

log = logging.getLogger(__name__)

_LOST = "a rank ended"


@dataclass(frozen=True)
class Start:
    """A search that is to be run."""

    spec: SearchSpec
    resume: bool = False
    """Whether it goes on, after it was interrupted."""


def run_searches(starts: Sequence[Start], command: Sequence[str], stop: StopRequest) -> int:
    """Run searches at the same time, so that their trials fill the same packs; returns the exit code.

    Args:
        starts: one search; or several, each of which lists its configurations and compares no trials while they run
            (see `groups`), with the same resources.
        command: command line of the user, for the searches' records.
        stop: at a request, trials save their state and the searches end; signals are taken up as requests meanwhile.

    Raises:
        UserError: a search is not valid, its folder has another one already, or there is none to resume.
        MachineError: the cluster has no room for one trial, or lacks nodes.
    """
    ready = [(start, _ready(start)) for start in starts]
    with ExitStack() as held:
        searches = [_take_up(start, spec, held) for start, spec in ready]
        for start, search in zip(starts, searches, strict=True):
            _open(search.folder, search.spec, command, start.resume)
        with stop:
            return _run(searches, stop)


def groups(searches: Sequence[SearchSpec]) -> list[list[SearchSpec]]:
    """Searches that list their configurations, by which of them run at the same time: as many as fit into one pack
    where each does by itself, otherwise all that have the same resources, with Ray."""
    found: list[list[SearchSpec]] = []
    for search in searches:
        fits = one_pack.fits([search])
        for group in found:
            alike = (group[0].resources, group[0].retries) == (search.resources, search.retries)
            if alike and one_pack.fits([*group, search]) == fits:
                group.append(search)
                break
        else:
            found.append([search])
    return found


def _ready(start: Start) -> SearchSpec:
    """Check a search before anything is written; returns it with its metric and mode."""
    space.validate(start.spec)
    metric, mode = space.goal(start.spec)
    spec = start.spec.model_copy(update={"metric": metric, "mode": mode})
    folder = SearchFolder(spec.folder)
    if spec.tracking.enabled:
        check_server(tracking_uri(spec.tracking.uri, folder.path))
    _check(folder, {start.spec.to_yaml(), spec.to_yaml()}, start.resume)
    return spec


def _take_up(start: Start, spec: SearchSpec, held: ExitStack) -> Running:
    """Hold the folder of a search, and read what it has done."""
    folder = SearchFolder(spec.folder)
    held.enter_context(folder.hold())
    past = _past(spec, folder) if start.resume else {}
    return Running(spec, folder, past, _saved_steps(folder))


def _past(spec: SearchSpec, folder: SearchFolder) -> Past:
    past = read_past(folder, algorithm.trials(spec), f"val/{spec.metric}")
    recorded = {str(trial_folder(folder, n).trial): trial.record.settings for n, trial in past.items()}
    space.check_recorded(spec, recorded)
    return past


def _run(searches: Sequence[Running], stop: StopRequest) -> int:
    """Train what is left of searches whose folders are open, and close them; returns the exit code."""
    folders = [search.folder for search in searches]
    recordings = [
        (search, start_exporter(search.folder.path)) for search in searches if search.spec.tracking.enabled
    ]
    start_s = time.time()
    try:
        specs = [search.spec for search in searches]
        if one_pack.fits(specs):
            code = EXIT_STOPPED if stop.signal else one_pack.run(folders, specs[0].resources.ranks)
            if code not in (EXIT_DONE, EXIT_STOPPED):
                for folder in folders:
                    folder.mark_running_trials(_LOST)
                    folder.write_status("failed", _LOST)
                return code
            stopped = (stop.signal or "a signal") if code == EXIT_STOPPED else None
            counts = [algorithm.trials(spec) for spec in specs]
        else:
            with ray_tune.place_for_ray(folders[0]) as place, ray_cluster.connected(folders, stop):
                counts = [] if stop.signal else ray_tune.tune_searches(searches, place, stop)
            stopped = stop.signal
        if stopped:
            return _stop(searches, stopped)
        codes = [
            _close(search.folder, search.metric, search.mode, count, start_s)
            for search, count in zip(searches, counts, strict=True)
        ]
        return max(codes)
    except BaseException as error:
        state: State = "failed" if isinstance(error, Exception) else "killed"
        for folder in folders:
            folder.write_status(state, str(error) or type(error).__name__)
        raise
    finally:
        for search, recording in recordings:
            if recording:
                _finish(search, recording)


def _stop(searches: Sequence[Running], reason: str) -> int:
    """Record that searches were stopped; returns the exit code."""
    for search in searches:
        search.folder.write_status("stopped", reason)
    steps = (
        (search, name, step) for search in searches for name, step in _saved_steps(search.folder).items()
    )
    # but for the step in which a trial sees the request
    if all(step <= search.begun.get(name, 0) + 1 for search, name, step in steps):
        batch.note_idle()
    log.info("stopped by %s; %s", reason, going_on([search.folder for search in searches]))
    return EXIT_STOPPED


def _finish(search: Running, recording: ExporterProcess) -> None:
    spec, uri = search.spec, tracking_uri(search.spec.tracking.uri, search.folder.path)
    recorded = recording.finish(spec.tracking.finish_timeout_s)
    print(f"in MLflow: {view_in_ui(uri, recorded)}")


def _saved_steps(folder: SearchFolder) -> dict[str, int]:
    """Return the step of each trial's newest state."""
    newest = {trial.path.name: checkpoint.newest(trial.checkpoints) for trial in folder.begun_trials()}
    return {name: checkpoint.step_of(path) for name, path in newest.items() if path is not None}


def _check(folder: SearchFolder, same: Set[str], resume: bool) -> None:
    """Raise `UserError` for a folder that is not the search's.

    Args:
        same: what its `search.yaml` may hold.
    """
    there = folder.config.exists()
    if there and not resume:
        raise UserError(
            f"{folder.path} holds a search already: go on with it by --resume, or give this one another --name"
        )
    if not there and folder.trials.exists():
        # the trials of this search would resume from the checkpoints of those
        raise UserError(
            f"{folder.path} holds trials of a search whose {folder.config.name} is gone: remove the folder, or give "
            "this one another --name"
        )
    if resume and not there:
        raise UserError(f"{folder.path} holds no search to go on with: leave out --resume")
    if resume and folder.config.read_text(encoding="utf-8") not in same:
        raise UserError(
            f"{folder.config} differs from the search that is to go on: give --resume with that file, as "
            f"gpc-dist tune {folder.config} --resume"
        )


def _open(folder: SearchFolder, spec: SearchSpec, command: Sequence[str], resume: bool) -> None:
    folder.write_status("running")
    folder.result.unlink(missing_ok=True)
    if not resume:
        recipe = to_yaml(config.recipe_tree(spec.recipe))
        files.write_text(recipe_of(folder), recipe)
        spent_file(folder).unlink(missing_ok=True)
    files.write_text(folder.config, spec.to_yaml())  # from here on there is a search to go on with
    files.write_json(folder.facts, collect_facts(command))


def _close(folder: SearchFolder, metric: str, mode: str, trials: int, start_s: float) -> int:
    decisions: Counter[str | None] = Counter()
    for number in range(trials):
        trial = trial_folder(folder, number)
        decision = files.read_json(trial.trial).get("decision")
        if decision == STOPPED and not is_closed(trial):
            log.warning("trial %s was stopped, but not saved: --resume does it again", trial.path.name)
            decision = FAILED
        decisions[decision] += 1
    best = best_trial(folder, metric, mode)
    result = {
        "metric": metric,
        "mode": mode,
        "best_trial": None if best is None else best[0],
        "best": None if best is None else best[1],
        "trials": trials,
        "finished": decisions[COMPLETED],
        "stopped": decisions[STOPPED],
        "failed": decisions[FAILED],
        "wall_s": time.time() - start_s,
    }
    files.write_json(folder.result, result)
    if best is None:
        folder.write_status("failed", "no trial was evaluated")
        return EXIT_ENVIRONMENT
    folder.write_status("finished")
    adapter = folder.trial(best[0]).adapter
    print(f"best of {result['trials']} trials: {best[0]}, {metric} {best[1]:.4f}: {adapter}")
    print(f"compare them: gpc-dist compare {folder.path}")
    return EXIT_DONE
