"""The searches of a study: the configurations of each method, and the searches that run them.

A configuration here is a mapping of dotted keys to values: all settings of a run beside its recipe, seed and folder.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from gpc_dist import config
from gpc_dist.config import TrackingConfig
from gpc_dist.errors import UserError
from gpc_dist.runs.folder import SearchFolder
from gpc_dist.search import algorithm, space, spec
from gpc_dist.search.pack_key import grouped, pack_key
from gpc_dist.search.spec import SearchSpec
from gpc_dist.study.layout import Part, Stage, StudyFolder
from gpc_dist.study.spec import StudySpec
from gpc_dist.tracking.credentials import URI

Configuration = Mapping[str, Any]


def draw(study: StudySpec, task: str) -> dict[str, list[dict[str, Any]]]:
    """Draw the configurations of each method for a task: at most `trials` of each, without duplicates.

    Methods with the same space get the same draws.

    Raises:
        UserError: two methods try the same configuration, or a space cannot be drawn from.
    """
    drawn = {method: _draw(study, task, method) for method in study.methods}
    owners: dict[str, str] = {}
    for method, group in drawn.items():
        for each in group:
            other = owners.setdefault(identity(each), method)
            if other != method:
                raise UserError(
                    f"methods {other} and {method} try the same configuration on {task}: give them different settings"
                )
    return drawn


def _draw(study: StudySpec, task: str, method: str) -> list[dict[str, Any]]:
    fixed, searched = study.settings_of(task, method), study.methods[method].space
    if not searched:
        return [fixed]
    fixed = {
        key: value
        for key, value in fixed.items()
        if key not in searched and config.RIVALS.get(key) not in searched
    }
    if chosen := study.choices.get(task, {}).get(method):
        return [fixed | chosen]
    written = {key: held.model_dump() for key, held in searched.items()}
    grid = math.prod(len(held.values) for held in searched.values() if held.kind == "grid")
    if grid > study.trials:
        raise UserError(
            f"methods.{method}: its grid has {grid} configurations, more than the {study.trials} that every method may "
            "try: write choice to draw from its values, or raise trials"
        )
    made = SearchSpec.model_validate(
        {
            "recipe": study.recipe_of(task),
            "settings": fixed,
            "space": written,
            "trials": study.trials // grid,
            "seed": study.seed,
        }
    )
    space.validate(made)
    found = [fixed | space.settings_of(sample) for sample in algorithm.draw(made)]
    return list({identity(each): each for each in found}.values())


def identity(configuration: Configuration) -> str:
    """Return a text that is the same for equal configurations, also after they were written to a file and read."""
    return json.dumps(configuration, sort_keys=True)


def searches(
    study: StudySpec, task: str, stage: Stage, configurations: Sequence[Configuration]
) -> list[SearchSpec]:
    """Return the searches that run these configurations with every seed of the stage: one for those that can share an
    encoder, one for those that train the encoder. Of what was added since they began, further ones.
    """
    alone = [each for each in configurations if each["adapter.method"] == "fine-tuning"]
    packed = [each for each in configurations if each["adapter.method"] != "fine-tuning"]
    return _of_part(study, task, stage, "packed", packed) + _of_part(study, task, stage, "alone", alone)


def _of_part(
    study: StudySpec, task: str, stage: Stage, part: Part, configurations: Sequence[Configuration]
) -> list[SearchSpec]:
    folder = StudyFolder(study.folder).task(task)
    begun = [spec.load(str(search.config)) for search in folder.begun(stage, part)]
    tried = [
        {identity(configuration_of(search, each)) for each in search.configurations or []} for search in begun
    ]
    seeds = study.search_seeds if stage == "search" else study.seeds
    left: dict[tuple[int, ...], list[Configuration]] = {}
    for each in configurations:
        had = {
            seed
            for search, known in zip(begun, tried, strict=True)
            if identity(each) in known
            for seed in search.seeds
        }
        if missing := tuple(seed for seed in seeds if seed not in had):
            left.setdefault(missing, []).append(each)
    added = [
        _search(study, task, part, folder.search(stage, part, len(begun) + number), list(missing), group)
        for number, (missing, group) in enumerate(left.items())
    ]
    wanted = set(map(identity, configurations))
    return [search for search, known in zip(begun, tried, strict=True) if known & wanted] + added


def _search(
    study: StudySpec,
    task: str,
    part: Part,
    folder: SearchFolder,
    seeds: list[int],
    configurations: Sequence[Configuration],
) -> SearchSpec:
    common = {
        key: value
        for key, value in configurations[0].items()
        if all(key in each and each[key] == value for each in configurations)
    }
    made = SearchSpec(
        name=f"{study.name}-{task}-{folder.path.name}",
        dir=folder.path,
        recipe=study.recipe_of(task),
        settings=common,
        configurations=[
            {key: value for key, value in each.items() if key not in common} for each in configurations
        ],
        seeds=seeds,
        resources=study.resources if part == "packed" else study.resources.model_copy(update={"pack": 1}),
        retries=study.retries,
        tracking=tracking_of(study),
    )
    keyed = ((pack_key(space.trial_config(made, each)), each) for each in made.configurations or [])
    # packs take them in order
    return made.model_copy(update={"configurations": [each for group in grouped(keyed) for each in group]})


def tracking_of(study: StudySpec) -> TrackingConfig:
    """Where the searches are recorded: in a file of the study's folder when nothing else is given."""
    if study.tracking.uri is not None or os.environ.get(URI):
        return study.tracking
    return study.tracking.model_copy(update={"uri": f"sqlite:///{study.folder / 'mlflow.db'}"})


def configuration_of(search: SearchSpec, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """Return the whole configuration of a trial: the settings of its search, and the values `drawn` for it."""
    return {**search.settings, **drawn}
