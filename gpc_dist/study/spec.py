"""The specification of a study: a YAML file plus dotted overrides.

Every key is a field below with its documentation under it, as in `gpc_dist.config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from gpc_dist import files, schema
from gpc_dist.config import (
    LARGEST_SEED,
    MOST_RANKS,
    RIVALS,
    AdapterConfig,
    Config,
    EncoderConfig,
    TrackingConfig,
)
from gpc_dist.errors import UserError
from gpc_dist.names import LONGEST_OF_STUDY, StudyName, fault_of
from gpc_dist.parsing import to_yaml
from gpc_dist.schema import Section
from gpc_dist.search.distribution import Distribution
from gpc_dist.search.spec import ResourcesConfig, check_keys, check_seeds, with_adapters
from gpc_dist.shipped import shipped_folder

METHODS = get_args(AdapterConfig.model_fields["method"].annotation)
_METHOD = "adapter.method"


class TaskSpec(Section):
    recipe: str = ""
    """Recipe of the task: a packaged one, or a path, relative to the study's file or to the working folder; the recipe
    with the task's name when not given."""
    data: str | None = None
    """The task's folder in `data_root`. Without `data_root` or `data`, the recipe's data are used; for other data give
    `settings: {data.path: ...}`."""
    settings: dict[str, Any] = Field({})
    """Dotted keys and their values in this task's runs: its part of the budget, such as `train.steps: 400`."""

    @field_validator("settings")
    @classmethod
    def _check_keys(cls, given: dict[str, Any]) -> dict[str, Any]:
        check_keys(given)
        return given


class MethodSpec(Section):
    settings: dict[str, Any] = Field({})
    """Dotted keys and their values in all runs of the method. When `adapter.method` is not given, it is the method's
    name."""
    space: dict[str, Distribution] = Field({})
    """Dotted keys to search, and their values (see `gpc-dist tune`). Without any there is one configuration."""

    @field_validator("settings", "space")
    @classmethod
    def _check_keys(cls, given: dict[str, Any]) -> dict[str, Any]:
        check_keys(given)
        return given

    @model_validator(mode="after")
    def _check(self) -> MethodSpec:
        if both := [key for key in self.space if key in self.settings]:
            raise ValueError(f"{', '.join(both)}: both in settings and in space: give it in one of them")
        if _METHOD in self.space:
            raise ValueError(f"{_METHOD} is what methods are told apart by: give each a method of its own")
        return self


class OfficialConfig(Section):
    ranks: int | None = Field(None, ge=1, le=MOST_RANKS)
    """Ranks on the machine of `gpc-dist study`; when not given those of a run, at most one for each GPU (or core)."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """ZeRO stage; that of the runs when not given. Adapters that trained the encoder are measured at their own."""
    offload_param: Literal["none", "cpu", "nvme"] | None = None
    """Stage 3: where the shard of the encoder rests; as in the runs when neither this nor `zero_stage` is given."""
    nvme_path: Path | None = None
    """Folder on a local NVMe drive for `offload_param: nvme`."""

    @property
    def settings(self) -> dict[str, Any]:
        """What is given, as dotted keys of a run's configuration."""
        given = self.model_dump(mode="json", exclude_none=True)
        return {f"engine.{key}": value for key, value in given.items()}


