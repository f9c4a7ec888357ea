"""Members of a submission: one run, an array of runs, or a search."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from gpc_dist import config, deepspeed_file, files
from gpc_dist.cluster import slurm
from gpc_dist.cluster.job_record import RECIPE, SEARCH
from gpc_dist.cluster.submit import Member
from gpc_dist.config import Config
from gpc_dist.errors import UserError
from gpc_dist.parsing import to_yaml
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
    found = slurm.numbers(text)
    if found is None:
        raise UserError(f"--seeds '{text}' is no list of seeds: give 0-3, or 1,5,7")
    if len(found) != len(set(found)) or not found:
        raise UserError(f"--seeds '{text}' names a seed twice, or none")
    return [
        _of_array(recipe, overrides | {"run.seed": str(seed)}, task, f"seed-{seed}")
        for task, seed in enumerate(found)
    ]


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
    return [_of_array(recipe, overrides | own, task, str(task)) for task, own in enumerate(each)]


def search(spec: SearchSpec) -> list[Member]:
    """The member of a job of one search.

    Raises:
        UserError: the search is not valid.
    """
    space.validate(spec)
    folder = SearchFolder(spec.folder)
    kept: dict[str, str] = {}
    tree = spec.model_copy(update={"dir": folder.path, "recipe": RECIPE}).model_dump(mode="json")
    fixed = SearchSpec.model_validate(_with_kept(tree, "engine.ds_config", folder, kept))
    recipe = _with_kept(config.recipe_tree(spec.recipe), "ds_config", folder, kept)
    kept |= {SEARCH: fixed.to_yaml(), RECIPE: to_yaml(recipe)}
    return [Member(None, spec.name, folder, space.base_config(spec), kept)]


def _run(task: int | None, built: Config) -> Member:
    folder, kept = RunFolder(built.run.folder), dict[str, str]()
    tree = _with_kept(built.dump(), "ds_config", folder, kept)
    tree["run"]["dir"] = str(folder.path)
    kept[RECIPE] = to_yaml(tree)  # not built again: the copies that it names are not there yet
    return Member(task, built.run.name, folder, built, kept)


def _with_kept(tree: Any, key: str, folder: RunFolder, kept: dict[str, str], inside: bool = False) -> Any:
    """A tree in which this key names the kept copies of the user's DeepSpeed files.

    Args:
        kept: gets their texts, see `Member.kept`.

    Raises:
        UserError: there is no such file, or it is not valid.
    """
    if isinstance(tree, dict):
        return {k: _with_kept(v, key, folder, kept, inside or k == key) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_with_kept(each, key, folder, kept, inside) for each in tree]
    if not (inside and isinstance(tree, str) and tree.endswith(".json")):
        return tree
    deepspeed_file.read(tree)
    text, name = Path(tree).read_text(encoding="utf-8"), Path(tree).name
    while kept.setdefault(f"ds_configs/{name}", text) != text:  # of another folder
        name = f"other-{name}"
    return str(folder.job / "ds_configs" / name)


def _of_array(recipe: str, overrides: dict[str, str], task: int, own_name: str) -> Member:
    """A member of an array. Its folder is inside `run.dir` if that is given, else beside the usual one."""
    plain = config.load(recipe, overrides)
    own = {"run.name": f"{plain.run.name}-{own_name}"}
    if plain.run.dir is not None:
        own["run.dir"] = str(plain.run.dir / own_name)
    if plain.tracking.group is None:
        own["tracking.group"] = plain.run.name
    return _run(task, config.load(recipe, overrides | own))
