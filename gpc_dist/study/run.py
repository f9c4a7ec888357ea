"""`gpc-dist study`: runs every stage of a study that has no result yet, one after the other.

For each task: the configurations of each method that has several are run and selected on the hold-out, the best one of
each method is run again with the final seeds, and the adapters of these runs are measured once on the official
validation split. All tasks pass a stage together: each has searches of its own, whose runs share packs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gpc_dist import files
from gpc_dist.errors import EXIT_DONE, MachineError, UserError
from gpc_dist.inference.engine import measured_config
from gpc_dist.runs.folder import SearchFolder
from gpc_dist.search import space, spec, tuner
from gpc_dist.search.spec import SearchSpec
from gpc_dist.search.tuner import Start
from gpc_dist.study.choose import choose, tried
from gpc_dist.study.layout import StudyFolder, TaskFolder
from gpc_dist.study.measure import measure_official
from gpc_dist.study.searches import Configuration, draw, searches
from gpc_dist.study.spec import StudySpec, load
from gpc_dist.tasks import make_task, read_part
from gpc_dist.training.stop import StopRequest


def run_study(study: StudySpec, command: Sequence[str]) -> int:
    """Run the stages of a study that have no result yet; returns the exit code.

    Args:
        command: command line of the user, for the record.

    Raises:
        UserError: the study is not valid, its folder has another one, or data cannot be read.
        MachineError: no method could be trained on a task; the others are done.
    """
    folder = StudyFolder(study.folder)
    check_begun(study, folder)
    drawn = {task: files.read_json(folder.task(task).drawn) for task in study.tasks}
    wanted = {
        task: {method: known.get(method, group) for method, group in draw(study, task).items()}
        for task, known in drawn.items()
    }
    for task, methods in wanted.items():
        _check(study, task, {name: group for name, group in methods.items() if name not in drawn[task]})
    for task, methods in wanted.items():
        if methods != drawn[task]:
            files.write_json(folder.task(task).drawn, methods)
    files.write_text(folder.config, study.to_yaml())
    return _run_stages(study, folder, command)


def check_begun(study: StudySpec, folder: StudyFolder) -> None:
    """Check that a study goes on with what it began with.

    Raises:
        UserError: a task or a seed is gone, or anything has changed but `official` and which methods there are.
    """
    if not folder.config.exists():
        return
    begun = load(str(folder.config))
    may_change = {key: getattr(study, key) for key in ("tasks", "methods", "seeds", "official")}
    if not (
        begun.model_copy(update=may_change) == study
        and all(study.tasks.get(name) == task for name, task in begun.tasks.items())
        and all(study.methods.get(name, method) == method for name, method in begun.methods.items())
        and {*begun.seeds} <= {*study.seeds}
    ):
        raise UserError(
            f"{folder.path} holds another study, or this one with other values (tasks, methods and seeds may be added, "
            "methods left out, and official may change, nothing else): go on with it as gpc-dist study "
            f"{folder.config}, or give this one another --name"
        )


def _check(study: StudySpec, task: str, methods: Mapping[str, Sequence[Configuration]]) -> None:
    """Check what would otherwise fail after hours: whether settings are accepted and data can be read."""
    for search in searches(study, task, "search", _all(methods)):
        space.validate(search)
        built = space.base_config(search)
        measured_config(built.dump(), study.official.settings)
        found = make_task(built.task, built.data)
        read_part(found, built.data, "holdout")
        read_part(found, built.data, "validation")


def _all(methods: Mapping[str, Sequence[Configuration]]) -> list[Configuration]:
    return [each for group in methods.values() for each in group]


def _run_stages(study: StudySpec, folder: StudyFolder, command: Sequence[str]) -> int:
    tasks = {task: folder.task(task) for task in study.tasks}
    drawn = {task: files.read_json(found.drawn) for task, found in tasks.items()}
    wanted = [
        search for task in tasks for search in searches(study, task, "search", _all(_searched(drawn[task])))
    ]
    if code := _run(wanted, command):
        return code
    chosen = {task: _choose(study, found) for task, found in tasks.items()}
    wanted = [
        search for task in tasks for search in searches(study, task, "final", list(chosen[task].values()))
    ]
    if code := _run(wanted, command):
        return code
    trained = [run for task, found in tasks.items() for run in _trained(found, chosen[task])]
    if code := measure_official(trained, study.official):
        return code
    if untrained := [task for task, found in chosen.items() if not found]:
        raise MachineError(
            f"no configuration of any method could be trained on {untrained[0]}: the status.json of the trials in "
            f"{tasks[untrained[0]].path} say why"
        )
    return EXIT_DONE


def _choose(study: StudySpec, folder: TaskFolder) -> dict[str, Configuration]:
    """The chosen configuration of each method that has one; chosen once, when all searches of the task have ended."""
    drawn: dict[str, list[Configuration]] = files.read_json(folder.drawn)
    known = files.read_json(folder.chosen)
    chosen = {
        method: best for method, best in known.items() if best["configuration"] in drawn.get(method, [])
    }
    left = {method: group for method, group in drawn.items() if method not in chosen}
    chosen |= {method: {"configuration": group[0]} for method, group in left.items() if len(group) == 1}
    chosen |= choose(tried(folder, "search", _searched(left)), len(study.search_seeds))
    if chosen != known:
        files.write_json(folder.chosen, chosen)
    return {method: best["configuration"] for method, best in chosen.items()}


def _searched(drawn: Mapping[str, list[Configuration]]) -> dict[str, list[Configuration]]:
    """The methods with something to choose from: one configuration is chosen as it stands."""
    return {method: group for method, group in drawn.items() if len(group) > 1}


def _trained(folder: TaskFolder, chosen: Mapping[str, Configuration]) -> list[Path]:
    """The final runs of a task that have a result."""
    final = tried(folder, "final", {method: [each] for method, each in chosen.items()})
    return [each.folder.path for each in final if each.value is not None]


def _run(wanted: Sequence[SearchSpec], command: Sequence[str]) -> int:
    """Run or resume the searches that have no result, those of all tasks together as far as they fit; returns the exit
    code of the first ones that leave none, or 0."""
    for group in tuner.groups([each for each in wanted if not _has_result(each)]):
        code = tuner.run_searches([_start(each) for each in group], command, stop=StopRequest())
        if code and not all(map(_has_result, group)):
            return code
    return EXIT_DONE


def _has_result(search: SearchSpec) -> bool:
    return SearchFolder(search.folder).result.exists()


def _start(search: SearchSpec) -> Start:
    config = SearchFolder(search.folder).config
    return Start(spec.load(str(config)), resume=True) if config.exists() else Start(search)
