"""The specification of a search: a YAML file plus dotted overrides.

Every key is a field below with its documentation under it, as in `gpc_dist.config`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from gpc_dist import schema
from gpc_dist.config import LARGEST_SEED, RIVALS, Config, TrackingConfig
from gpc_dist.errors import UserError
from gpc_dist.names import Name, SearchName
from gpc_dist.parsing import to_yaml
from gpc_dist.schema import Section
from gpc_dist.search.distribution import Distribution
from gpc_dist.shipped import shipped_folder

RESERVED = {
    "run.name": "each trial gets a name of its own",
    "run.dir": "each trial gets a folder of its own in the search's `dir`",
    "run.seed": "give `seeds`",
    "task.metric": "give `metric`",
    "train.resume": "a trial always goes on from its own checkpoint",
    "engine.ranks": "give `resources.ranks`",
    **{
        key: "give the search's own `tracking` section"
        for key in schema.all_keys(Config)
        if key.startswith("tracking.")
    },
}
"""Keys that the search itself sets, and what to give instead."""


class SchedulerConfig(Section):
    name: Literal["fifo", "asha", "median", "pbt"] = "fifo"
    """`fifo`: every trial runs to its end; `asha`: at each rung (a number of steps) the worse trials are stopped;
    `median`: a trial worse than the median of the others is stopped; `pbt`: the worse trials continue from a copy of
    a better one, with changed values (population-based training)."""
    grace_steps: int | None = Field(None, ge=1)
    """asha, median: number of steps before a trial can be stopped; until its first evaluation when not given."""
    reduction_factor: float = Field(4, gt=1, le=10**6)
    """asha: factor between rungs: one of this many trials continues, to this many times the steps."""
    brackets: int = Field(1, ge=1, le=100)
    """asha: number of brackets, each with a longer grace period than the one before."""
    perturb_every: int | None = Field(None, ge=1)
    """pbt: steps between two comparisons of the trials."""
    quantile_fraction: float = Field(0.25, gt=0, le=0.5)
    """pbt: share of the trials that copy (the worst), and share that is copied (the best)."""
    resample_probability: float = Field(0.25, ge=0, le=1)
    """pbt: probability that a changed value is drawn again instead of moved to a nearby one."""

    @model_validator(mode="after")
    def _check(self) -> SchedulerConfig:
        if self.name == "pbt" and self.perturb_every is None:
            raise ValueError("scheduler.name 'pbt' needs scheduler.perturb_every")
        return self


class ResourcesConfig(Section):
    ranks: int = Field(1, ge=1, le=100_000)
    """Processes of a trial."""
    gpus_per_rank: float | None = Field(None, ge=0, le=1)
    """GPUs of a rank: 1, 0, or a fraction if several trials share a GPU. When not given: 1 if the cluster has GPUs."""
    cpus_per_rank: int = Field(1, ge=1, le=100_000)
    """Cores of a rank."""
    pack: int = Field(1, ge=1, le=10_000)
    """Trials that share one running encoder, each in a lane of its own (K)."""
    concurrent: int | None = Field(None, ge=1)
    """Largest number of trials at the same time; as many as the cluster has room for when not given."""

    @model_validator(mode="after")
    def _check(self) -> ResourcesConfig:
        if self.ranks > 1 and 0 < (self.gpus_per_rank or 0) < 1:
            raise ValueError(
                "resources.gpus_per_rank below 1 needs resources.ranks 1: two ranks cannot share one GPU"
            )
        return self


class StopConfig(Section):
    threshold: float | None = None
    """End the search when a trial's metric is as good as this."""
    max_s: float | None = Field(None, gt=0)
    """End the search after this many seconds."""
    patience: int | None = Field(None, ge=1)
    """End the search after this many finished trials in a row without a better one."""


