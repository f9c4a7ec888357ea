"""`gpc-dist tune`: runs a search, from its specification to its best trial: with Ray Tune, or without where there is
nothing for Ray to do (see `one_pack`)."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayActorError
from ray.tune.stopper import CombinedStopper

from gpc_dist import batch, config, files
from gpc_dist.distributed import checkpoint
from gpc_dist.errors import EXIT_DONE, EXIT_ENVIRONMENT, EXIT_STOPPED, MachineError, UserError
from gpc_dist.parsing import to_yaml
from gpc_dist.runs.facts import collect_facts
from gpc_dist.runs.folder import SearchFolder, State
from gpc_dist.search import algorithm, one_pack, ray_cluster, space
from gpc_dist.search.callback import TrialCallback, best_trial
from gpc_dist.search.pack_key import pack_key
from gpc_dist.search.packs import ACTOR, Packs, Shape
from gpc_dist.search.past import Past, is_closed, read_past, spent_file
from gpc_dist.search.progress import SearchProgress
from gpc_dist.search.spec import SearchSpec
from gpc_dist.search.trial import Trial, name_for_tune, sample_of, seed_of
from gpc_dist.search.trial_files import COMPLETED, FAILED, STOPPED, recipe_of, trial_folder
from gpc_dist.tracking.credentials import check_server
from gpc_dist.tracking.search_exporter import start_exporter, view_in_ui
from gpc_dist.tracking.store import tracking_uri
from gpc_dist.training.stop import StopRequest

log = logging.getLogger(__name__)

_LOST = "a rank ended"
_RAY, _EXPERIMENT = ".ray-", "trials"
"""Beginning of the names of folders for Ray Tune's own files, and the only thing in such a folder."""


def run_search(spec: SearchSpec, command: Sequence[str], resume: bool, stop: StopRequest) -> int:
    """Run a search; returns the exit code.

    Args:
        command: command line of the user, for the search's record.
        resume: continue a search that was interrupted.
        stop: at a request, trials save their state and the search ends; signals are taken up as requests meanwhile.

    Raises:
        UserError: the search is not valid, its folder has another one already, or there is none to resume.
        MachineError: the cluster has no room for one trial, or lacks nodes.
    """
    space.validate(spec)
    goal = space.goal(spec)
    given, folder = spec, SearchFolder(spec.folder)
    spec = given.model_copy(update={"metric": goal[0], "mode": goal[1]})  # for those who read the folder
    if spec.tracking.enabled:
        check_server(tracking_uri(spec.tracking.uri, folder.path))
    _check(folder, {given.to_yaml(), spec.to_yaml()}, resume)
    with folder.hold():
        past = _past(spec, folder, f"val/{goal[0]}") if resume else {}
        _open(folder, spec, command, resume)
        with stop:
            return _search(spec, folder, goal, past, stop)


def _past(spec: SearchSpec, folder: SearchFolder, metric: str) -> Past:
    past = read_past(folder, algorithm.trials(spec), metric)
    recorded = {str(trial_folder(folder, n).trial): trial.record.settings for n, trial in past.items()}
    space.check_recorded(spec, recorded)
    return past


def _search(
    spec: SearchSpec, folder: SearchFolder, goal: tuple[str, str], past: Past, stop: StopRequest
) -> int:
    recording = start_exporter(folder.path) if spec.tracking.enabled else None
    start_s, begun = time.time(), _saved_steps(folder)
    try:
        if one_pack.fits(spec):
            code = EXIT_STOPPED if stop.signal else one_pack.run(folder, spec)
            if code not in (EXIT_DONE, EXIT_STOPPED):
                folder.mark_running_trials(_LOST)
                folder.write_status("failed", _LOST)
                return code
            stopped = (stop.signal or "a signal") if code == EXIT_STOPPED else None
            trials = algorithm.trials(spec)
        else:
            with _place_for_ray(folder) as place, ray_cluster.connected(folder.path, stop):
                trials = 0 if stop.signal else _tune(spec, folder, *goal, past, place, stop)
            stopped = stop.signal
        if stopped:
            folder.write_status("stopped", stopped)
            # but for the step in which a trial sees the request
            if all(step <= begun.get(name, 0) + 1 for name, step in _saved_steps(folder).items()):
                batch.note_idle()
            log.info("stopped by %s; go on with: gpc-dist tune %s --resume", stopped, folder.config)
            return EXIT_STOPPED
        return _close(folder, *goal, trials, start_s)
    except BaseException as error:
        state: State = "failed" if isinstance(error, Exception) else "killed"
        folder.write_status(state, str(error) or type(error).__name__)
        raise
    finally:
        if recording:
            recorded = recording.finish(spec.tracking.finish_timeout_s)
            print(f"in MLflow: {view_in_ui(tracking_uri(spec.tracking.uri, folder.path), recorded)}")


def _saved_steps(folder: SearchFolder) -> dict[str, int]:
    """Return the step of each trial's newest state."""
    newest = {trial.path.name: checkpoint.newest(trial.checkpoints) for trial in folder.begun_trials()}
    return {name: checkpoint.step_of(path) for name, path in newest.items() if path is not None}


@contextmanager
def _place_for_ray(folder: SearchFolder) -> Iterator[Path]:
    """A new folder for Ray Tune's files while the block runs, where all nodes see it. Nothing in it outlives the
    search, and nothing that was there before is read: Ray unpickles what it finds in its folder."""
    for left in folder.path.glob(f"{_RAY}*"):
        # by a search that was killed; what holds anything else is somebody's
        if (
            left.is_dir()
            and not left.is_symlink()
            and {path.name for path in left.iterdir()} <= {_EXPERIMENT}
        ):
            shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(prefix=_RAY, dir=folder.path, ignore_cleanup_errors=True) as place:
        yield Path(place)