class StudySpec(Section):
    name: StudyName = "study"
    """Name of the study; the name of its file when not given."""
    dir: Path | None = None
    """Folder the study writes; `studies/<name>` when not given."""
    encoder: EncoderConfig = EncoderConfig()
    data_root: Path | None = None
    """Folder that has the tasks' `data`; the recipes' own data (from the Hub) when not given."""
    tasks: dict[str, TaskSpec] = Field(min_length=1)
    """The tasks, by name."""
    methods: dict[str, MethodSpec] = Field(min_length=1)
    """The methods that are compared, by name."""
    reference: str = "prompt-tuning"
    """The method that the others are compared with, example by example."""
    floor: str = "linear-probe"
    """The method whose score is 0 % of the distance to `ceiling`."""
    ceiling: str = "fine-tuning"
    """The method whose score is 100 % of the distance from `floor`; a task that it does not learn is left out of
    means."""
    settings: dict[str, Any] = Field({})
    """Dotted keys and their values in all runs; a task's settings override them, and a method's override both."""
    holdout: float = Field(0.1, gt=0, lt=1)
    """Share of the training split that is held out (data.holdout). Checkpoints and configurations are selected on it;
    only the reported adapters are measured on the validation split, once."""
    choices: dict[str, dict[str, dict[str, Any]]] = Field({})
    """What was chosen before, as task -> method -> searched key -> value, or the path of an earlier study's
    `report.json`, relative to the study's file or to the working folder. A method that it has for a task runs with
    these values there, and is not searched. Its other tasks and methods are not used."""
    trials: int = Field(8, ge=1, le=100_000)
    """Largest number of configurations of each method, grids included: the same budget for all."""
    search_seeds: list[int] = Field([0], min_length=1)
    """Seeds of the search; every drawn configuration is run with each of them."""
    seeds: list[int] = Field([1, 2, 3], min_length=3)
    """Seeds of the reported runs; every chosen configuration is run again with each of them. At least 3, none of them
    in `search_seeds`."""
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    """Seed of the draws."""
    resources: ResourcesConfig = ResourcesConfig()
    """As in a search. Runs that train the encoder do not share it, whatever `pack` is."""
    official: OfficialConfig = OfficialConfig()
    """Where the chosen adapters are measured on the official split. It may change when a study goes on."""
    retries: int = Field(1, ge=0, le=10_000)
    """How often a failed trial is restarted from its last checkpoint."""
    tracking: TrackingConfig = TrackingConfig()

    @property
    def folder(self) -> Path:
        return (self.dir or Path("studies") / self.name).absolute()

    def to_yaml(self) -> str:
        """Return the study as YAML with every default filled in; it loads as the same study."""
        return to_yaml(self.model_dump(mode="json"))

    def settings_of(self, task: str, method: str) -> dict[str, Any]:
        """Return the fixed values of a method on a task."""
        own = self.methods[method].settings
        if _METHOD not in own:
            own = {_METHOD: method} | own
        data = None if self.data_root is None else self.tasks[task].data
        common: list[Mapping[str, Any]] = [
            {f"encoder.{key}": value for key, value in self.encoder.model_dump().items()},
            {"data.holdout": self.holdout},
            {} if data is None else {"data.path": str(self.data_root / data)},  # type: ignore[operator]
            self.settings,
            self.tasks[task].settings,
            own,
        ]
        merged: dict[str, Any] = {}
        for each in common:
            for key, value in each.items():
                if RIVALS.get(key) not in each:
                    merged.pop(RIVALS.get(key, ""), None)
                merged[key] = value
        return merged

    def recipe_of(self, task: str) -> str:
        """Return the recipe of a task's runs."""
        return self.tasks[task].recipe or task

    @field_validator("settings")
    @classmethod
    def _check_keys(cls, given: dict[str, Any]) -> dict[str, Any]:
        check_keys(given)
        return given

    @field_validator("search_seeds", "seeds")
    @classmethod
    def _check_seeds(cls, given: list[int]) -> list[int]:
        check_seeds(given)
        return given

    @model_validator(mode="after")
    def _check(self) -> StudySpec:
        for method, held in self.methods.items():
            if _METHOD not in held.settings and method not in METHODS:
                raise ValueError(
                    f"methods.{method}: '{method}' is no method of its own: give it settings: {{{_METHOD}: ...}}, "
                    f"one of {', '.join(METHODS)}"
                )
        if common := sorted({*self.search_seeds} & {*self.seeds}):
            raise ValueError(
                f"seeds: {', '.join(map(str, common))} also in search_seeds: what a configuration was chosen by is no "
                "test of it"
            )
        for task in self.tasks:
            for method, held in self.methods.items():
                chosen = self.choices.get(task, {}).get(method)
                if chosen is not None and chosen.keys() != held.space.keys():
                    raise ValueError(
                        f"choices.{task}.{method} has {', '.join(chosen) or 'no value'}, but the method searches "
                        f"{', '.join(held.space) or 'nothing'}: give these, or leave the method out of choices"
                    )
        for name in (*self.tasks, *self.methods):
            # stricter than a name: in keys of the command line, dots stand between names
            if fault_of(name, LONGEST_OF_STUDY) or not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(
                    f"'{name}' becomes the name of a folder: use letters, digits, - (not in front) and _ for tasks and "
                    "methods"
                )
        return self