class SearchSpec(Section):
    name: SearchName = "search"
    """Name of the search; the name of its file when not given."""
    dir: Path | None = None
    """Folder the search writes; `searches/<name>` when not given."""
    recipe: str
    """Recipe to search: a packaged one, or a path, relative to the search's file or to the working folder."""
    settings: dict[str, Any] = Field({})
    """Dotted keys of the recipe and the values they have in every trial: `train.steps: 100`. A folder under
    `adapter.init_from`, here and in what is tried, is relative to the search's file or to the working folder."""
    space: dict[str, Distribution] = Field({})
    """Dotted keys of the recipe and the values that are tried: `train.lr: {loguniform: [1e-3, 1e-1]}`."""
    configurations: list[dict[str, Any]] | None = Field(None, min_length=1)
    """Instead of a space: the configurations to try, in this order, each a mapping of dotted keys to values.
    Configurations that can share an encoder and its batches share packs, whatever their tasks; list them one after the
    other."""
    trials: int | None = Field(None, ge=1, le=100_000)
    """Number of configurations to try. Not for algorithm `grid` and for `configurations`: all of them are tried."""
    seeds: list[int] = Field([0], min_length=1)
    """Seeds (run.seed); every configuration is run with each of them."""
    metric: str | None = None
    """Metric to optimise, such as `accuracy`, on the validation split or, with `data.holdout`, on the held-out part;
    the task's main metric when not given."""
    mode: Literal["max", "min"] | None = None
    """Whether to maximise or minimise the metric; derived from the metric when not given."""
    algorithm: Literal["random", "grid", "optuna"] = "random"
    """`random`; `grid`: every combination; `optuna`: draws near good configurations (TPE; needs the extra `optuna`)."""
    scheduler: SchedulerConfig = SchedulerConfig()
    resources: ResourcesConfig = ResourcesConfig()
    stop: StopConfig = StopConfig()
    retries: int = Field(1, ge=0, le=10_000)
    """How often a failed trial is restarted from its last checkpoint."""
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    """Seed of the search's draws."""
    register_as: Name | None = None
    """Name of the MLflow model that gets the best adapter as a new version; the search's name when not given, no model
    when null."""
    tracking: TrackingConfig = TrackingConfig()

    @property
    def folder(self) -> Path:
        return self.dir or Path("searches") / self.name

    def to_yaml(self) -> str:
        """Return the search as YAML with every default filled in; it loads as the same search."""
        tree = self.model_dump(mode="json")
        return to_yaml(tree)

    @property
    def tried_keys(self) -> list[str]:
        """The keys in which trials can differ."""
        return list(dict.fromkeys(key for each in [self.space, *(self.configurations or [])] for key in each))

    @field_validator("settings", "space")
    @classmethod
    def _check_keys(cls, given: dict[str, Any]) -> dict[str, Any]:
        check_keys(given)
        return given

    @field_validator("configurations")
    @classmethod
    def _check_configurations(cls, given: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        for each in given or []:
            check_keys(each)
        texts = [json.dumps(each, sort_keys=True, default=str) for each in given or []]
        if twice := [number for number, text in enumerate(texts, start=1) if text in texts[: number - 1]]:
            raise ValueError(f"number {twice[0]} stands there before: give each configuration once")
        return given

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, given: list[int]) -> list[int]:
        check_seeds(given)
        return given

    @model_validator(mode="after")
    def _check(self) -> SearchSpec:
        tried = "space" if self.configurations is None else "configurations"
        if both := [key for key in self.tried_keys if key in self.settings]:
            raise ValueError(f"{', '.join(both)}: both in settings and in {tried}: give it in one of them")
        if self.configurations is not None:
            return self._check_explicit()
        if not self.space:
            raise ValueError("space is empty: give at least one key and its values, or give configurations")
        if self.algorithm == "grid" and self.trials is not None:
            raise ValueError(
                "algorithm 'grid' tries every combination: leave out trials, or give --trials null"
            )
        if self.algorithm != "grid" and self.trials is None:
            raise ValueError(f"algorithm '{self.algorithm}' needs trials: how many configurations to try")
        if self.algorithm == "optuna" and self.scheduler.name == "pbt":
            raise ValueError(
                "scheduler.name 'pbt' changes values by itself: it needs algorithm random or grid"
            )
        return self

    def _check_explicit(self) -> SearchSpec:
        if self.space or self.trials is not None or self.algorithm != "random":
            raise ValueError(
                "configurations are tried as they stand: leave out space, trials and algorithm, or leave out "
                "configurations"
            )
        if self.scheduler.name == "pbt":
            raise ValueError(
                "scheduler.name 'pbt' changes values within a space: give space, not configurations"
            )
        return self


def check_keys(given: Mapping[str, Any]) -> None:
    """Raise ValueError for a key that the configuration does not have, or that a search sets itself."""
    for key, value in given.items():
        _check_key(key)
        for other in value.when if isinstance(value, Distribution) else ():
            _check_key(other, f"{key}: when: ")
        if key in RESERVED:
            raise ValueError(_reserved(key))