def _tune(
    spec: SearchSpec, folder: SearchFolder, metric: str, mode: str, past: Past, place: Path, stop: StopRequest
) -> int:
    """Run Ray Tune; returns the number of trials."""
    metric = f"val/{metric}"
    shape = pack_shape(spec)
    _say_what_is_cached(spec)
    packs: Any = ray.remote(Packs).options(name=ACTOR, num_cpus=0, max_concurrency=1000).remote(shape)
    base = space.base_config(spec)
    if not base.adapter.trains_encoder:  # whose runs have packs of their own
        packs.warm.remote(pack_key(base), base.dump())
    led = _Led(packs, folder)
    rules = algorithm.stop_rules(spec, metric, mode, folder)
    scheduler, concurrent = algorithm.make_scheduler(spec), _concurrent(spec, shape)
    analysis = tune.run(
        tune.with_parameters(Trial, search=str(folder.path), place=str(Path.cwd())),
        name=_EXPERIMENT,
        storage_path=str(place),
        metric=metric,
        mode=mode,
        config=algorithm.param_space(spec, past),
        num_samples=algorithm.samples(spec),
        search_alg=algorithm.searcher(spec, metric, mode, concurrent, past),
        scheduler=scheduler,
        stop=CombinedStopper(*rules) if rules else None,
        # a trial's process only waits; the ranks that train its run request their own resources
        resources_per_trial=tune.PlacementGroupFactory([{"CPU": 0.001}]),
        max_failures=spec.retries,
        raise_on_failed_trial=False,
        verbose=1,
        progress_reporter=_progress(spec, metric, mode),
        callbacks=[
            led,
            TrialCallback(folder, metric, scheduler, rules, stop),
            *(r for r in rules if isinstance(r, tune.Callback)),
        ],
        keep_checkpoints_num=2,
        reuse_actors=True,
        trial_name_creator=name_for_tune,
        trial_dirname_creator=lambda trial: trial.trial_id,
    )
    packs.close.remote()
    led.check(wait=True)
    ray.kill(packs)
    return len(analysis.trials)


class _Led(tune.Callback):
    """Ends a search whose actor that leads the packs is lost: Ray Tune would try each trial again without it."""

    def __init__(self, packs: Any, folder: SearchFolder):
        self._closed, self._folder = packs.closed.remote(), folder

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.check()

    def check(self, wait: bool = False) -> None:
        """Raise `MachineError` if it is lost.

        Args:
            wait: until it has closed all packs.
        """
        ended, _ = ray.wait([self._closed], timeout=None if wait else 0)
        try:
            ray.get(ended)
        except RayActorError:
            raise MachineError(
                "the process that leads the packs of the search was lost: go on with gpc-dist tune "
                f"{self._folder.config} --resume"
            ) from None


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


def _say_what_is_cached(spec: SearchSpec) -> None:
    """Say for which layers the trials will compute text states (see `training.text_states`)."""
    if spec.configurations is not None:
        layers = [space.trial_config(spec, each).adapter.first_layer for each in spec.configurations]
    elif (searched := spec.space.get("adapter.first_layer")) is not None:
        layers = list(searched.probes())
    else:
        layers = [space.base_config(spec).adapter.first_layer]
    late = sorted({layer for layer in layers if layer})
    if late and space.base_config(spec).engine.state_cache != "none":
        log.info(
            "text states that enter layer %s are computed by the first trial that needs them, and kept for the others "
            "(engine.state_cache)",
            ", ".join(map(str, late)),
        )


def pack_shape(spec: SearchSpec) -> Shape:
    """Return the resources of a pack, and the number of packs that fit on the cluster.

    A pack has only as many lanes as it needs when the concurrent trials are spread over all packs: a full pack beside
    an empty one would take longer.

    Raises:
        MachineError: not one pack fits.
    """
    resources, there = spec.resources, ray.cluster_resources()
    gpus = resources.gpus_per_rank
    if gpus is None:
        gpus = 1.0 if there.get("GPU", 0) >= 1 else 0.0
    room = int(there.get("CPU", 0) // (resources.ranks * resources.cpus_per_rank))
    if gpus:
        room = min(room, int(there.get("GPU", 0) // (resources.ranks * gpus)))
    if room < 1:
        raise MachineError(
            f"a trial takes {resources.ranks} rank(s) of {resources.cpus_per_rank} CPU(s) and {gpus:g} GPU(s), and the "
            f"cluster has {there.get('CPU', 0):g} CPU(s) and {there.get('GPU', 0):g} GPU(s): give a smaller "
            "--resources.ranks, --resources.cpus_per_rank or --resources.gpus_per_rank"
        )
    at_once = min(algorithm.trials(spec), resources.concurrent or math.inf)
    lanes = min(resources.pack, math.ceil(at_once / room))
    return Shape(
        ranks=resources.ranks,
        cpus_per_rank=resources.cpus_per_rank,
        gpus_per_rank=gpus,
        lanes=lanes,
        most=room,
        folder=str(Path.cwd()),
    )


def _concurrent(spec: SearchSpec, shape: Shape) -> int:
    return min(spec.resources.concurrent or shape.most * shape.lanes, shape.most * shape.lanes)


def _progress(spec: SearchSpec, metric: str, mode: str) -> SearchProgress:
    def settings(trial: Any) -> dict[str, Any]:
        drawn = space.settings_of(sample_of(trial.config))
        return {"seed": seed_of(trial.config, spec)} | {
            key: drawn[key] for key in spec.tried_keys if key in drawn
        }

    return SearchProgress(algorithm.trials(spec), metric, mode, settings)


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