def load(study: str, overrides: dict[str, str] | None = None) -> StudySpec:
    """Load a packaged study or a YAML file, with dotted overrides on top.

    Args:
        study: packaged name (`minilm`) or path of a YAML file.
        overrides: dotted key -> value, as given on the command line (see `schema.parse_value`): `trials`,
            `settings.train.steps`, `tasks.cb.data`, `tasks.cb.settings.train.steps`,
            `methods.gpc.settings.adapter.cell`. `tasks.cb null` removes a task, and `methods.gpc null` a method.

    Raises:
        UserError: unknown study, invalid YAML, unknown or duplicate key, value out of range.
    """
    path, tree = schema.read_yaml("study", study, shipped_folder("tune") / "studies")
    if not isinstance(tree, dict):
        raise UserError("a study is a mapping of: " + ", ".join(StudySpec.model_fields))
    tree = with_adapters(path.parent.absolute(), tree)
    tree = {"name": path.stem} | {key: held for key, held in tree.items() if held is not None}
    tree["tracking"] = {"experiment": tree["name"]} | schema.mapping("tracking", tree.get("tracking"))
    for key, text in (overrides or {}).items():
        _override(tree, key, schema.parse_value(key, text, _field(key)))
    for section in _NAMED:
        entries = schema.mapping(section, tree.get(section), _OF_NAMED)
        tree[section] = {name: schema.mapping(f"{section}.{name}", held) for name, held in entries.items()}
    for task in tree["tasks"].values():
        recipe = task.get("recipe")
        if isinstance(recipe, str) and (path.parent / recipe).is_file():
            task["recipe"] = str((path.parent / recipe).absolute())
    if isinstance(earlier := tree.get("choices"), str):
        beside = path.parent / earlier
        tree["choices"] = _chosen_in(beside if beside.is_file() else Path(earlier))
    try:
        return StudySpec.model_validate(tree)
    except ValidationError as error:
        raise UserError(schema.explain(error, _plain_keys())) from None


def _chosen_in(report: Path) -> dict[str, dict[str, Any]]:
    """What a study's `report.json` says was chosen: the values of the keys that its methods searched.

    Raises:
        UserError: it is not there, or no report of a study.
    """
    found = files.read_json(report)
    try:
        spaces = {method: held["space"] for method, held in found["study"]["methods"].items()}
        return {
            task: {
                method: {key: result["configuration"][key] for key in spaces[method]}
                for method, result in held["methods"].items()
                if spaces[method] and result["configuration"]
            }
            for task, held in found["tasks"].items()
        }
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"choices: {report} is no report.json of a study: give the path of one") from None


def _plain_keys() -> list[str]:
    return list(schema.all_keys(StudySpec))


_NAMED: dict[str, type[Section]] = {"tasks": TaskSpec, "methods": MethodSpec}
"""Sections with an entry for each task or method."""
_OF_NAMED = "names to what is said of each"


def _field(key: str) -> FieldInfo | None:
    """The field that says what the value of a dotted key is; None for a mapping, and for a key that there is not."""
    section, *rest = key.split(".")
    tree: type[Section] = StudySpec
    if section in _NAMED:
        tree, rest = _NAMED[section], rest[1:]
        section = rest.pop(0) if rest else ""
    if section == "settings":
        return schema.all_keys(Config).get(".".join(rest))
    return schema.all_keys(tree).get(".".join([section, *rest]))


def _override(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a dotted key from the command line."""
    first, *rest = key.split(".")
    if first in _NAMED and rest:
        name, *rest = rest
        entries = tree[first] = dict(schema.mapping(first, tree.get(first), _OF_NAMED))
        if not rest and value is None:
            entries.pop(name, None)
            return
        if not rest or rest[0] not in _NAMED[first].model_fields:
            keys = ", ".join(f"{first}.{name}.{field}" for field in _NAMED[first].model_fields)
            raise UserError(f"unknown key '{key}': give {keys}, or {first}.{name} null to leave it out")
        entry = entries[name] = dict(schema.mapping(f"{first}.{name}", entries.get(name)))
        _set(entry, rest[0], ".".join(rest[1:]), value)
    elif (first == "settings" and rest) or key in _plain_keys():
        _set(tree, first, ".".join(rest), value)
    else:
        raise UserError(schema.unknown_key(key, [*_plain_keys(), "tasks.NAME.data", "methods.NAME.settings"]))


def _set(tree: dict[str, Any], field: str, inner: str, value: Any) -> None:
    if not inner:
        tree[field] = value
        return
    held = dict(schema.mapping(field, tree.get(field)))
    held.pop(RIVALS.get(inner, ""), None)  # the command line wins
    tree[field] = held | {inner: value}