def check_seeds(given: Sequence[int]) -> None:
    """Raise ValueError for seeds that are not all different, or that `run.seed` would not take."""
    if min(given) < 0 or max(given) > LARGEST_SEED or len(set(given)) < len(given):
        raise ValueError(f"give different seeds, from 0 to {LARGEST_SEED} (given: {given})")


def _check_key(key: str, where: str = "") -> None:
    valid = schema.all_keys(Config)
    if key not in valid:
        raise ValueError(where + schema.unknown_key(key, valid))


def _reserved(key: str) -> str:
    return f"'{key}' is set by the search itself: {RESERVED[key]}"


def all_keys() -> dict[str, FieldInfo]:
    """Return every dotted key that can be overridden, with the field that says what its value is; keys of the recipe
    begin with `settings.` or `space.`."""
    found: dict[str, FieldInfo] = {}
    for key, field in schema.all_keys(SearchSpec).items():
        if key == "settings":
            found |= {f"{key}.{inner}": value for inner, value in schema.all_keys(Config).items()}
        elif key == "space":
            found |= {f"{key}.{inner}": field for inner in schema.all_keys(Config)}
        else:
            found[key] = field
    return found


def load(search: str, overrides: dict[str, str] | None = None) -> SearchSpec:
    """Load a packaged search or a YAML file, with dotted overrides on top.

    The command line wins over the file: `--settings.KEY` fixes a key that the file searches, `--space.KEY` searches
    a key that the file fixes, and `--space.KEY null` removes the key from the space.

    Args:
        search: packaged name (`demo`) or path of a YAML file.
        overrides: dotted key -> value, as given on the command line (see `schema.parse_value`).

    Raises:
        UserError: unknown search, invalid YAML, unknown or duplicate key, value out of range.
    """
    path, tree = schema.read_yaml("search", search, shipped_folder("tune"))
    if not isinstance(tree, dict):
        raise UserError("a search is a mapping of: " + ", ".join(SearchSpec.model_fields))
    valid = all_keys()
    for section in {key.partition(".")[0] for key in valid if "." in key} & tree.keys():
        tree[section] = schema.mapping(section, tree[section])
    recipe = tree.get("recipe")
    if isinstance(recipe, str) and (path.parent / recipe).is_file():
        tree["recipe"] = str(path.parent / recipe)
    tree = with_adapters(path.parent, tree)
    tree.setdefault("name", path.stem)
    tree.setdefault("register_as", tree["name"])
    values = _parse(overrides or {}, valid)
    for key, value in values.items():
        _override(tree, key, value, values)
    try:
        return SearchSpec.model_validate(tree)
    except ValidationError as error:
        raise UserError(schema.explain(error, valid)) from None


def with_adapters(folder: Path, held: Any, key: str = "") -> Any:
    """What a file says, in which adapters to start from (`adapter.init_from`) that stand relative to the file are named
    relative to the working folder.

    Args:
        folder: of the file.
        key: under which it says this.
    """
    if isinstance(held, dict):
        kinds = ("choice", "grid")  # of a distribution, which is written under the key that it is of
        return {
            name: with_adapters(folder, each, key if name in kinds else name) for name, each in held.items()
        }
    if isinstance(held, list):
        return [with_adapters(folder, each, key) for each in held]
    beside = key == "adapter.init_from" and isinstance(held, str) and (folder / held).is_dir()
    return str(folder / held) if beside else held


def _parse(overrides: dict[str, str], valid: dict[str, FieldInfo]) -> dict[str, Any]:
    for key in overrides:
        if key in RESERVED and key not in valid:
            raise UserError(_reserved(key))
        if f"settings.{key}" in valid and key not in valid:
            raise UserError(
                f"'{key}' is a key of the recipe: fix it with --settings.{key}, or search it with --space.{key}"
            )
    return schema.parse_overrides(overrides, valid)


def _override(tree: dict[str, Any], key: str, value: Any, values: dict[str, Any]) -> None:
    section, _, name = key.partition(".")
    if not name:
        tree[key] = value
    elif section == "space" and value is None:
        tree["space"] = {other: held for other, held in tree.get("space", {}).items() if other != name}
    else:
        tree[section] = tree.get(section, {}) | {name: value}
        if section in ("settings", "space"):
            _give_way(tree, name, values)


def _give_way(tree: dict[str, Any], name: str, values: dict[str, Any]) -> None:
    """Remove the file's entries for a key given on the command line and for the key that excludes it."""
    for section in ("settings", "space"):
        for other in (name, RIVALS.get(name)):
            if f"{section}.{other}" not in values:
                tree.get(section, {}).pop(other, None)
