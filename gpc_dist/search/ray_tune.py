"""Searches as one experiment of Ray Tune, whose trials' runs are trained in packs."""

from __future__ import annotations

import logging
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayActorError
from ray.tune.stopper import CombinedStopper

from gpc_dist.errors import MachineError
from gpc_dist.runs.folder import SearchFolder
from gpc_dist.search import algorithm, space
from gpc_dist.search.callback import TrialCallback
from gpc_dist.search.pack_key import pack_key
from gpc_dist.search.packs import ACTOR, Packs, Shape
from gpc_dist.search.past import Past
from gpc_dist.search.progress import SearchProgress
from gpc_dist.search.spec import SearchSpec
from gpc_dist.search.trial import Trial, name_for_tune, sample_of, seed_of
from gpc_dist.search.trial_files import going_on, parse_name
from gpc_dist.training.stop import StopRequest

log = logging.getLogger(__name__)

_RAY, _EXPERIMENT = ".ray-", "trials"
"""Beginning of the names of folders for Ray Tune's own files, and the only thing in such a folder."""


@dataclass(frozen=True)
class Running:
    """A search that is being run."""

    spec: SearchSpec
    """With metric and mode, whether or not they were given."""
    folder: SearchFolder
    past: Past
    begun: Mapping[str, int]
    """Step of each trial's newest state when this process took it up."""

    @property
    def metric(self) -> str:
        return self.spec.metric or ""

    @property
    def mode(self) -> str:
        return self.spec.mode or ""


def tune_searches(searches: Sequence[Running], place: Path, stop: StopRequest) -> list[int]:
    """Run Ray Tune; returns the number of trials of each search.

    Args:
        place: for Ray Tune's files, see `place_for_ray`.
    """
    specs, first = [search.spec for search in searches], searches[0]
    spec, folder = first.spec, first.folder
    named = {"": first} if len(searches) == 1 else {search.spec.name: search for search in searches}
    folders = {name: search.folder for name, search in named.items()}
    shape = pack_shape(specs)
    for each in specs:
        _say_what_is_cached(each)
    packs: Any = ray.remote(Packs).options(name=ACTOR, num_cpus=0, max_concurrency=1000).remote(shape)
    base = space.base_config(spec)
    if not base.adapter.trains_encoder:  # whose runs have packs of their own
        packs.warm.remote(pack_key(base), base.dump())
    led = _Led(packs, list(folders.values()))
    if len(searches) == 1:
        metric, mode = f"val/{first.metric}", first.mode
        values, past = algorithm.param_space(spec, first.past), first.past
    else:
        metric = mode = ""  # tasks have metrics of their own, and nothing here compares them
        values, past = algorithm.joint_space({name: (each.spec, each.past) for name, each in named.items()})
    rules = algorithm.stop_rules(spec, metric, mode, folder)
    scheduler, concurrent = algorithm.make_scheduler(spec), _concurrent(spec, shape)
    analysis = tune.run(
        tune.with_parameters(
            Trial,
            searches={name: str(folder) for name, folder in folders.items()},
            place=str(Path.cwd()),
        ),
        name=_EXPERIMENT,
        storage_path=str(place),
        metric=metric or None,
        mode=mode or None,
        config=values,
        num_samples=algorithm.samples(spec),
        search_alg=algorithm.searcher(spec, metric, mode, concurrent, past),
        scheduler=scheduler,
        stop=CombinedStopper(*rules) if rules else None,
        # a trial's process only waits; the ranks that train its run request their own resources
        resources_per_trial=tune.PlacementGroupFactory([{"CPU": 0.001}]),
        max_failures=spec.retries,
        raise_on_failed_trial=False,
        verbose=1,
        progress_reporter=_progress({name: each.spec for name, each in named.items()}, metric, mode),
        callbacks=[
            led,
            TrialCallback(folders, metric, scheduler, rules, stop),
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
    made = Counter(parse_name(str(trial))[0] for trial in analysis.trials)
    return [made[name] for name in named]


@contextmanager
def place_for_ray(folder: SearchFolder) -> Iterator[Path]:
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


class _Led(tune.Callback):
    """Ends a search whose actor that leads the packs is lost: Ray Tune would try each trial again without it."""

    def __init__(self, packs: Any, searches: Sequence[SearchFolder]):
        self._closed, self._searches = packs.closed.remote(), searches

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
                f"the process that leads the packs of the search was lost: {going_on(self._searches)}"
            ) from None


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


def pack_shape(specs: Sequence[SearchSpec]) -> Shape:
    """Return the resources of a pack of these searches, and the number of packs that fit on the cluster.

    A pack has only as many lanes as it needs when the concurrent trials are spread over all packs: a full pack beside
    an empty one would take longer.

    Raises:
        MachineError: not one pack fits.
    """
    resources, there = specs[0].resources, ray.cluster_resources()
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
    at_once = min(sum(map(algorithm.trials, specs)), resources.concurrent or math.inf)
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


def _progress(specs: Mapping[str, SearchSpec], metric: str, mode: str) -> SearchProgress:
    def settings(trial: Any) -> dict[str, Any]:
        spec = specs[parse_name(str(trial))[0]]
        drawn = space.settings_of(sample_of(trial.config))
        return {"seed": seed_of(trial.config, spec)} | {
            key: drawn[key] for key in spec.tried_keys if key in drawn
        }

    return SearchProgress(sum(map(algorithm.trials, specs.values())), metric, mode, settings)
