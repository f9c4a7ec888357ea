"""Members of a submission: one run, an array of runs, or a search."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import yaml

from gpc_dist import config, files
from gpc_dist.cluster.job_record import RECIPE, SEARCH
from gpc_dist.cluster.submit import Member
from gpc_dist.config import Config
from gpc_dist.errors import UserError
from gpc_dist.runs.folder import RunFolder, SearchFolder
from gpc_dist.schema import read_overrides
from gpc_dist.search import space
from gpc_dist.search.spec import SearchSpec


def single(recipe: str, overrides: dict[str, str]) -> list[Member]:
    """The member of a job of one run."""
    return [_run(None, config.load(recipe, overrides))]


def seeds(recipe: str, overrides: dict[str, str], text: str) -> list[Member]:
    """Members of an array with one run for each seed of a list such as `0-3` or `1,5,7`.

    Raises:
        UserError: `text` is not such a list, or names a seed twice.
    """
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise UserError(f"--seeds '{text}' is no list of seeds: give 0-3, or 1,5,7")
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    if len(found) != len(set(found)) or not found:
        raise UserError(f"--seeds '{text}' names a seed twice, or none")
    return [_of_array(recipe, overrides | {"run.seed": str(seed)}, seed, "seed-") for seed in found]


def lines(recipe: str, overrides: dict[str, str], file: Path) -> list[Member]:
    """Members of an array with one run for each line of a file.

    A line has the settings of its run, which are added to the shared ones. Empty lines and lines that begin with #
    are skipped.

    Raises:
        UserError: the file cannot be read, has no settings, or a line has something else.
    """
    each = []
    for number, line in enumerate(files.read_text(file).splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                each.append(read_overrides(shlex.split(line)))
            except (UserError, ValueError) as error:
                raise UserError(
                    f"line {number} of {file}: {error}; write it as in a shell, a value with blanks or "
                    "apostrophes in double quotes"
                ) from None
    if not each:
        raise UserError(f"--array {file} has no settings: give one line of --section.key VALUE for each run")
    return [_of_array(recipe, overrides | own, task) for task, own in enumerate(each)]


def search(spec: SearchSpec) -> list[Member]:
    """The member of a job of one search.

    Raises:
        UserError: the search is not valid.
    """
    space.validate(spec)
    folder = SearchFolder(spec.folder)
    fixed = spec.model_copy(update={"dir": folder.path, "recipe": RECIPE})
    recipe = yaml.safe_dump(config.recipe_tree(spec.recipe), sort_keys=False, allow_unicode=True)
    return [
        Member(None, spec.name, folder, space.base_config(spec), {SEARCH: fixed.to_yaml(), RECIPE: recipe})
    ]


def _run(task: int | None, built: Config) -> Member:
    folder = RunFolder(built.run.folder)
    fixed = built.model_copy(update={"run": built.run.model_copy(update={"dir": folder.path})})
    return Member(task, built.run.name, folder, built, {RECIPE: fixed.to_yaml()})


def _of_array(recipe: str, overrides: dict[str, str], task: int, prefix: str = "") -> Member:
    """A member of an array. Its folder is inside `run.dir` if that is given, else beside the usual one."""
    plain = config.load(recipe, overrides)
    own = {"run.name": f"{plain.run.name}-{prefix}{task}"}
    if plain.run.dir is not None:
        own["run.dir"] = str(plain.run.dir / f"{prefix}{task}")
    if plain.tracking.group is None:
        own["tracking.group"] = plain.run.name
    return _run(task, config.load(recipe, overrides | own))
